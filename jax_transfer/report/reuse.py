"""Answers in words and tables whether fine-tuning gains by reusing source data, and which way of it is best.

A way is an objective with a selection of source images, if it needs one: the results of plain fine-tuning, joint
fine-tuning and so on are rows of results/transfer.jsonl with the method "finetune". The tables are in `reuse_tables`.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_transfer.records import METRICS
from jax_transfer.report.best import Point, accuracy_by, label_of, metric_of, seed_spread
from jax_transfer.report.families import condition
from jax_transfer.report.grid import SWEPT, swept
from jax_transfer.report.tables import counted, in_points, percent, way_name, way_words
from jax_transfer.results import PLAIN, Row, is_plain


class Way(NamedTuple):
    """A way of fine-tuning; objective and selection as in `results.TransferRow`."""

    objective: str
    selection: str | None

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        return way_name(*self)


PLAIN_WAY = Way(PLAIN, None)

Points = Mapping[str, Mapping[Way, Point]]  # target -> way -> accuracy over seeds
Paper = Mapping[tuple[str, Way], float]  # (target, way) -> accuracy in the paper


@dataclasses.dataclass(frozen=True)
class Reused:
    """The ways in which a checkpoint was fine-tuned.

    Attributes:
      checkpoint, label: its name in the rows and its display name.
      ways: all ways, plain fine-tuning first.
      points: target -> way -> accuracy by the target's metric; a way without an accuracy is missing.
      metrics: target -> a key of `records.METRICS`.
      swept: the targets on which the settings were chosen on the test images.
      num_test: target -> number of test images, where the rows say it.
    """

    checkpoint: str
    label: str
    ways: tuple[Way, ...]
    points: Points
    metrics: dict[str, str]
    swept: frozenset[str]
    num_test: dict[str, int]


def way_of(row: Row) -> Way:
    """Returns the way of fine-tuning to which a row belongs.

    >>> way_of({"objective": "joint", "selection": "uot"}), way_of({}) == PLAIN_WAY
    (Way(objective='joint', selection='uot'), True)
    """
    return Way(row.get("objective", PLAIN), row.get("selection"))


def collect(rows: Sequence[Row]) -> list[Reused]:
    """Collects the ways of fine-tuning of each checkpoint that was fine-tuned with source data.

    Args:
      rows: the rows of fine-tuning, see `best.by_metric`.

    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run", "epoch": None}
    >>> (found,) = collect([{**row, "objective": "joint", "selection": "uot", "accuracy": 0.9},
    ...                     {**row, "objective": "supervised", "accuracy": 0.8}])
    >>> [way.name for way in found.ways], found.points["a"][PLAIN_WAY].mean
    (['Plain', 'Joint, uot'], 0.8)
    """
    reused = []
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows if not is_plain(row)):
        own = [row for row in rows if row["checkpoint"] == checkpoint]
        found = dict.fromkeys(way_of(row) for row in own)
        ways = tuple(sorted(found, key=lambda way: way != PLAIN_WAY))
        points = {}
        for target in dict.fromkeys(row["target"] for row in own):
            by_way = {way: _point([row for row in own if way_of(row) == way], target) for way in ways}
            points[target] = {way: point for way, point in by_way.items() if point}
        metrics = {target: metric_of(own, target) for target in points}
        on_test = frozenset(target for target, _ in swept(own))
        num_test = {row["target"]: row["num_test"] for row in own if row.get("num_test")}
        reused.append(Reused(checkpoint, label_of(own[0]), ways, points, metrics, on_test, num_test))
    return reused


def _point(rows: Sequence[Row], target: str) -> Point | None:
    """Returns the accuracy of a way on a target; None if it has none."""
    return next(iter(accuracy_by("checkpoint", rows, target, "finetune").values()), None)


def best_way(points: Mapping[Way, Point]) -> Way | None:
    """Returns the best way that is not plain fine-tuning, the first one in case of a tie; None if there is none.

    >>> best_way({PLAIN_WAY: Point(0.9, 0.9, 0.9, 1), Way("cotuning", None): Point(0.8, 0.8, 0.8, 1)})
    Way(objective='cotuning', selection=None)
    """
    others = (way for way in points if way != PLAIN_WAY)
    return max(others, key=lambda way: points[way].mean, default=None)


def due_to_chance(a: float, b: float, num_test: int) -> float:
    """Returns the difference of two accuracies that the choice of the test images alone exceeds in 1 of 20 cases.

    The images are taken as independent for both accuracies; since both are measured on the same ones, this is cautious.

    >>> round(due_to_chance(0.2, 0.2, 40), 3), round(due_to_chance(0.9, 0.9, 6000), 3)
    (0.175, 0.011)
    """
    return 1.96 * ((a * (1 - a) + b * (1 - b)) / num_test) ** 0.5


def sentence(points: Mapping[Way, Point], metric: str, on_test: bool = False, num_test: int | None = None) -> str:
    """Says which way of reusing source data is best on a target, and how it compares with plain fine-tuning.

    Args:
      points: way -> accuracy.
      metric: a key of `records.METRICS`.
      on_test: whether the settings were chosen on the test images.
      num_test: number of test images.

    >>> points = {PLAIN_WAY: Point(0.80, 0.79, 0.81, 3), Way("joint", "uot"): Point(0.85, 0.84, 0.86, 3)}
    >>> print(sentence(points, "accuracy").replace(chr(160), " "))
    Joint fine-tuning with uot reaches 85.00 % accuracy (best of 3 seeds: 86.00 %), 5.00 points above plain
    fine-tuning (80.00 %; best of 3 seeds: 81.00 %). The spread over seeds is 2.00 points.
    """
    best, plain = best_way(points), points.get(PLAIN_WAY)
    qualified = f"{METRICS[metric]}{f', {SWEPT}' if on_test else ''}"
    if best is None:
        if plain is None:
            return ""
        return f"Plain fine-tuning reaches {_accuracy(plain, qualified)}; no other way has an accuracy yet."
    point, number = points[best], sum(way != PLAIN_WAY for way in points)
    subject = way_words(*best)
    subject = f"{subject[0].upper()}{subject[1:]}"
    ties = sum(way != PLAIN_WAY and points[way].mean == point.mean for way in points)
    if ties > 1:
        which = "equal" if ties == number else f"the {ties} best of {number}"
        of = f"and {counted(ties - 1, 'other way')} of reusing source data are {which}, with"
    else:
        of = f"is the best of {number} ways of reusing source data, with" if number > 1 else "reaches"
    text = f"{subject} {of} {_accuracy(point, qualified)}"
    if plain is None:
        return f"{text}; plain fine-tuning has no accuracy yet."
    gain = round(point.mean - plain.mean, 12)
    if gain == 0:
        return f"{text}, the same as plain fine-tuning."
    side = "above" if gain > 0 else "below"
    text += f", {in_points(abs(gain))} {side} plain fine-tuning ({_seeds(percent(plain.mean), plain, '; ')})"
    spread = seed_spread([point, plain], max(point.num_seeds, plain.num_seeds))
    chance = due_to_chance(point.mean, plain.mean, num_test) if num_test and metric == "accuracy" else 0.0
    few = f"with {num_test or 0:,} test images, a difference of up to {in_points(chance)} may be due to chance"
    if spread is None:
        return f"{text}. W{few[1:]}." if abs(gain) <= chance else f"{text}."
    if abs(gain) <= spread:
        clear = "no clear gain" if gain > 0 else "no clear loss"
        return f"{text}. This is no more than the spread over seeds ({in_points(spread)}), so there is {clear}."
    return f"{text}. The spread over seeds is {in_points(spread)}{f', but {few}' if abs(gain) <= chance else ''}."


def sentences(reused: Reused) -> dict[str, str]:
    """Returns `sentence` for each target that has an accuracy.

    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run", "epoch": None, "objective": "cotuning"}
    >>> sentences(collect([{**row, "accuracy": 0.5}])[0])["a"].replace(chr(160), " ")
    'Co-Tuning reaches 50.00 % accuracy; plain fine-tuning has no accuracy yet.'
    """
    told = (
        (t, sentence(by_way, reused.metrics[t], t in reused.swept, reused.num_test.get(t)))
        for t, by_way in reused.points.items()
    )
    return {target: text for target, text in told if text}


def _accuracy(point: Point, metric: str) -> str:
    """Returns the mean of a point in words, with the best seed in brackets."""
    text = f"{percent(point.mean)} {metric}"
    return f"{text} ({_seeds('', point, '')})" if point.num_seeds > 1 else text


def _seeds(text: str, point: Point, separator: str) -> str:
    """Adds the best seed of a point to a text, if there are several seeds."""
    return f"{text}{separator}best of {point.num_seeds} seeds: {percent(point.high)}" if point.num_seeds > 1 else text


def overall(reused: Reused) -> str:
    """Says which way is best on the average of all whole targets; "" with fewer than two.

    Targets with a part of their training images do not take part, nor do ways without an accuracy on each target.

    >>> row = {"method": "finetune", "checkpoint": "run", "epoch": None}
    >>> rows = [{**row, "target": target, "objective": objective, "accuracy": accuracy} for target in "ab"
    ...         for objective, accuracy in (("supervised", 0.8), ("cotuning", 0.7))]
    >>> overall(collect(rows)[0]).replace(chr(160), " ")
    'On average over 2 targets, Co-Tuning (70.00 %) is 10.00 points below plain fine-tuning (80.00 %).'
    """
    targets = [target for target in reused.points if not condition(target)]
    means = {way: mean for way in reused.ways if (mean := average(reused.points, targets, way)) is not None}
    others = {way: mean for way, mean in means.items() if way != PLAIN_WAY}
    if len(targets) < 2 or not others or PLAIN_WAY not in means:
        return ""
    best = max(others, key=others.__getitem__)
    gain = round(others[best] - means[PLAIN_WAY], 12)
    name = f"{way_words(*best)} ({percent(others[best])})"
    plain = f"plain fine-tuning ({percent(means[PLAIN_WAY])})"
    over = f"On average over {counted(len(targets), 'target')}"
    if gain == 0:
        return f"{over}, {name} equals {plain}."
    number = f", the best of {len(others)} ways of reusing source data," if len(others) > 1 else ""
    return f"{over}, {name}{number} is {in_points(abs(gain))} {'above' if gain > 0 else 'below'} {plain}."


def average(points: Points, targets: Sequence[str], way: Way) -> float | None:
    """Returns the mean accuracy of a way over targets; None if it lacks one.

    >>> average({"a": {PLAIN_WAY: Point(0.5, 0.5, 0.5, 1)}, "b": {}}, ["a", "b"], PLAIN_WAY) is None
    True
    """
    found = [points[target][way].mean for target in targets if way in points[target]]
    return statistics.fmean(found) if found and len(found) == len(targets) else None


def paper_accuracies(paper: Sequence[Row], what: str = "FT") -> dict[tuple[str, Way], float]:
    """Returns the numbers of the paper that belong to no epoch: (target, way) -> accuracy.

    Args:
      paper: `config.paper`.
      what: which numbers, see `study.config.PaperAccuracy`.

    >>> paper_accuracies([{"target": "a", "what": "FT", "accuracy": 0.9, "objective": "joint", "selection": "uot"}])
    {('a', Way(objective='joint', selection='uot')): 0.9}
    """
    return {
        (row["target"], Way(row.get("objective") or PLAIN, row.get("selection") or None)): row["accuracy"]
        for row in paper
        if row.get("epoch") is None and row["what"] == what
    }
