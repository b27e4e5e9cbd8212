"""Judges all scores of an evidence: the rows of all result files that say how far the scores can be trusted."""

import collections
import dataclasses

from jax_transfer.trust import checklist, measure, points
from jax_transfer.trust.evidence import Evidence

MANY_VARIANTS = 5  # of one score, from which on only results/ranking.jsonl and a heat map hold them


def judge(evidence: Evidence) -> dict[str, list]:
    """Computes the rows of results/{ranking,trust,checklist,points,predictions}.jsonl.

    The mean of the lines of all scores (`points.pooled`) is judged as a further score. A score with a whole grid of
    options is judged by its usual ones alone, unless its only rows are those of the grid.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {("mnist", "a"): 0.7, ("mnist", "b"): 0.9, ("mnist", "c"): 0.8}
    >>> {file: len(rows) for file, rows in judge(make("probe", accuracies, {"logme": accuracies})).items()}
    {'ranking': 1, 'trust': 1, 'checklist': 5, 'points': 0, 'predictions': 0}
    """
    pooled = points.pooled(without_grids(evidence))
    whole = evidence
    if pooled is not None:
        whole = dataclasses.replace(evidence, scores={**evidence.scores, points.POOLED: pooled})
    judged = without_grids(whole)
    return {
        "ranking": measure.ranking_rows(whole),
        "trust": measure.trust_rows(judged),
        "checklist": checklist.check_rows(judged),
        "points": points.points_rows(judged),
        "predictions": points.prediction_rows(judged),
    }


def without_grids(evidence: Evidence) -> Evidence:
    """Leaves out the variants of a score ("nleep?energy=0.5") if there are MANY_VARIANTS beside the score itself.

    >>> from jax_transfer.trust.evidence import make
    >>> names = ("knn", "logme", "logme?a=1", *(f"knn?k={k}" for k in range(1, 9)))
    >>> list(without_grids(make("probe", {("mnist", "a"): 0.7}, {name: {} for name in names})).scores)
    ['knn', 'logme', 'logme?a=1']
    """
    variants = collections.Counter(name.partition("?")[0] for name in evidence.scores if "?" in name)
    grids = {name for name, number in variants.items() if number >= MANY_VARIANTS and name in evidence.scores}
    kept = {
        name: values
        for name, values in evidence.scores.items()
        if "?" not in name or name.partition("?")[0] not in grids
    }
    return dataclasses.replace(evidence, scores=kept)
