"""What a gap in a score has meant in accuracy: lines fitted on other targets.

For a score s and a target t, the line through the standardised scores z of the checkpoints and their accuracies a is

    a_k - mean(a) = b_(s,t) z_k,   z_k = (s_k - mean(s)) / std(s),   b_(s,t) = cov(z, a)

so b is the accuracy that one standard deviation of the score is worth. For a target whose accuracies are not known, b
is the mean over the other targets; a prediction is the mean of the lines of all scores.
"""

import math
from collections.abc import Collection

import numpy as np
import scipy.stats
from jaxtyping import Float

from jax_transfer.results import PointsRow, PredictionRow
from jax_transfer.trust.evidence import AVERAGE_RANK, NAIVE, NCTI_PARTS, Evidence

MIN_TARGETS = 3  # one is left out, and two are the least that shows how far targets differ
CONFIDENCE = 0.95
POOLED = "pooled"


def why_not(evidence: Evidence) -> str:
    """Returns the reason why gaps in scores cannot be translated, or "".

    >>> from jax_transfer.trust.evidence import make
    >>> why_not(make("finetune", {("mnist", "a"): 0.9, ("mnist", "b"): 0.8}, {}))
    'what a gap in a score means is learned from other targets: at least 3 targets with all accuracies are needed, ...'
    """
    known = len(_known(evidence))
    if known < MIN_TARGETS:
        return (
            f"what a gap in a score means is learned from other targets: at least {MIN_TARGETS} targets with all "
            f"accuracies are needed, and there {'is' if known == 1 else 'are'} {known}"
        )
    return (
        ""
        if _usable(evidence)
        else "what a gap in a score means is unknown: no score has a value for every checkpoint on every target"
    )


def points_rows(evidence: Evidence) -> list[PointsRow]:
    """Computes, for each score and target, what one standard deviation of the score has meant on the other targets.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {(t, c): a for t in "xyz" for c, a in (("a", 0.7), ("b", 0.8), ("c", 0.9))}
    >>> rows = points_rows(make("probe", accuracies, {"logme": accuracies}))
    >>> [(row.target, round(row.gap, 3), round(row.points, 3)) for row in rows]
    [('x', 0.082, 0.082), ('y', 0.082, 0.082), ('z', 0.082, 0.082)]
    """
    if why_not(evidence):
        return []
    slopes = _slopes(evidence)
    rows = []
    for score, own in slopes.items():
        for t in own:
            others = [own[other] for other in own if other != t]
            gap = float(np.std(evidence.of(t, score)[0]))
            spread = float(np.std(others, ddof=1))
            rows.append(
                PointsRow(evidence.method, evidence.targets[t], score, gap, float(np.mean(others)), spread, len(others))
            )
    return rows


def prediction_rows(evidence: Evidence) -> list[PredictionRow]:
    """Predicts the accuracy of every checkpoint on every target from all scores, by the lines of the other targets.

    Only the mean accuracy of the checkpoints is taken from the target itself. The half width of the 95 % interval is a
    quantile of Student's t times the standard deviation of the errors with which the other targets are predicted in the
    same way, each without itself and without this target. In simulations, 89 to 100 % of accuracies lie in it: the
    fewer with few targets whose lines differ much, the more with few targets whose lines are alike. Predictions and
    intervals are cut off at 0 and 1.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {(t, c): a for t in "xyz" for c, a in (("a", 0.7), ("b", 0.8), ("c", 0.9))}
    >>> rows = prediction_rows(make("probe", accuracies, {"logme": accuracies}))
    >>> [round(row.predicted, 2) for row in rows[:3]]
    [0.7, 0.8, 0.9]
    """
    if why_not(evidence):
        return []
    known, slopes = _known(evidence), _slopes(evidence)
    rows = []
    for t in known:
        others = [other for other in known if other != t]
        errors = []
        for other in others:
            fitted = [third for third in others if third != other]
            accuracies = evidence.accuracies[other, evidence.expected[other]]
            errors.append(accuracies - accuracies.mean() - _predicted(evidence, slopes, other, fitted))
        squares = np.concatenate(errors) ** 2
        # Errors on one target belong together: the number of targets, not of errors, says how well they are known.
        half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(others)) * math.sqrt(squares.mean()))
        accuracies = evidence.accuracies[t, evidence.expected[t]]
        centre = accuracies.mean() + _predicted(evidence, slopes, t, others)
        names = [name for name, own in zip(evidence.checkpoints, evidence.expected[t], strict=True) if own]
        for name, value, accuracy in zip(names, centre, accuracies, strict=True):
            predicted, low, high = np.clip((value, value - half, value + half), 0, 1).tolist()
            rows.append(
                PredictionRow(evidence.method, evidence.targets[t], name, predicted, low, high, float(accuracy))
            )
    return rows


def pooled(evidence: Evidence) -> Float[np.ndarray, "t k"] | None:
    """Returns the mean of the lines of all scores, a score of its own; None if there are too few targets."""
    if why_not(evidence):
        return None
    known, slopes = _known(evidence), _slopes(evidence)
    values = np.full(evidence.accuracies.shape, math.nan)
    for t in known:
        values[t, evidence.expected[t]] = _predicted(evidence, slopes, t, [o for o in known if o != t])
    return values


def _known(evidence: Evidence) -> list[int]:
    """Returns the targets on which every checkpoint has an accuracy and at least two differ."""
    return [
        t
        for t, own in enumerate(evidence.expected)
        if np.isfinite(evidence.accuracies[t, own]).all() and own.sum() > 1 and np.ptp(evidence.accuracies[t, own]) > 0
    ]


def _usable(evidence: Evidence) -> list[str]:
    """Returns the scores that have a value for every checkpoint on every known target.

    Naive lists are left out, and what would count a score twice: its variants and parts. So is the effective rank,
    which says nothing across methods of pre-training.
    """
    known = _known(evidence)
    return [
        score
        for score in evidence.scores
        if score not in (*NAIVE, AVERAGE_RANK, POOLED, *NCTI_PARTS, "effective_rank")
        and "?" not in score
        and all(
            np.isfinite(values).all() and np.ptp(values) > 0 for values in (evidence.of(t, score)[0] for t in known)
        )
    ]


def _standardised(evidence: Evidence, score: str, target: int) -> Float[np.ndarray, "m"]:
    values = evidence.of(target, score)[0]
    return (values - values.mean()) / values.std()


Slopes = dict[str, dict[int, float]]  # score -> target -> b


def _slopes(evidence: Evidence) -> Slopes:
    """Fits the line of each usable score on each known target."""
    known = _known(evidence)
    return {score: {t: _slope(evidence, score, t) for t in known} for score in _usable(evidence)}


def _slope(evidence: Evidence, score: str, target: int) -> float:
    accuracies = evidence.of(target, score)[1]
    return float(np.mean(_standardised(evidence, score, target) * (accuracies - accuracies.mean())))


def _predicted(evidence: Evidence, slopes: Slopes, target: int, fitted: Collection[int]) -> Float[np.ndarray, "m"]:
    """Predicts the accuracies on a target relative to their mean, by the lines of the targets in `fitted`."""
    lines = [
        np.mean([own[t] for t in fitted]) * _standardised(evidence, score, target) for score, own in slopes.items()
    ]
    return np.mean(lines, axis=0)
