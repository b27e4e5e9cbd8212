"""A checklist of what makes a comparison of transferability scores worth something, or worthless.

After "How NOT to benchmark your SITE metric" (arXiv 2510.06448): fixed lists of models beat all scores on the usual
benchmarks, because the same few large models win everywhere.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from jax_transfer.analysis.agreement import weighted_kendall
from jax_transfer.analysis.concordance import attainable_kendall, kendall_w
from jax_transfer.report.tables import counted, score_name, target_names
from jax_transfer.results import CheckRow
from jax_transfer.trust.evidence import AVERAGE_RANK, Evidence, noise

CEILING = 0.99  # accuracies above it leave no room in which checkpoints could differ
WIDE = 2.0  # largest / smallest size from which on a list by size may decide the ranking
ALIKE = 0.7  # Kendall's W from which on one fixed list serves all targets
FIXED = 0.5  # weighted tau from which on a fixed list leaves little to gain
SPANNED = 5.0  # range of accuracies, in spreads over seeds, from which on the order is more than noise
SENSITIVE = 0.2  # change of the weighted tau by one checkpoint from which on it decides the result
NAMED = 4  # as many names are listed

# The fields of a CheckRow from `subject` on.
Finding = tuple[str, float | None, float | None, float | None, bool | None, str]


def check_rows(evidence: Evidence) -> list[CheckRow]:
    """Runs all checks on the evidence: a row for each finding.

    >>> from jax_transfer.trust.evidence import make
    >>> accuracies = {("mnist", "resnet18"): 0.995, ("mnist", "resnet50"): 0.997}
    >>> for row in check_rows(make("finetune", accuracies, {})):
    ...     if row.passed is False:
    ...         print(row.finding)
    mnist: all checkpoints exceed 99 %, so there is no headroom in which they could differ.
    2 checkpoints are nested: resnet18, resnet50 (upgrades of one family). ...
    """
    return [CheckRow(evidence.method, name, *finding) for name, check in CHECKS.items() for finding in check(evidence)]


def _headroom(evidence: Evidence) -> Iterator[Finding]:
    """Finds the targets on which all checkpoints are nearly perfect."""
    for t, (target, name) in enumerate(target_names(evidence.targets).items()):
        least = _least(evidence.accuracies[t])
        if least is not None and least > CEILING:
            finding = f"{name}: all checkpoints exceed 99 %, so there is no headroom in which they could differ."
            yield target, least, None, None, False, finding


def _least(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.min()) if len(values) else None


def _range_over_noise(evidence: Evidence) -> Iterator[Finding]:
    """Compares the range of accuracies with the spread over seeds, and says which tau this noise allows at most."""
    for t, (target, name) in enumerate(target_names(evidence.targets).items()):
        own = evidence.accuracies[t][evidence.expected[t]]
        spreads = evidence.spreads[t][np.isfinite(evidence.spreads[t]) & (evidence.num_seeds[t] > 1)]
        if not np.isfinite(own).all() or len(own) < 2:
            continue
        if not len(spreads):
            yield target, None, None, None, None, f"{name}: one seed, so the noise of the accuracies is unknown."
            continue
        span, spread = float(np.ptp(own)), float(np.mean(spreads))
        most = attainable_kendall(own, noise(evidence, t))
        times = f"{span / spread:.1f} times" if spread > 0 else "far more than"
        most_words = f"; the noise of the seeds allows a tau of {most:.2f} at most" if math.isfinite(most) else ""
        finding = (
            f"{name}: accuracies span {100 * span:.1f} points, {times} the mean spread over seeds "
            f"({100 * spread:.2f}){most_words}."
        )
        yield target, most, None, None, span >= SPANNED * spread, finding


def _sizes(evidence: Evidence) -> Iterator[Finding]:
    """Compares the largest checkpoint with the smallest one, by parameters and by work."""
    for score, what in (("num_parameters", "parameters"), ("forward_gflops", "work of a forward pass")):
        values = evidence.scores.get(score)
        if values is None or not np.isfinite(values[evidence.expected]).all():
            continue
        low, high = float(values[evidence.expected].min()), float(values[evidence.expected].max())
        if low <= 0:
            continue
        ratio = high / low
        why = (
            "a list by size may decide the ranking: compare the scores among checkpoints of equal size too"
            if ratio > WIDE
            else "the checkpoints are of nearly equal size"
        )
        yield score, ratio, low, high, ratio <= WIDE, f"The {what} differ by a factor of {ratio:.3g}; {why}."


def _nested(evidence: Evidence) -> Iterator[Finding]:
    """Names the checkpoints that are epochs of one pre-training, or upgrades within a family of architectures."""
    for kind, groups, apart in (
        ("epochs of one pre-training", evidence.trajectories, "the last of each alone"),
        ("upgrades of one family", evidence.families, "the largest of each alone"),
    ):
        names: dict[str, list[str]] = {}
        for checkpoint, group in zip(evidence.checkpoints, groups, strict=True):
            names.setdefault(group, []).append(checkpoint)
        nested = [own for own in names.values() if len(own) > 1]
        if nested:
            number, first = sum(map(len, nested)), nested[0]
            listed = ", ".join([*first[:NAMED], *(["..."] if len(first) > NAMED else [])])
            rest = f", and {counted(len(nested) - 1, 'other group')}" if len(nested) > 1 else ""
            yield (
                kind,
                float(number),
                None,
                None,
                False,
                f"{counted(number, 'checkpoint')} are nested: {listed} ({kind}){rest}. That the later or larger one "
                f"wins is easy to guess, so taus are also shown for {apart}.",
            )


def _targets_agree(evidence: Evidence) -> Iterator[Finding]:
    """Measures how far the targets order the checkpoints alike, and how good the best fixed list is."""
    if len(evidence.targets) < 2:
        yield "", None, None, None, None, "One target: whether a fixed list would do as well cannot be told."
        return
    w = kendall_w(evidence.accuracies) if evidence.expected.all() else math.nan
    if math.isfinite(w):
        so = "one fixed list would serve all of them" if w >= ALIKE else "no single list serves all of them"
        yield "", w, None, None, w < ALIKE, f"The targets agree on the order with Kendall's W = {w:.2f}: {so}."


def _fixed_list(evidence: Evidence) -> Iterator[Finding]:
    """Measures, for each target, the list by the mean rank on all other targets."""
    if AVERAGE_RANK not in evidence.scores:
        return
    names = target_names(evidence.targets)
    taus = {t: weighted_kendall(*evidence.of(i, AVERAGE_RANK)) for i, t in enumerate(evidence.targets)}
    taus = {target: tau for target, tau in taus.items() if math.isfinite(tau)}
    if taus:
        mean, worst = float(np.mean(list(taus.values()))), min(taus, key=lambda target: taus[target])
        yield (
            "",
            mean,
            min(taus.values()),
            max(taus.values()),
            mean < FIXED,
            f"The fixed list by mean rank on the other targets has a weighted tau of {mean:.2f} on the target left out "
            f"({taus[worst]:.2f} on {names[worst]}, its worst).",
        )


def _single_checkpoints(evidence: Evidence) -> Iterator[Finding]:
    """Finds how far the weighted tau of each score, a mean over targets, depends on a single checkpoint."""
    k = len(evidence.checkpoints)
    if k < 4:
        return
    without = [evidence.only(np.arange(k) != i) for i in range(k)]
    for score in evidence.scores:
        whole = _mean_weighted(evidence, score)
        values = [_mean_weighted(rest, score) for rest in without]
        if not math.isfinite(whole) or not all(map(math.isfinite, values)):
            continue
        i = int(np.argmax(np.abs(np.array(values) - whole)))
        finding = (
            f"{score_name(score)}: weighted tau {whole:.2f}; {min(values):.2f} to {max(values):.2f} without one "
            f"checkpoint, farthest away without {evidence.checkpoints[i]} ({values[i]:.2f})."
        )
        yield score, whole, min(values), max(values), abs(values[i] - whole) < SENSITIVE, finding


def _mean_weighted(evidence: Evidence, score: str) -> float:
    taus = [weighted_kendall(*evidence.of(t, score)) for t in range(len(evidence.targets))]
    taus = [tau for tau in taus if math.isfinite(tau)]
    return float(np.mean(taus)) if taus else math.nan


CHECKS: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "headroom": _headroom,
    "noise": _range_over_noise,
    "size": _sizes,
    "nested": _nested,
    "agreement of targets": _targets_agree,
    "fixed list": _fixed_list,
    "single checkpoints": _single_checkpoints,
}
