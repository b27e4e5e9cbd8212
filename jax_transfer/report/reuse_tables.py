"""Formats the accuracies of ways of fine-tuning as tables of ways by targets.

Follows Tables 1 to 3 of "Improved Fine-Tuning by Better Leveraging Pre-Training Data" (Liu et al., NeurIPS 2022).
"""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from jax_transfer.report.best import Point
from jax_transfer.report.families import Family, by_fraction, condition
from jax_transfer.report.reuse import Paper, Reused, Way
from jax_transfer.report.tables import EN_DASH, percent, short_target, way_words
from jax_transfer.results import Row

AVERAGE = "Average"  # title of the column with the mean over targets


class Columns(NamedTuple):
    """The targets of a table: its heading, and target -> title of its column."""

    heading: str
    titles: dict[str, str]


class Table(NamedTuple):
    """Rows of a table, and the (row, column) of the highest value of each column, for `tables.to_html`."""

    rows: list[Row]
    bold: set[tuple[int, str]]


def columns(targets: Sequence[str], names: Mapping[str, str]) -> list[Columns]:
    """Divides the targets into tables: whole ones, long-tailed ones, and for each data set its fractions.

    Args:
      names: target -> display name.

    >>> targets = ["tfds:dtd?fraction=0.2", "tfds:dtd"]
    >>> for heading, titles in columns(targets, dict(zip(targets, targets))):
    ...     print(heading, "|", *titles.values())
    Accuracy of each way of fine-tuning | tfds:dtd
    With a part of the training images: dtd | 20 % 100 %
    """
    found = []
    for heading, name in (
        ("Accuracy of each way of fine-tuning", ""),
        ("With a long-tailed training set", "imbalance"),
    ):
        if own := [target for target in targets if condition(target) == name]:
            found.append(Columns(heading, {target: names[target] for target in own}))
    for base, by_part in by_fraction(target for target in targets if condition(target) != "imbalance").items():
        titles = {target: f"{100 * part:g} %" for part, target in by_part.items()}
        found.append(Columns(f"With a part of the training images: {short_target(base)}", titles))
    return found


def ways_in(reused: Reused, targets: Collection[str], paper: Paper) -> dict[Way, Row]:
    """Returns the ways with an accuracy on any of the targets, of ours or of the paper, and the first cell of each.

    >>> from jax_transfer.report.reuse import collect
    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run", "epoch": None, "objective": "cotuning"}
    >>> ways_in(collect([{**row, "accuracy": 0.5}])[0], ["a"], {})
    {Way(objective='cotuning', selection=None): {'Fine-tuning': 'Co-Tuning'}}
    """
    every = dict.fromkeys((*reused.ways, *(way for target, way in paper if target in targets)))
    return {
        way: {"Fine-tuning": way.name}
        for way in every
        if any(way in reused.points[target] or (target, way) in paper for target in targets)
    }


def mean_table(reused: Reused, titles: Mapping[str, str], first: Mapping[Way, Row]) -> Table:
    """Formats the accuracy of each way on each target: the mean, and half of the distance between the extreme seeds.

    Args:
      titles: target -> title of its column.
      first: the ways, each with its first cells.

    >>> from jax_transfer.report.reuse import collect
    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run", "epoch": None, "objective": "cotuning"}
    >>> (found,) = collect([{**row, "seed": seed, "accuracy": 0.5 + seed / 10} for seed in (0, 1, 2)])
    >>> mean_table(found, {"a": "pets"}, ways_in(found, ["a"], {})).rows
    [{'Fine-tuning': 'Co-Tuning', 'pets': '60.00 ± 10.00'}]
    """
    points = _points(reused, titles, first)
    means = {way: {target: point.mean for target, point in found.items()} for way, found in points.items()}
    texts = {way: {target: _mean_and_spread(point) for target, point in found.items()} for way, found in points.items()}
    return _table(means, texts, titles, first)


def best_table(reused: Reused, titles: Mapping[str, str], first: Mapping[Way, Row], paper: Paper) -> Table:
    """Formats the best seed of each way on each target, with the number of the paper in brackets.

    The arguments are those of `mean_table`; `paper` is the value of `reuse.paper_accuracies`.

    >>> from jax_transfer.report.reuse import collect
    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run", "epoch": None, "objective": "cotuning"}
    >>> (found,), paper = collect([{**row, "accuracy": 0.5}]), {("a", Way("cotuning", None)): 0.8992}
    >>> best_table(found, {"a": "pets"}, ways_in(found, ["a"], paper), paper).rows
    [{'Fine-tuning': 'Co-Tuning', 'pets': '50.00 (89.92)'}]
    """
    points = _points(reused, titles, first)
    ours = {way: {target: point.high for target, point in found.items()} for way, found in points.items()}
    theirs = {way: {target: paper[target, way] for target in titles if (target, way) in paper} for way in first}
    texts = {
        way: {target: _beside(ours[way].get(target), theirs[way].get(target)) for target in ours[way] | theirs[way]}
        for way in first
    }
    return _table(ours, texts, titles, first, theirs)


def cluster_tables(reused: Reused, found: Sequence[Family], names: Mapping[str, str]) -> Iterator[tuple[str, Table]]:
    """Yields a title and a table for selections that differ in the number of clusters only, as in Table 2.

    Args:
      found: the value of `families.families` for "num_clusters".
      names: target -> display name.
    """
    for family in found:
        for objective in dict.fromkeys(way.objective for way in reused.ways):
            first = {
                way: {"Clusters": f"{number:,}"}
                for number, selection in family.members.items()
                if (way := Way(objective, selection)) in reused.ways
            }
            titles = {t: names[t] for t, by_way in reused.points.items() if any(way in by_way for way in first)}
            if len(first) > 1 and titles:
                title = f"Number of clusters: {family.label}, {way_words(objective, None)}"
                yield title, mean_table(reused, titles, first)


def _points(reused: Reused, targets: Collection[str], ways: Collection[Way]) -> dict[Way, dict[str, Point]]:
    """Returns way -> target -> accuracy; a target without one is missing."""
    return {way: {t: reused.points[t][way] for t in targets if way in reused.points[t]} for way in ways}


Values = Mapping[Way, Mapping[str, float]]  # way -> target -> accuracy


def _table(
    values: Values,
    texts: Mapping[Way, Mapping[str, str]],
    titles: Mapping[str, str],
    first: Mapping[Way, Row],
    theirs: Values | None = None,
) -> Table:
    """Builds a table with a row for each way, and the average over the targets if all of them are whole."""
    with_average = len(titles) > 1 and not any(map(condition, titles))
    rows, numbers = [], []
    for way, cells in first.items():
        row = {**cells, **{title: texts[way].get(target, EN_DASH) for target, title in titles.items()}}
        number = {titles[target]: value for target, value in values[way].items()}
        if with_average:
            ours, paper = (_mean(found[way], len(titles)) if found else None for found in (values, theirs))
            row[AVERAGE] = _beside(ours, paper)
            number |= {} if ours is None else {AVERAGE: ours}
        rows.append(row)
        numbers.append(number)
    bold = set()
    for column in (*titles.values(), AVERAGE):
        found = {i: number[column] for i, number in enumerate(numbers) if column in number}
        if len(found) > 1:
            bold |= {(i, column) for i, value in found.items() if value == max(found.values())}
    return Table(rows, bold)


def _mean(found: Mapping[str, float], number: int) -> float | None:
    """Returns the mean over all of `number` targets; None if one is missing."""
    return statistics.fmean(found.values()) if len(found) == number else None


def _mean_and_spread(point: Point) -> str:
    mean = percent(point.mean, unit="")
    return f"{mean} ± {percent((point.high - point.low) / 2, unit='')}" if point.num_seeds > 1 else mean


def _beside(ours: float | None, theirs: float | None) -> str:
    return percent(ours, unit="") + (f" ({percent(theirs, unit='')})" if theirs is not None else "")
