"""Learning rates that fall when a validation score no longer grows."""

from collections.abc import Sequence


def halvings(history: Sequence[float], patience: int) -> int:
    """Counts how often a learning rate has been halved after a history of validation scores, higher is better.

    It is halved when the best score so far has not grown for more than `patience` epochs since it last grew, or since
    the last halving: torch's ReduceLROnPlateau(mode="max", factor=0.5, threshold=0), as a pure function. The learning
    rate of the next epoch is base * 0.5 ** halvings(history, patience).

    Args:
      history: the score after each epoch so far.
      patience: number of epochs without growth that change nothing.

    Example:
      >>> [halvings([1.0, 2.0, 2.0, 1.0, 2.0, 3.0, 3.0, 3.0][:n], patience=1) for n in range(9)]
      [0, 0, 0, 0, 1, 1, 1, 1, 2]
    """
    best, waited, count = float("-inf"), 0, 0
    for score in history:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited > patience:
            count, waited = count + 1, 0
    return count
