"""How far transferability scores can be trusted, from accuracies and scores of several checkpoints on several targets.

`evidence` holds the numbers, from a study or from anybody's table (`table`). `measure` compares every score with
lists that need no data of the target, `checklist` looks for what makes such a comparison worthless, and `points` turns
gaps in a score into gaps in accuracy. `python -m jax_transfer.trust TABLE.csv` writes the page.
"""
