"""Draws the accuracies of many checkpoints by kind, as in Figures 1 to 3 of "Ranking Neural Checkpoints"."""

import itertools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jax_transfer.records import InputError
from jax_transfer.report import best, kinds, tables
from jax_transfer.report.best import Point, is_given, label_of, source_of
from jax_transfer.report.figures import Drawing, Results, Section
from jax_transfer.report.grid import is_result, swept, swept_note
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
    YELLOW,
    cut,
    cut_common_ends,
    shorten_all,
)
from jax_transfer.report.trust import ground_truth
from jax_transfer.results import Row

# Colours of the paper, in Okabe and Ito's palette. Other groups take those of OTHERS that are free.
COLOURS = {
    "generative": VERMILION,
    kinds.FROM_SCRATCH: "black",
    "self-supervised": GREEN,
    "semi-supervised": BLUE,
    "hybrid": SKY,
    kinds.GIVEN: GREY,
}
OTHERS = (ORANGE, PURPLE, YELLOW, BLUE, GREEN, SKY, VERMILION, "#999999")
MANY = 24  # checkpoints, with which a figure has one line of panels instead of two
MOST = 60  # with more, names would be too small to read; epochs have figures of their own
NAME_WIDTH = 28  # columns of text


def offsets(points: Mapping[str, Point]) -> dict[str, Point]:
    """Returns the accuracies minus their mean over the checkpoints.

    >>> offsets({"a": Point(0.5, 0.25, 0.75, 2), "b": Point(1.0, 1.0, 1.0, 2)})["a"]
    Point(mean=-0.25, low=-0.5, high=0.0, num_seeds=2)
    """
    mean = statistics.fmean(point.mean for point in points.values())
    return {name: Point(p.mean - mean, p.low - mean, p.high - mean, p.num_seeds) for name, p in points.items()}


def colours(labels: Sequence[str]) -> dict[str, str]:
    """Returns the colour of each group. Those of the paper's kinds are fixed.

    >>> colours(["supervised on cifar10", "generative"])
    {'supervised on cifar10': '#E69F00', 'generative': '#D55E00'}
    """
    free = itertools.cycle([colour for colour in OTHERS if colour not in map(COLOURS.get, labels)])
    return {label: COLOURS.get(label) or next(free) for label in labels}


@matplotlib.rc_context(STYLE)
def accuracies_by_kind(results: Results, targets: Sequence[str], method: str) -> Figure:
    """Draws the accuracy of each checkpoint minus the mean over checkpoints, in points, with a panel for each target.

    Follows Figures 1 to 3 of "Ranking Neural Checkpoints". Colours show the groups of `kinds.groups`, in whose order
    the checkpoints are; a thin line spans all seeds.

    Args:
      results: result file -> rows; uses transfer, pretrain and checkpoints.
      targets: names of the targets.
      method: the method of the accuracies, such as "finetune".

    Raises:
      InputError: if a target has no accuracy.

    >>> rows = [{"target": "a", "method": "finetune", "checkpoint": f"run/{epoch}", "epoch": epoch, "accuracy": 0.5}
    ...         for epoch in (1, 2, 3)]
    >>> axes = accuracies_by_kind({"transfer": rows}, ["a"], "finetune").axes[0]
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['run/1', 'run/2', 'run/3']
    """
    rows = results["transfer"]
    points = {target: best.accuracy_by("checkpoint", rows, target, method) for target in targets}
    if without := [target for target, found in points.items() if not found]:
        raise InputError(
            f"results/transfer.jsonl has no {method!r} accuracy for target {without[0]!r}; run stage {method}."
        )
    known = kinds.origins(_drawn(results, method))
    group_of = kinds.groups(known)
    labels = sorted(dict.fromkeys(group_of.values()), key=lambda label: label == kinds.FROM_SCRATCH)
    colour_of = colours(labels)
    names = sorted(group_of, key=lambda name: labels.index(group_of[name]))
    columns = min(2, len(targets))
    lines = -(-len(targets) // columns)
    height = lines * (0.55 + 0.115 * len(names)) + 0.14 * -(-len(labels) // 2)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    all_axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, (target, found) in zip(all_axes, points.items(), strict=False):
        _panel(axes, offsets(found), names, [colour_of[group_of[name]] for name in names])
        axes.set_title(cut(tables.short_target(target), 18), fontsize=7.5)
    for axes in all_axes[::columns]:
        axes.set_yticks(range(len(names)), _names(rows, names, known, group_of), fontsize=6)
    for axes in all_axes[len(targets) :]:
        axes.set_visible(False)
    figure.supxlabel(f"{cut(tables.method_name(method), 14)} accuracy minus its mean (points)", fontsize=8)
    handles = [Patch(color=colour, label=cut(label, 29)) for label, colour in colour_of.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=0.8, columnspacing=1.0, fontsize=6.5)
    return figure


def _panel(axes: matplotlib.axes.Axes, found: Mapping[str, Point], names: Sequence[str], colour: Sequence[str]) -> None:
    """Draws a bar for each checkpoint with an accuracy, the first at the top."""
    for y, name in enumerate(names):
        if name in found:
            axes.barh(y, 100 * found[name].mean, 0.75, color=colour[y])
            axes.hlines(y, 100 * found[name].low, 100 * found[name].high, color=GREY, linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))


def _drawn(results: Results, method: str) -> dict[str, Sequence[Row]]:
    """Returns the results with those rows of transfer only that have an accuracy by a method."""
    measured = [row for row in results["transfer"] if tables.is_number(best.value(row)) and is_result(row)]
    rows = [row for row in measured if row["method"] == method]
    return {**results, "transfer": rows}


def _names(
    rows: Sequence[Row], checkpoints: Sequence[str], known: Mapping[str, kinds.Origin], group_of: Mapping[str, str]
) -> list[str]:
    """Returns the display names of checkpoints: without the epoch or step if it is the only one of its pre-training.

    If some are too long, names lose the pre-training data that their colour shows, and the long ones what they share.
    Names are then distinct within a group.
    """
    row_of = {row["checkpoint"]: row for row in rows}
    sources = {name: source_of(row_of[name]) for name in checkpoints if not is_given(row_of[name])}
    names = {}
    for name in checkpoints:
        alone = list(sources.values()).count(sources.get(name, "")) == 1
        own = sources[name] if alone and name in sources else name
        names[name] = tables.showable(own) if sources.get(name) else label_of(row_of[name])
    long = {name: shown for name, shown in names.items() if cut(shown, NAME_WIDTH) != shown}
    for name in names if long else ():
        if (source := known[name].source) and group_of[name].endswith(f"on {source}"):
            names[name] = _without_part(names[name], source)
    long = {name: names[name] for name in long}
    if len(long) > 1:
        long = dict(zip(long, cut_common_ends(list(long.values())), strict=True))
    names |= long
    short = {g: shorten_all((names[n] for n in names if group_of[n] == g), NAME_WIDTH) for g in group_of.values()}
    return [short[group_of[name]][names[name]] for name in checkpoints]


def _without_part(name: str, source: str) -> str:
    """Leaves out the part of a checkpoint's name that names its pre-training data, if two parts remain.

    >>> _without_part("resnet18/cifar10/90", "cifar10"), _without_part("cifar10/90", "cifar10")
    ('resnet18/90', 'cifar10/90')
    """
    part = re.sub(r"\W+", "_", source).strip("_")
    rest = [own for own in name.split("/") if own != part]
    return "/".join(rest) if len(rest) > 1 else name


def _draw(results: Results) -> Iterator[Drawing]:
    """Yields figures of a few targets each, if there are three checkpoints of two pre-trainings or given ones."""
    method = ground_truth(results["transfer"])
    if method is None:
        return
    rows = _drawn(results, method)["transfer"]
    checkpoints = {row["checkpoint"]: row["checkpoint"] if is_given(row) else source_of(row) + "/" for row in rows}
    if not 3 <= len(checkpoints) <= MOST or len(set(checkpoints.values())) < 2:
        return
    targets = list(dict.fromkeys(row["target"] for row in rows))
    names = tables.target_names(targets)
    size = 2 if len(checkpoints) > MANY else 4
    for start in range(0, len(targets), size):
        shown = targets[start : start + size]
        metrics = {target: best.metric_of(rows, target) for target in shown}
        caption = (
            f"{tables.method_name(method)} {best.metric_words(metrics, names)} of each checkpoint minus the mean over "
            f"{tables.counted(len(checkpoints), 'checkpoint')}, on {tables.listed([names[t] for t in shown])}. Thin "
            "lines span all seeds."
        )
        caption += "".join(dict.fromkeys(swept_note(swept(results["transfer"]), target, [method]) for target in shown))
        title = f"kinds-{method}" + (f"-{start // size + 1}" if len(targets) > size else "")
        yield Drawing("", title, caption, accuracies_by_kind(results, shown, method))


FIGURES = {"Transfer by kind of checkpoint": Section(("transfer",), _draw, optional=True)}
