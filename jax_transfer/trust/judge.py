"""Judges all scores of an evidence: the rows of all result files that say how far the scores can be trusted."""

import dataclasses

from jax_transfer.trust import checklist, measure, points
from jax_transfer.trust.evidence import Evidence


def judge(evidence: Evidence) -> dict[str, list]:
    """Computes the rows of results/{ranking,trust,checklist,points,predictions}.jsonl.

    The mean of the lines of all scores (`points.pooled`) is judged as a further score.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {("mnist", "a"): 0.7, ("mnist", "b"): 0.9, ("mnist", "c"): 0.8}
    >>> {file: len(rows) for file, rows in judge(make("probe", accuracies, {"logme": accuracies})).items()}
    {'ranking': 1, 'trust': 1, 'checklist': 3, 'points': 0, 'predictions': 0}
    """
    pooled = points.pooled(evidence)
    judged = evidence
    if pooled is not None:
        judged = dataclasses.replace(evidence, scores={**evidence.scores, points.POOLED: pooled})
    return {
        "ranking": measure.ranking_rows(judged),
        "trust": measure.trust_rows(judged),
        "checklist": checklist.check_rows(judged),
        "points": points.points_rows(evidence),
        "predictions": points.prediction_rows(evidence),
    }
