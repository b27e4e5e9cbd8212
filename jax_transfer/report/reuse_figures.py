"""Draws what was selected and what fine-tuning with it gave, after Figures 2b, 3 and 4 of the paper on reuse.

"Improved Fine-Tuning by Better Leveraging Pre-Training Data" (Liu et al., NeurIPS 2022). Each figure compares
selections or targets that differ in one setting only, see `families`.
"""

import itertools
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.figure import Figure

from jax_transfer.records import METRICS
from jax_transfer.report import best
from jax_transfer.report.best import Point
from jax_transfer.report.families import Family, by_fraction, families, settled, usual_values, words
from jax_transfer.report.figures import Drawing
from jax_transfer.report.reuse import PLAIN_WAY, Reused, Way
from jax_transfer.report.selected import Related, Selected, recall
from jax_transfer.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    WIDTH,
    cut,
    legend_above,
    percent_axis,
    shorten_all,
)
from jax_transfer.report.tables import is_number, short_target, way_name, way_words
from jax_transfer.results import Row
from jax_transfer.selection.strategies import KINDS

LOOKS = ((BLUE, "o"), (VERMILION, "D"), (GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "s"))
OTHER = "#B5B9C0"  # classes that are not related to the target
MOST_BARS = 100  # ranks of a similarity vector that are drawn
MOST_NAMES = 12  # names of classes below them
MOST_TICKS = 6  # numbers of up to four digits that fit below a figure
MANY = 12  # figures of similarities; with more, they are grouped by target


def _line(axes: matplotlib.axes.Axes, points: Mapping[float, Point], look: tuple[str, str], label: str) -> None:
    """Draws a line through the means of accuracies (%), with a band that spans the seeds."""
    color, marker = look
    x = list(points)
    if any(point.num_seeds > 1 for point in points.values()):
        lows, highs = ([100 * getattr(p, end) for p in points.values()] for end in ("low", "high"))
        axes.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)
    axes.plot(x, [100 * p.mean for p in points.values()], color=color, marker=marker, label=label, clip_on=False)


def _level(axes: matplotlib.axes.Axes, point: Point | None, color: str, label: str) -> None:
    """Draws an accuracy (%) that does not depend on what the figure varies as a dashed line, with a band."""
    if point:
        if point.num_seeds > 1:
            axes.axhspan(100 * point.low, 100 * point.high, color=color, alpha=0.12, linewidth=0)
        axes.axhline(100 * point.mean, color=color, linestyle="--", linewidth=1.0, label=label)


@matplotlib.rc_context(STYLE)
def similarity(rows: Sequence[Row], classes: Collection[str], target: str, label: str) -> Figure:
    """Draws the similarity of the selected classes by rank, and the names of the first ones (Figure 2b).

    Args:
      rows: rows of results/selection.jsonl with a similarity, by rank.
      classes: names of the classes that are related to the target, which get another colour.
      target: name of the target.
      label: describes the selection.

    >>> rows = [{"rank": i + 1, "class": name, "similarity": 1 / (i + 1)} for i, name in enumerate("ab")]
    >>> [text.get_text() for text in similarity(rows, {"a"}, "tfds:pets", "UOT").axes[1].get_yticklabels()]
    ['a', 'b']
    """
    rows, named = rows[:MOST_BARS], rows[:MOST_NAMES]
    figure = Figure(figsize=(WIDTH, 1.75 + 0.17 * len(named)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.2, 0.25 + 0.17 * len(named)))
    looks = {"related": BLUE, "other": OTHER} if classes else {"": BLUE}
    for text, color in looks.items():
        own = [row for row in rows if not classes or (row["class"] in classes) == (text == "related")]
        above.bar([row["rank"] for row in own], [row["similarity"] for row in own], 0.9, color=color, label=text)
        shown = [(i, row["similarity"]) for i, row in enumerate(named) if row in own]
        below.barh([i for i, _ in shown], [value for _, value in shown], 0.7, color=color)
    above.set(xlabel="Rank", ylabel="Similarity")
    above.margins(x=0.01)
    if classes:
        legend_above(above, columns=2)
    short = shorten_all(dict.fromkeys(row["class"] for row in named), 24)
    below.set_yticks(range(len(named)), [short[row["class"]] for row in named])
    below.set(ylim=(len(named) - 0.4, -0.6), xlabel="Similarity")
    for axes, which in ((above, above.yaxis), (below, below.xaxis)):
        which.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_axisbelow(True)
    figure.suptitle(cut(f"{short_target(target)}: {label}", 44))
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_by_number(
    lines: Mapping[str, Mapping[float, Point]], levels: Mapping[str, Point], target: str, metric: str, label: str
) -> Figure:
    """Draws the accuracy (%) against the number of selected classes (Figure 3a).

    Args:
      lines: label -> number of selected classes -> accuracy.
      levels: label -> accuracy that does not depend on the number, the first of plain fine-tuning.
      target: name of the target.
      metric: a key of `records.METRICS`.
      label: label of the number.

    >>> point = Point(0.8, 0.8, 0.8, 1)
    >>> axes = accuracy_by_number({"UOT": {50: point, 100: point}}, {}, "a", "accuracy", "Selected classes").axes[0]
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('Selected classes', 'Accuracy (%)')
    """
    figure = Figure(figsize=(WIDTH, 2.1 + 0.14 * (len(lines) + len(levels))), layout="constrained")
    axes = figure.subplots()
    for color, (text, point) in zip((GREY, SKY), levels.items(), strict=False):
        _level(axes, point, color, text)
    for look, (text, points) in zip(LOOKS * len(lines), lines.items(), strict=False):
        _line(axes, points, look, text)
    axes.set_xlabel(label)
    axes.set_xticks(sorted({number for points in lines.values() for number in points}))
    percent_axis(axes, best.axis_label(metric))
    legend_above(axes)
    figure.suptitle(cut(short_target(target), 38))
    return figure


@matplotlib.rc_context(STYLE)
def low_data(by_way: Mapping[Way, Mapping[float, Point]], target: str, metric: str) -> Figure:
    """Draws the accuracy (%) of each way of fine-tuning against the part of the training images, and the gain by reuse.

    Follows Figure 3b. The gain is over plain fine-tuning, in points.

    Args:
      by_way: way -> fraction of the training images -> accuracy.
      target: name of the target without a fraction.
      metric: a key of `records.METRICS`.

    >>> points = {0.2: Point(0.5, 0.5, 0.5, 1), 1.0: Point(0.8, 0.8, 0.8, 1)}
    >>> [axes.get_ylabel() for axes in low_data({PLAIN_WAY: points}, "a", "accuracy").axes]
    ['Accuracy (%)']
    """
    others = [way for way in by_way if way != PLAIN_WAY]
    looks = {PLAIN_WAY: (GREY, "o"), **{way: LOOKS[i % len(LOOKS)] for i, way in enumerate(others)}}
    plain = by_way.get(PLAIN_WAY, {})
    panels = 2 if others and plain else 1
    figure = Figure(figsize=(WIDTH, 1.9 + 0.14 * len(by_way) + 1.2 * (panels - 1)), layout="constrained")
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=(1.7, 1)[:panels])[:, 0]
    for way, points in by_way.items():
        _line(all_axes[0], {100 * fraction: point for fraction, point in points.items()}, looks[way], way.name)
    if panels == 2:
        all_axes[1].axhline(0, color=GREY, linewidth=0.7, linestyle=":")
        for way in others:
            both = [fraction for fraction in by_way[way] if fraction in plain]
            gains = [100 * (by_way[way][fraction].mean - plain[fraction].mean) for fraction in both]
            color, marker = looks[way]
            all_axes[1].plot([100 * f for f in both], gains, color=color, marker=marker, clip_on=False)
        all_axes[1].set_ylabel("Gain (points)")
        all_axes[1].yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    percent_axis(all_axes[0], best.axis_label(metric))
    legend_above(all_axes[0], columns=2 if len(by_way) > 4 else 1)
    all_axes[-1].set_xlabel("Training images (%)")
    all_axes[-1].set_xticks(sorted({100 * fraction for points in by_way.values() for fraction in points}))
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(short_target(target), 38))
    return figure


@matplotlib.rc_context(STYLE)
def recall_by_cost_scale(lines: Mapping[str, Mapping[float, float]]) -> Figure:
    """Draws the recall (%) of the related classes against the cost scale (Figure 4a).

    Args:
      lines: label -> cost scale -> recall in [0, 1].

    >>> recall_by_cost_scale({"UOT": {0.01: 0.98, 0.1: 0.95}}).axes[0].get_xscale()
    'log'
    """
    figure = Figure(figsize=(WIDTH, 2.0 + 0.14 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for (color, marker), (text, values) in zip(LOOKS * len(lines), lines.items(), strict=False):
        shares = [100 * value for value in values.values()]
        axes.plot(list(values), shares, color=color, marker=marker, label=text, clip_on=False)
    axes.set_xscale("log")
    axes.set_xlabel("Cost scale")
    axes.set_ylabel("Recall (%)")
    axes.set_ylim(0, 100)
    axes.set_xticks(sorted({scale for values in lines.values() for scale in values}))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    legend_above(axes)
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_by_rank(
    lines: Mapping[str, Mapping[float, Point]],
    levels: Mapping[str, Point],
    similarities: Mapping[float, float],
    target: str,
    metric: str,
) -> Figure:
    """Draws the accuracy (%) against the first rank of the selected classes, and their mean similarity (Figure 4b).

    Args:
      lines, levels: as in `accuracy_by_number`, with the first rank in place of the number.
      similarities: first rank -> mean similarity.
      target: name of the target.
      metric: a key of `records.METRICS`.

    >>> point = Point(0.8, 0.8, 0.8, 1)
    >>> figure = accuracy_by_rank({"Joint": {1: point, 101: point}}, {}, {1: 0.5, 101: 0.1}, "a", "accuracy")
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['Accuracy (%)', 'Similarity']
    """
    panels = 2 if similarities else 1
    figure = Figure(figsize=(WIDTH, 1.9 + 0.14 * (len(lines) + len(levels)) + 0.9 * (panels - 1)), layout="constrained")
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=(1.7, 1)[:panels])[:, 0]
    for text, point in levels.items():
        _level(all_axes[0], point, GREY, text)
    for look, (text, points) in zip(LOOKS * len(lines), lines.items(), strict=False):
        _line(all_axes[0], points, look, text)
    if similarities:
        ranks, values = list(similarities), list(similarities.values())
        width = 0.6 * min((b - a for a, b in itertools.pairwise(ranks)), default=1)
        all_axes[1].bar(ranks, values, width, color=OTHER)
        if min(values) > 0 and max(values) > 20 * min(values):
            all_axes[1].set_yscale("log")
            all_axes[1].yaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=4))
            all_axes[1].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            all_axes[1].yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        else:
            all_axes[1].yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        all_axes[1].set_ylabel("Similarity")
    percent_axis(all_axes[0], best.axis_label(metric))
    legend_above(all_axes[0])
    all_axes[-1].set_xlabel("First rank of the selected classes")
    ranks = sorted({rank for points in lines.values() for rank in points})
    all_axes[-1].set_xticks(ranks[:: -(-len(ranks) // MOST_TICKS)])
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(short_target(target), 38))
    return figure


def _lines_of(reused: Reused, found: Sequence[Family], target: str, objective: str) -> dict[str, dict[float, Point]]:
    """Returns label of a family -> value of its setting -> accuracy, for families with at least two accuracies."""
    by_way = reused.points[target]
    lines = {
        family.label: {
            value: by_way[Way(objective, name)]
            for value, name in family.members.items()
            if Way(objective, name) in by_way
        }
        for family in found
    }
    return {label: points for label, points in lines.items() if len(points) > 1}


def _levels(reused: Reused, select: Mapping[str, Any], target: str, objective: str) -> dict[str, Point]:
    """Returns label -> accuracy of plain fine-tuning, and of the same objective with the label-based selection."""
    by_way, selections = reused.points[target], select.get("selections") or {}
    labels = [name for name, selection in selections.items() if selection["strategy"] == "labels"]
    levels = {PLAIN_WAY.name: by_way.get(PLAIN_WAY)}
    levels |= {words(selections[name]): by_way.get(Way(objective, name)) for name in labels}
    return {text: point for text, point in levels.items() if point}


def draw_accuracies(
    reused: Reused, select: Mapping[str, Any], selected: Selected, names: Mapping[str, str]
) -> Iterator[Drawing]:
    """Yields the figures of accuracies: by part of the training images, by number of selected classes and by rank.

    Args:
      reused: what fine-tuning gave.
      select: `config.select`.
      selected: the value of `selected.by_selection`.
      names: target -> display name.
    """
    selections = select.get("selections") or {}
    objectives = dict.fromkeys(way.objective for way in reused.ways if way.selection)
    for base, by_part in by_fraction(reused.points).items():
        by_way = {
            way: {part: reused.points[target][way] for part, target in by_part.items() if way in reused.points[target]}
            for way in reused.ways
        }
        by_way = {way: points for way, points in by_way.items() if len(points) > 1}
        if by_way:
            metric = reused.metrics[next(iter(by_part.values()))]
            caption = (
                f"{short_target(base)}: {METRICS[metric]} against the part of the training images, and the gain over"
                " plain fine-tuning. Bands span all seeds."
            )
            yield Drawing("", f"reuse-low_data-{short_target(base)}", caption, low_data(by_way, base, metric))
    for objective in objectives:
        for target in reused.points:
            metric, way = reused.metrics[target], way_words(objective, None)
            levels = _levels(reused, select, target, objective)
            for kind, unit in KINDS.items():
                of_kind = {n: s for n, s in selections.items() if settled(s)["kind"] == kind}
                lines = _lines_of(reused, families(of_kind, "num_selected"), target, objective)
                if lines:
                    caption = (
                        f"{names[target]}, {way}: {METRICS[metric]} against the number of selected {unit}. Dashed:"
                        " accuracies that do not depend on it. Bands span all seeds."
                    )
                    figure = accuracy_by_number(lines, levels, target, metric, f"Selected {unit}")
                    yield Drawing("", f"reuse-number-{names[target]}-{objective}-{unit}", caption, figure)
            for family in families(selections, "first"):
                lines = _lines_of(reused, [family], target, objective)
                if lines:
                    lines = {f"{way_name(objective, None)}, {label}": points for label, points in lines.items()}
                    plain = {text: point for text, point in levels.items() if text == PLAIN_WAY.name}
                    means = _mean_similarities(selected, family, target)
                    caption = (
                        f"{names[target]}, {way}: {METRICS[metric]} when classes of falling similarity are reused, and"
                        " their mean similarity. Bands span all seeds."
                    )
                    figure = accuracy_by_rank(lines, plain, means, target, metric)
                    yield Drawing("", f"reuse-rank-{names[target]}-{objective}", caption, figure)


def _mean_similarities(selected: Selected, family: Family, target: str) -> dict[float, float]:
    """Returns first rank -> mean similarity of the classes of each member of a family; {} if any is unknown."""
    values = {
        first: [row["similarity"] for row in selected.get((target, name), ())] for first, name in family.members.items()
    }
    known = all(found and all(map(is_number, found)) for found in values.values())
    return {first: statistics.fmean(found) for first, found in values.items()} if known else {}


def draw_recalls(
    select: Mapping[str, Any], selected: Selected, classes: Related, names: Mapping[str, str]
) -> Iterator[Drawing]:
    """Yields the figure of the recall against the cost scale, for all targets with related classes.

    Args:
      select: `config.select`.
      selected: the value of `selected.by_selection`.
      classes: the value of `selected.related`.
      names: target -> display name.
    """
    lines = {}
    for target in classes:
        for family in families(select.get("selections") or {}, "cost_scale"):
            found = {
                scale: share
                for scale, name in family.members.items()
                if (share := recall(selected.get((target, name), ()), classes[target])) is not None
                and (target, name) in selected
            }
            if len(found) > 1:
                lines[f"{names[target]}, {family.label}"] = found
    if lines:
        caption = "Recall: the share of the related source classes that a selection holds, against its cost scale."
        yield Drawing("", "reuse-recall", caption, recall_by_cost_scale(lines))


def draw_similarities(
    select: Mapping[str, Any], selected: Selected, classes: Related, names: Mapping[str, str]
) -> Iterator[Drawing]:
    """Yields a figure of the similarities for each target and choice of settings that changes them.

    Selections that differ in the number or in the ranks of their classes share a figure, and of several cost scales the
    usual one is drawn. The arguments are those of `draw_recalls`.
    """
    selections = select.get("selections") or {}
    drawn: dict[tuple, dict[int, Row]] = {}
    of_figure: dict[tuple, tuple[str, str]] = {}
    for (target, name), rows in selected.items():
        selection = selections.get(name, {"strategy": name})
        values, usual = settled(selection), usual_values(selection)
        if not all(is_number(row["similarity"]) and row["similarity"] >= 0 for row in rows):
            continue
        if values.get("cost_scale") not in (None, usual["cost_scale"]):
            continue
        others = {k: v for k, v in values.items() if k not in ("num_selected", "first")}
        key = (target, *others.items())
        of_figure.setdefault(key, (target, words(selection, ["num_selected"])))
        drawn.setdefault(key, {}).update({row["rank"]: row for row in rows})
    for key, by_rank in drawn.items():
        target, label = of_figure[key]
        rows = [by_rank[rank] for rank in sorted(by_rank)]
        related = classes.get(target, ()) if rows[0]["kind"] == "class" else ()
        blue = " Blue: source classes that are related to the target." if related else ""
        caption = f"{names[target]}: similarity of the first source {KINDS[rows[0]['kind']]} by {label}.{blue}"
        group = names[target] if len(drawn) > MANY else ""
        figure = similarity(rows, related, target, label)
        yield Drawing(group, f"reuse-similarity-{names[target]}-{label}", caption, figure)
