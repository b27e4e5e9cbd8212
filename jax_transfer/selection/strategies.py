"""Strategies that select classes or clusters of source images for a target: one function and one line each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_transfer.choose import choose
from jax_transfer.fields import Count, OneOf, Positive, check_itself
from jax_transfer.records import InputError
from jax_transfer.selection.select import label_selection, random_selection, shared_names
from jax_transfer.selection.transport import COST_SCALES, Selection, greedy_ot_selection, uot_selection


class Problem(NamedTuple):
    """What a strategy selects from, and for which target.

    Attributes:
      source_means: float32 [s, d], mean feature of each class or cluster of source images.
      target_means: float32 [t, d], mean feature of each class of the target.
      source_names: names of the s classes or clusters.
      target_names: names of the t classes.
      target_counts: int [t], number of training images of each class of the target; None: equal weights.
      wanted: names of the classes to select by label; None: the names that source and target share.
      seed: seed of a random selection.
    """

    source_means: np.ndarray
    target_means: np.ndarray
    source_names: Sequence[str]
    target_names: Sequence[str]
    target_counts: np.ndarray | None = None
    wanted: Sequence[str] | None = None
    seed: int = 0


class Strategy(NamedTuple):
    """A strategy, `select(problem, settings, count)` -> the `count` most similar classes or clusters.

    Attributes:
      uses: the settings on which it depends, besides the strategy itself; any other must keep its usual value.
      has_similarity: whether its similarity measures anything.
      needs_names: whether it goes by the names of classes. It then selects all that match, and cannot select clusters.
    """

    select: Callable[[Problem, "SelectionSettings", int], Selection]
    uses: tuple[str, ...]
    has_similarity: bool = True
    needs_names: bool = False


def _uot(problem: Problem, settings: "SelectionSettings", count: int) -> Selection:
    return uot_selection(
        jnp.asarray(problem.source_means),
        jnp.asarray(problem.target_means),
        count,
        metric=settings.metric or USUAL_METRICS["uot"],
        cost_scale=settings.cost_scale,
        epsilon=settings.epsilon,
        tau_source=settings.tau_source,
        tau_target=settings.tau_target,
    )


def _greedy_ot(problem: Problem, settings: "SelectionSettings", count: int) -> Selection:
    source, target = jnp.asarray(problem.source_means), jnp.asarray(problem.target_means)
    metric = settings.metric or USUAL_METRICS["greedy_ot"]
    counts = None if problem.target_counts is None else jnp.asarray(problem.target_counts)
    return greedy_ot_selection(source, target, count, metric=metric, target_counts=counts)


def _random(problem: Problem, settings: "SelectionSettings", count: int) -> Selection:
    return random_selection(len(problem.source_names), count, seed=problem.seed)


def _labels(problem: Problem, settings: "SelectionSettings", count: int) -> Selection:
    return label_selection(problem.source_names, wanted_names(problem))


def wanted_names(problem: Problem) -> Sequence[str]:
    """Returns the names that a selection by label looks for.

    >>> wanted_names(Problem(np.eye(2), np.eye(2), ("cat", "sea lion"), ("Sea-Lion", "dog")))
    ['sea lion']
    """
    return problem.wanted or shared_names(problem.source_names, problem.target_names)


_RANKS = ("kind", "num_selected", "first", "num_clusters")
STRATEGIES: dict[str, Strategy] = {
    "uot": Strategy(_uot, (*_RANKS, "metric", "cost_scale", "epsilon", "tau_source", "tau_target")),
    "greedy_ot": Strategy(_greedy_ot, (*_RANKS, "metric")),
    "random": Strategy(_random, _RANKS, has_similarity=False),
    "labels": Strategy(_labels, (), has_similarity=False, needs_names=True),
}

KINDS = {"class": "classes", "cluster": "clusters"}  # what a selection consists of -> its plural
USUAL_METRICS = {"uot": "cosine", "greedy_ot": "l2"}  # strategy that measures distances -> its metric in the paper


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
    """An entry of `config.select.selections`: how classes or clusters of source images are selected for a target."""

    strategy: Annotated[str, OneOf(STRATEGIES, "strategy")] = "uot"
    # Whether classes are selected, or clusters of the features, which need no labels.
    kind: Annotated[str, OneOf(KINDS, "kind")] = "class"
    # Number of classes or clusters. By label, all classes with a matching name are selected, and this is not used.
    num_selected: Count = 100
    # Rank by similarity of the first one: 101 leaves out the 100 most similar ones.
    first: Count = 1
    # Distance between mean features: "cosine" or "l2"; unset: cosine for uot and l2 for greedy_ot, as in the paper.
    metric: Annotated[str, OneOf(COST_SCALES, "metric")] | None = None
    # uot: what distances are divided by; unset: 0.01 for cosine and 0.1 for l2.
    cost_scale: Positive | None = None
    # uot: weights of the entropy and of the two marginals in equation 5 of Liu et al., 2022.
    epsilon: Positive = 1.0
    tau_source: Positive = 1.0
    tau_target: Positive = 100.0
    # Number of clusters of the source images.
    num_clusters: Count = 2000

    def __post_init__(self):
        check_itself(self)


def unused(settings: SelectionSettings) -> list[str]:
    """Returns the settings that have an unusual value although the selection does not depend on them.

    >>> unused(SelectionSettings("labels", num_selected=50)), unused(SelectionSettings("uot", num_clusters=500))
    (['num_selected'], ['num_clusters'])
    """
    uses = set(choose(STRATEGIES, settings.strategy, "strategy").uses) | {"strategy"}
    if settings.kind != "cluster":
        uses.discard("num_clusters")
    fields = dataclasses.fields(settings)
    return [f.name for f in fields if f.name not in uses and getattr(settings, f.name) != f.default]


def select(problem: Problem, settings: SelectionSettings) -> Selection:
    """Selects classes or clusters of source images for a target.

    Returns:
      The selection, most similar first, without the ranks before `settings.first`.

    Raises:
      InputError: if there are too few classes or clusters, or a mean cannot be used.

    >>> means = np.eye(4, dtype=np.float32)
    >>> problem = Problem(means, means[2:], "abcd", "xy")
    >>> select(problem, SelectionSettings("greedy_ot", num_selected=2)).indices.tolist()
    [2, 3]
    """
    strategy = choose(STRATEGIES, settings.strategy, "strategy")
    if strategy.needs_names and settings.kind == "cluster":
        raise InputError(f"strategy {settings.strategy!r} goes by the names of classes, and clusters have none.")
    if strategy.needs_names:
        return strategy.select(problem, settings, 0)
    last, available = settings.first - 1 + settings.num_selected, len(problem.source_names)
    if last > available:
        raise InputError(
            f"ranks {settings.first} to {last} of {available} {KINDS[settings.kind]} are asked for: use a smaller "
            "num_selected or first."
        )
    selection = strategy.select(problem, settings, last)
    return dataclasses.replace(selection, indices=selection.indices[settings.first - 1 :])
