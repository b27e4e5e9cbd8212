"""A checklist of what makes a comparison of transferability scores worth something, or worthless.

After "How NOT to benchmark your SITE metric" (arXiv 2510.06448): fixed lists of models beat all scores on the usual
benchmarks, because the same few large models win everywhere.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from jax_transfer.analysis.agreement import weighted_kendall, weighted_kendall_without_each
from jax_transfer.analysis.concordance import attainable_kendall, kendall_w
from jax_transfer.report.tables import counted, listed, score_name, target_names
from jax_transfer.report.trust_section import MIN_APART
from jax_transfer.results import CheckRow
from jax_transfer.trust.evidence import AVERAGE_RANK, SIZE, Evidence, last_epochs, noise, of_similar_size
from jax_transfer.trust.points import why_not

CEILING = 0.99  # accuracies above it leave no room in which checkpoints could differ
WIDE = 2.0  # largest / smallest size above which a list by size may decide the ranking
ALIKE = 0.7  # mean Spearman's rho between two targets from which a fixed list may serve all of them
FIXED = 0.5  # weighted tau from which a fixed list leaves little to gain
SPANNED = 5.0  # range of accuracies, in spreads over seeds, from which the order is more than noise
FEWEST = 4  # checkpoints of which one can be left out
SENSITIVE = 0.2  # change of the weighted tau from which a single checkpoint decides the result
ROUNDING = 0.005  # changes below it are not visible
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
    mnist: all accuracies exceed 99 %, so there is no headroom in which checkpoints could differ.
    2 checkpoints are nested: resnet18, resnet50 (by their names, upgrades of one family). ...
    """
    return [CheckRow(evidence.method, name, *finding) for name, check in CHECKS.items() for finding in check(evidence)]


def _headroom(evidence: Evidence) -> Iterator[Finding]:
    """Finds the targets on which all checkpoints are nearly perfect."""
    least = {}
    for target, own in zip(evidence.targets, evidence.accuracies, strict=True):
        if np.isfinite(own).any():
            least[target] = float(own[np.isfinite(own)].min())
    full = [target for target in least if least[target] > CEILING]
    names = target_names(evidence.targets)
    for target in full:
        finding = (
            f"{names[target]}: all accuracies exceed 99 %, so there is no headroom in which checkpoints could differ."
        )
        yield target, least[target], None, None, False, finding
    if least and not full:
        yield "", max(least.values()), None, None, True, "On every target, at least one accuracy is 99 % or less."


def _range_over_noise(evidence: Evidence) -> Iterator[Finding]:
    """Compares the range of accuracies with the spread over seeds, and says which tau this noise allows at most."""
    unknown = []
    for t, (target, name) in enumerate(target_names(evidence.targets).items()):
        own = evidence.accuracies[t][evidence.expected[t]]
        spreads = evidence.spreads[t][np.isfinite(evidence.spreads[t]) & (evidence.num_seeds[t] > 1)]
        if not np.isfinite(own).all() or len(own) < 2:
            continue
        if not len(spreads):
            unknown.append(name)
            continue
        span, spread = float(np.ptp(own)), float(np.mean(spreads))
        is_wide = span > 0 and span >= SPANNED * spread
        most = attainable_kendall(own, noise(evidence, t))
        times = f", {span / spread:.1f} times" if spread > 0 else "; there is none in"
        allowed = f" With this noise, no score can expect a tau above {most:z.2f}." if math.isfinite(most) else ""
        finding = (
            f"{name}: accuracies span {100 * span:.1f} points{times} the mean spread over seeds "
            f"({100 * spread:.2f} points).{allowed}"
        )
        yield target, most, None, None, is_wide, finding
    if unknown:
        names = listed(unknown) if len(unknown) <= NAMED else f"{len(unknown)} targets"
        yield "", None, None, None, None, f"The noise of the accuracies on {names} is unknown: there is one seed."


def _sizes(evidence: Evidence) -> Iterator[Finding]:
    """Compares the largest checkpoint with the smallest one, by parameters and by work."""
    for score, what in (("num_parameters", "number of parameters"), ("forward_gflops", "work of a forward pass")):
        values = evidence.scores.get(score)
        if values is None:
            continue
        if not np.isfinite(values[evidence.expected]).all():
            yield score, None, None, None, None, f"The {what} is not known for all checkpoints."
            continue
        low, high = float(values[evidence.expected].min()), float(values[evidence.expected].max())
        if low <= 0:
            continue
        ratio = high / low
        finding = (
            f"The largest {what} is {ratio:.3g} times the smallest: size alone may decide the ranking."
            if ratio > WIDE
            else f"The {what} is nearly equal: the largest is {ratio:.2f} times the smallest."
        )
        if ratio > WIDE and score == SIZE and len(of_similar_size(evidence).checkpoints) >= MIN_APART:
            finding += " Kendall's tau is also shown over checkpoints of nearly equal size."
        yield score, ratio, low, high, ratio <= WIDE, finding


def _nested(evidence: Evidence) -> Iterator[Finding]:
    """Names the checkpoints that are epochs of one pre-training, or upgrades within a family of architectures."""
    last = last_epochs(evidence)  # epochs of one architecture are no upgrades of each other
    for kind, checkpoints, groups, guess in (
        ("epochs of one pre-training", evidence.checkpoints, evidence.trajectories, "later"),
        ("upgrades of one family", last.checkpoints, last.families, "larger"),
    ):
        known = "" if guess == "later" or SIZE in evidence.scores else "by their names, "
        names: dict[str, list[str]] = {}
        for checkpoint, group in zip(checkpoints, groups, strict=True):
            names.setdefault(group, []).append(checkpoint)
        nested = [own for own in names.values() if len(own) > 1]
        if nested:
            number, first = sum(map(len, nested)), nested[0]
            shown = ", ".join([*first[:NAMED], *(["..."] if len(first) > NAMED else [])])
            rest = f", and those of {counted(len(nested) - 1, 'other group')}" if len(nested) > 1 else ""
            also = " Kendall's tau is also shown without the others." if len(names) >= MIN_APART else ""
            finding = (
                f"{counted(number, 'checkpoint')} are nested: {shown} ({known}{kind}){rest}. That the {guess} one wins "
                f"is easy to guess.{also}"
            )
            yield kind, float(number), None, None, False, finding


def _targets_agree(evidence: Evidence) -> Iterator[Finding]:
    """Measures how far the targets order the checkpoints alike, by those that all targets have.

    W depends on the number of targets t; the mean of Spearman's rho over pairs, (t W - 1) / (t - 1), does not.
    """
    t = len(evidence.targets)
    if t < 2:
        yield "", None, None, None, None, "With one target, it is unknown whether a fixed list would do as well."
        return
    shared = evidence.expected.all(0) & np.isfinite(evidence.accuracies).all(0)
    w = kendall_w(evidence.accuracies[:, shared])
    if not math.isfinite(w):
        yield (
            "",
            None,
            None,
            None,
            None,
            "The targets cannot be compared: too few checkpoints have an accuracy on each.",
        )
        return
    rho = (t * w - 1) / (t - 1)
    which = "the checkpoints" if shared.all() else f"the {shared.sum()} checkpoints that all of them have"
    finding = f"The targets order {which} with Kendall's W = {w:z.2f}, a mean Spearman's rho of {rho:z.2f}"
    so = ": so alike that a fixed list may serve all of them." if rho >= ALIKE else "."
    yield "", w, None, None, rho < ALIKE, finding + so


def _fixed_list(evidence: Evidence) -> Iterator[Finding]:
    """Measures, for each target, the list by the mean rank on all other targets."""
    if AVERAGE_RANK not in evidence.scores:
        if len(evidence.targets) > 1:
            yield "", None, None, None, None, "There is no list by mean rank: some targets lack some checkpoints."
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
            f"A fixed list, by mean rank on the other targets, has a weighted tau of {mean:z.2f} on the target left "
            f"out, averaged over targets (lowest: {taus[worst]:z.2f} on {names[worst]}).",
        )


def _single_checkpoints(evidence: Evidence) -> Iterator[Finding]:
    """Finds how far the weighted tau of each score, a mean over targets, depends on a single checkpoint."""
    if len(evidence.checkpoints) < FEWEST:
        yield "", None, None, None, None, f"Fewer than {FEWEST} checkpoints: leaving one out would say nothing."
        return
    targets = range(len(evidence.targets))
    taus = {score: np.array([weighted_kendall(*evidence.of(t, score)) for t in targets]) for score in evidence.scores}
    used = [t for t in targets if any(math.isfinite(own[t]) for own in taus.values())]
    for score, own in taus.items():
        without = np.repeat(own[:, None], len(evidence.checkpoints), axis=1)
        for t in used:
            without[t, evidence.expected[t]] = weighted_kendall_without_each(*evidence.of(t, score))
        if not used or not np.isfinite(without[used]).all():
            continue
        whole, values = float(own[used].mean()), without[used].mean(0)
        i = int(np.argmax(np.abs(values - whole)))
        low, high = float(values.min()), float(values.max())
        without_one = (
            f"and between {low:z.2f} and {high:z.2f} without any one checkpoint. It changes most without "
            f"{evidence.checkpoints[i]} ({values[i]:z.2f})."
            if abs(values[i] - whole) >= ROUNDING
            else "whichever checkpoint is left out."
        )
        finding = f"{score_name(score)}: the weighted tau is {whole:z.2f}, {without_one}"
        yield score, whole, low, high, bool(abs(values[i] - whole) < SENSITIVE), finding


def _gaps(evidence: Evidence) -> Iterator[Finding]:
    """Says why no gap in a score can be translated into accuracy, if none can."""
    if reason := why_not(evidence):
        yield "", None, None, None, None, f"{reason[0].upper()}{reason[1:]}."


CHECKS: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "headroom": _headroom,
    "noise": _range_over_noise,
    "size": _sizes,
    "nested": _nested,
    "agreement of targets": _targets_agree,
    "fixed list": _fixed_list,
    "single checkpoints": _single_checkpoints,
    "gaps in points": _gaps,
}
