"""The numbers by which scores are judged: accuracies and scores of k checkpoints on t targets."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special
from jaxtyping import Bool, Float

from jax_transfer.analysis import ncti
from jax_transfer.analysis.concordance import average_ranks
from jax_transfer.records import InputError
from jax_transfer.report.trust_section import SIMILAR

# Lists that need no data of the target: what a score has to beat to earn its cost.
NAIVE = ("num_parameters", "forward_gflops", "source_accuracy", "last_epoch", "static")
SIZE = "num_parameters"
AVERAGE_RANK = "average_rank"
NCTI_PARTS = ("ncti_variability", "ncti_geometry", "ncti_nearest")
# The lists to which every score is compared, fixed before looking at any result: the first that orders the checkpoints.
# A study knows the first two of each checkpoint; somebody's table may have only one of the others.
BASELINES = (SIZE, "last_epoch", "forward_gflops", "source_accuracy", "static")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Accuracies and scores of k checkpoints on t targets.

    Attributes:
      method: the method whose accuracies the scores should predict, such as "finetune".
      targets, checkpoints: their names.
      accuracies: in [0, 1]; NaN where it is missing.
      spreads: highest minus lowest accuracy over seeds; NaN where unknown or with one seed.
      num_seeds: number of seeds of each accuracy, at least 1.
      scores: name -> its values, NaN where missing. Naive lists are among them.
      expected: the checkpoints that belong to each target, with or without an accuracy.
      trajectories: what pre-trained each checkpoint; those of equal names are epochs of one pre-training.
      families: the family of each checkpoint's architecture, such as "resnet", with all else that it was trained by:
        those of equal names are upgrades of each other.
      metrics: the metric of each target.
    """

    method: str
    targets: tuple[str, ...]
    checkpoints: tuple[str, ...]
    accuracies: Float[np.ndarray, "t k"]
    spreads: Float[np.ndarray, "t k"]
    num_seeds: Float[np.ndarray, "t k"]
    scores: Mapping[str, Float[np.ndarray, "t k"]]
    expected: Bool[np.ndarray, "t k"]
    trajectories: tuple[str, ...]
    families: tuple[str, ...]
    metrics: tuple[str, ...]

    def of(self, target: int, score: str) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Returns the values of a score and the accuracies of the checkpoints that belong to a target."""
        own = self.expected[target]
        return self.scores[score][target, own], self.accuracies[target, own]

    def only(self, chosen: Bool[np.ndarray, "k"]) -> "Evidence":
        """Returns the evidence of some of the checkpoints."""
        tables = ("accuracies", "spreads", "num_seeds", "expected")
        names = ("checkpoints", "trajectories", "families")
        return dataclasses.replace(
            self,
            scores={name: values[:, chosen] for name, values in self.scores.items()},
            **{name: getattr(self, name)[:, chosen] for name in tables},
            **{name: tuple(np.array(getattr(self, name), object)[chosen]) for name in names},
        )


def make(
    method: str,
    accuracies: Mapping[tuple[str, str], float],
    scores: Mapping[str, Mapping[tuple[str, str], float]],
    *,
    spreads: Mapping[tuple[str, str], float] | None = None,
    num_seeds: Mapping[tuple[str, str], int] | None = None,
    trajectories: Mapping[str, str] | None = None,
    families: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> Evidence:
    """Makes the evidence from values by (target, checkpoint), and adds the scores that need the whole list.

    Args:
      method: see `Evidence`.
      accuracies: one for each checkpoint that belongs to a target; NaN if it is missing.
      scores: score -> its values; missing ones may be left out.
      spreads, num_seeds: those that are known.
      trajectories, families, metrics: see `Evidence`; by default, `trajectory_of` and `family_by_name` read the first
        two from the name of a checkpoint, and the metric is the accuracy.

    >>> accuracies = {("mnist", "resnet18"): 0.9, ("mnist", "resnet50"): 0.95}
    >>> evidence = make("finetune", accuracies, {"logme": {("mnist", "resnet18"): 1.0}})
    >>> evidence.scores["logme"].tolist(), evidence.families
    ([[1.0, nan]], ('resnet#', 'resnet#'))
    """
    targets, checkpoints = (tuple(dict.fromkeys(key[i] for key in accuracies)) for i in (0, 1))

    def table(values: Mapping[tuple[str, str], float], missing: float = math.nan) -> Float[np.ndarray, "t k"]:
        return np.array([[values.get((t, c), missing) for c in checkpoints] for t in targets], float)

    trained_as = tuple((trajectories or {}).get(c) or trajectory_of(c) for c in checkpoints)
    values = {name: table(own) for name, own in scores.items()}
    return with_list_scores(
        Evidence(
            method,
            targets,
            checkpoints,
            table(accuracies),
            table(spreads or {}),
            table(num_seeds or {}, 1),
            values,
            np.array([[(t, c) in accuracies for c in checkpoints] for t in targets]),
            trained_as,
            _told_apart_by_size(
                [
                    (families or {}).get(c) or family_by_name(own)
                    for c, own in zip(checkpoints, trained_as, strict=True)
                ],
                trained_as,
                values.get(SIZE),
            ),
            tuple((metrics or {}).get(t, "accuracy") for t in targets),
        )
    )


def with_list_scores(evidence: Evidence) -> Evidence:
    """Adds the scores that depend on all checkpoints or targets: `average_rank`, and `ncti` from its three parts."""
    scores = dict(evidence.scores)
    if all(name in scores for name in NCTI_PARTS):
        parts = [scores[name] for name in NCTI_PARTS]
        scores["ncti"] = np.full(evidence.accuracies.shape, math.nan)
        for target, own in enumerate(evidence.expected):
            scores["ncti"][target, own] = ncti(*(part[target, own] for part in parts))
    if len(evidence.targets) > 1 and evidence.expected.all():
        scores[AVERAGE_RANK] = average_ranks(evidence.accuracies)
    return dataclasses.replace(evidence, scores=scores)


def family_by_name(name: str) -> str:
    """Returns the family of an architecture by the name of a pre-training: that of its model with "#" for its numbers.

    What follows the first "/", such as the images of the pre-training, belongs to the family.

    >>> family_by_name("resnet50"), family_by_name("resnet50/cifar10"), family_by_name("resnet18_moco")
    ('resnet#', 'resnet#/cifar10', 'resnet#_moco')
    """
    model, slash, rest = name.partition("/")
    return f"{re.sub(r'[0-9]+([._][0-9]+)*', '#', model)}{slash}{rest}"


def _told_apart_by_size(
    families: Sequence[str], trajectories: Sequence[str], sizes: Float[np.ndarray, "t k"] | None
) -> tuple[str, ...]:
    """Divides families whose members are not all of different sizes, since none of these is an upgrade of another."""
    if sizes is None:
        return tuple(families)
    size_of = {
        trajectory: float(size)
        for trajectory, size in zip(
            trajectories, np.max(np.where(np.isfinite(sizes), sizes, -np.inf), axis=0), strict=True
        )
    }
    members = {name: {t for f, t in zip(families, trajectories, strict=True) if f == name} for name in families}
    are_upgrades = {name: len({size_of[t] for t in own}) == len(own) for name, own in members.items()}
    return tuple(
        family if are_upgrades[family] else f"{family} {trajectory}"
        for family, trajectory in zip(families, trajectories, strict=True)
    )


def trajectory_of(name: str) -> str:
    """Returns what pre-trained a checkpoint that is named as in a study: its name without a last "/" and epoch.

    >>> trajectory_of("resnet50/cifar10/90"), trajectory_of("digits/0.5"), trajectory_of("90"), trajectory_of("b/vit")
    ('resnet50/cifar10', 'digits', '90', 'b/vit')
    """
    return re.sub(r"(?<=.)/[0-9]+(\.[0-9]+)?$", "", name)


def baseline(evidence: Evidence) -> str | None:
    """Returns the list to which the scores are compared: the first of BASELINES that orders the checkpoints, or None.

    >>> accuracies = {("mnist", "1"): 0.9, ("mnist", "2"): 0.95}
    >>> epochs = {("mnist", "1"): 1, ("mnist", "2"): 2}
    >>> baseline(make("probe", accuracies, {"num_parameters": dict.fromkeys(epochs, 9), "last_epoch": epochs}))
    'last_epoch'
    """
    for name in BASELINES:
        values = evidence.scores.get(name)
        if values is None or not np.isfinite(values[evidence.expected]).all():
            continue
        if any(np.ptp(row[own]) > 0 for row, own in zip(values, evidence.expected, strict=True)):
            return name
    return None


def noise(evidence: Evidence, target: int) -> float:
    """Estimates the standard deviation of an accuracy on a target: that of a mean over seeds, from their spread.

    The spread of n seeds is on average `expected_range(n)` standard deviations of one seed. Checkpoints are pooled,
    since two or three seeds of one say little. NaN if no checkpoint has several seeds.

    >>> key = ("mnist", "a")
    >>> round(noise(make("finetune", {key: 0.9}, {}, spreads={key: 0.01}, num_seeds={key: 3}), 0), 4)
    0.0034
    """
    own = evidence.expected[target]
    spreads, seeds = evidence.spreads[target, own], evidence.num_seeds[target, own]
    several = np.isfinite(spreads) & (seeds > 1)
    if not several.any():
        return math.nan
    one_seed = float(
        np.mean([spread / expected_range(n) for spread, n in zip(spreads[several], seeds[several], strict=True)])
    )
    return one_seed / math.sqrt(float(np.mean(seeds[several])))


def expected_range(n: float) -> float:
    """Computes the expected difference of the highest and the lowest of n standard normal numbers.

        E = integral of 1 - F(x)^n - (1 - F(x))^n,   F: the normal distribution function (Tippett, 1925)

    >>> round(expected_range(2), 3), round(expected_range(3), 3), round(expected_range(10), 3)
    (1.128, 1.693, 3.078)
    """
    x = np.linspace(-9, 9, 1801)
    below = scipy.special.ndtr(x)
    return float(np.trapezoid(1 - below**n - (1 - below) ** n, x))


def last_of_each(evidence: Evidence, groups: Sequence[str], order: str) -> Bool[np.ndarray, "k"]:
    """Chooses the checkpoint of each group with the highest value of a naive list; the last one without such a list.

    >>> accuracies = {("mnist", f"run/{epoch}"): 0.9 for epoch in (1, 2)}
    >>> evidence = make("probe", accuracies, {"last_epoch": {("mnist", "run/1"): 1, ("mnist", "run/2"): 2}})
    >>> last_of_each(evidence, ("run", "run"), "last_epoch").tolist()
    [False, True]
    """
    if len(groups) != len(evidence.checkpoints):
        raise InputError(f"{len(groups)} groups for {len(evidence.checkpoints)} checkpoints: expected one for each.")
    values = evidence.scores.get(order)
    values = (
        np.full(len(groups), math.nan)
        if values is None
        else np.nanmax(np.where(np.isfinite(values), values, -np.inf), axis=0)
    )
    best: dict[str, int] = {}
    for i, group in enumerate(groups):
        if group not in best or not values[i] < values[best[group]]:
            best[group] = i
    return np.isin(np.arange(len(groups)), list(best.values()))


def last_epochs(evidence: Evidence) -> Evidence:
    """Returns the evidence of the last epoch of each pre-training alone.

    >>> accuracies = {("mnist", f"run/{epoch}"): 0.9 for epoch in (1, 2)}
    >>> last_epochs(make("probe", accuracies, {})).checkpoints
    ('run/2',)
    """
    return evidence.only(last_of_each(evidence, evidence.trajectories, "last_epoch"))


def of_similar_size(evidence: Evidence) -> Evidence:
    """Returns the evidence of the most checkpoints whose numbers of parameters differ by at most the factor SIMILAR.

    It has none if a number is unknown.

    >>> sizes = {("mnist", name): size for name, size in (("a", 1e6), ("b", 1.2e6), ("c", 9e6))}
    >>> of_similar_size(make("probe", sizes, {"num_parameters": sizes})).checkpoints
    ('a', 'b')
    """
    values = evidence.scores.get(SIZE)
    if values is None or not np.isfinite(values[evidence.expected]).all():
        return evidence.only(np.zeros(len(evidence.checkpoints), bool))
    sizes = np.max(np.where(evidence.expected, values, -np.inf), axis=0)
    windows = [(sizes >= least) & (sizes <= SIMILAR * least) for least in sizes]
    return evidence.only(max(windows, key=np.sum))
