"""Measures how well each score ranks the checkpoints: per target, and over all targets against a naive list."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jax_transfer.analysis.agreement import (
    draw_checkpoints,
    fidelity,
    kendall,
    kendall_interval,
    kendall_of_draws,
    paired,
    pearson,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.choose import choose
from jax_transfer.records import METRICS
from jax_transfer.report.trust_section import MIN_APART
from jax_transfer.results import RankingRow, TrustRow
from jax_transfer.trust.evidence import SIZE, Evidence, baseline, last_epochs, last_of_each, of_similar_size

TOP = 3  # the most accurate checkpoints, of which a pair must hold one to count in the fidelity among the best
INTERVAL = (0.025, 0.975)


def ranking_rows(evidence: Evidence) -> list[RankingRow]:
    """Computes a row of results/ranking.jsonl for each target and score.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {("mnist", "a"): 0.7, ("mnist", "b"): 0.9, ("mnist", "c"): 0.8}
    >>> scores = {"logme": {("mnist", "a"): 0.1, ("mnist", "b"): 0.4, ("mnist", "c"): 0.3}}
    >>> [(row.target, row.score, row.kendall) for row in ranking_rows(make("probe", accuracies, scores))]
    [('mnist', 'logme', 1.0)]
    """
    return [
        ranking_row(target, evidence.method, score, *evidence.of(t, score), evidence.metrics[t])
        for t, target in enumerate(evidence.targets)
        for score in evidence.scores
    ]


def ranking_row(
    target: str, method: str, score: str, scores: ArrayLike, accuracies: ArrayLike, metric: str = "accuracy"
) -> RankingRow:
    """Computes a row of `results/ranking.jsonl`: how well `score` predicts the accuracies of `method` on `target`.

    >>> row = ranking_row("tfds:mnist", "probe", "logme", scores=[0.1, 0.4, 0.3], accuracies=[0.7, 0.9, 0.8])
    >>> row.kendall, row.recall_at_1, row.num_scored
    (1.0, 1.0, 3)

    Args:
      scores, accuracies: [k], one for each checkpoint of the study; NaN (or None) if a checkpoint has none. If any is
        missing, the correlations, Recall@k, Rel@k and regret, which need all checkpoints, are NaN.
      metric: the metric of the accuracies, a key of `records.METRICS`.
    """
    choose(METRICS, metric, "metric")
    scores, accuracies = paired(scores, accuracies)
    low, high = kendall_interval(scores, accuracies)
    return RankingRow(
        target=target,
        method=method,
        score=score,
        pearson=pearson(scores, accuracies),
        kendall=kendall(scores, accuracies),
        weighted_kendall=weighted_kendall(scores, accuracies),
        recall_at_1=recall_at_k(scores, accuracies, 1),
        recall_at_3=recall_at_k(scores, accuracies, 3),
        rel_at_1=relative_accuracy_at_k(scores, accuracies, 1),
        rel_at_3=relative_accuracy_at_k(scores, accuracies, 3),
        num_checkpoints=len(scores),
        kendall_low=low,
        kendall_high=high,
        regret=regret(scores, accuracies),
        num_scored=int(np.sum(np.isfinite(scores) & np.isfinite(accuracies))),
        metric=metric,
    )


def trust_rows(evidence: Evidence) -> list[TrustRow]:
    """Computes a row of results/trust.jsonl for each score: means over targets, and the difference to a naive list.

    The targets are those on which at least one score orders the checkpoints; a score that is missing or constant on one
    of them has no mean. The interval is a paired bootstrap over checkpoints: each draw holds the same checkpoints for
    both lists and on all targets, and the difference of the mean taus is computed anew.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {("mnist", "a"): 0.7, ("mnist", "b"): 0.9, ("mnist", "c"): 0.8}
    >>> scores = {"logme": dict(zip(accuracies, (0.1, 0.4, 0.3))), "num_parameters": dict(zip(accuracies, (1, 2, 3)))}
    >>> logme, _ = trust_rows(make("probe", accuracies, scores))
    >>> logme.baseline, round(logme.difference, 2)
    ('num_parameters', 0.67)
    """
    usual = baseline(evidence)
    taus = {score: _over_targets(evidence, score, kendall) for score in evidence.scores}
    used = [t for t in range(len(evidence.targets)) if any(math.isfinite(values[t]) for values in taus.values())]
    draws = draw_checkpoints(len(evidence.checkpoints))
    drawn = functools.cache(functools.partial(_mean_taus_of_draws, evidence, used=tuple(used), draws=draws))
    last = last_epochs(evidence)
    subsets = {
        "epochs": last,
        "earlier": evidence.only(np.array([name not in last.checkpoints for name in evidence.checkpoints], bool)),
        "families": last.only(last_of_each(last, last.families, SIZE)),
        "sizes": of_similar_size(evidence),
    }
    rows = []
    for score in evidence.scores:
        own = _mean(taus[score], used)
        difference, low, high = math.nan, math.nan, math.nan
        if usual and score != usual:
            difference = own - _mean(taus[usual], used)
            if math.isfinite(difference):
                low, high = _interval(drawn(score) - drawn(usual))
        rows.append(
            TrustRow(
                method=evidence.method,
                score=score,
                num_targets=len(used),
                num_checkpoints=len(evidence.checkpoints),
                kendall=own,
                weighted_kendall=_mean(_over_targets(evidence, score, weighted_kendall), used),
                baseline=usual or "",
                difference=difference,
                difference_low=low,
                difference_high=high,
                **_fidelities(evidence, score, used),
                **{f"kendall_{name}": _mean_tau(subset, score, used) for name, subset in subsets.items()},
                **{f"num_{name}": len(subset.checkpoints) for name, subset in subsets.items()},
            )
        )
    return rows


def _over_targets(evidence: Evidence, score: str, measure) -> list[float]:
    return [measure(*evidence.of(t, score)) for t in range(len(evidence.targets))]


def _mean(values: Sequence[float], used: Sequence[int]) -> float:
    """Averages over the used targets; NaN if a value is missing, or if there are none."""
    return float(np.mean([values[t] for t in used])) if used else math.nan


def _mean_tau(evidence: Evidence, score: str, used: Sequence[int]) -> float:
    if len(evidence.checkpoints) < MIN_APART:
        return math.nan
    return _mean(_over_targets(evidence, score, kendall), used)


def _fidelities(evidence: Evidence, score: str, used: Sequence[int]) -> dict[str, float]:
    """Averages the fidelities over targets: over all pairs, and over those with one of the best."""
    result = {}
    for name, top in (("fidelity", None), ("top_fidelity", TOP)):
        pairs = [fidelity(*evidence.of(t, score), top=top) for t in range(len(evidence.targets))]
        for i, kind in enumerate(("pearson", "spearman")):
            result[f"{name}_{kind}"] = _mean([pair[i] for pair in pairs], used)
    return result


def _mean_taus_of_draws(
    evidence: Evidence, score: str, used: tuple[int, ...], draws: Float[np.ndarray, "b k"]
) -> Float[np.ndarray, "b"]:
    """Returns the mean tau over targets of each draw of checkpoints; NaN if a target has no tau."""
    taus = [kendall_of_draws(*evidence.of(t, score), draws[:, evidence.expected[t]]) for t in used]
    return np.mean(taus, axis=0)


def _interval(values: Float[np.ndarray, "b"]) -> tuple[float, float]:
    """Returns the 95 % interval of the draws in which the value is defined; NaN if there are none, or all are equal."""
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, INTERVAL) if len(values) else (math.nan, math.nan)
    return (float(low), float(high)) if high > low else (math.nan, math.nan)
