"""Draws the report's figures: each function turns result rows into a `matplotlib.figure.Figure` one paper column wide.

`FIGURES` lists the sections of the page with figures. To add a figure, write a function and add it to `FIGURES`.
Figures of checkpoints that were given to the study are in `figures_by_name`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.figure import Figure

from jax_transfer.records import METRICS, InputError
from jax_transfer.report import best, tables
from jax_transfer.report.best import Point, best_of, trajectories
from jax_transfer.report.grid import swept, swept_note
from jax_transfer.report.style import (
    BLUE,
    GREY,
    METHOD_STYLES,
    ORANGE,
    OTHER_STYLES,
    PRETRAINING_STYLES,
    STYLE,
    WIDTH,
    cut,
    epoch_axis,
    legend_above,
    percent_axis,
)
from jax_transfer.report.tables import is_number
from jax_transfer.results import Row

MANY_POINTS = 30  # curves with more points have no markers, which would hide the line and its band


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure on the page, with the heading `group` ("" for none) and its file name without .svg."""

    group: str
    name: str
    caption: str
    figure: Figure


Results = Mapping[str, Sequence[Row]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page with figures.

    Attributes:
      needs: the result files that it needs.
      draw: draws its figures.
      for_trajectories, for_given: whether it shows epochs of the study's own pre-training, and given checkpoints.
      optional: whether the section is left out if there is nothing to draw.
    """

    needs: tuple[str, ...]
    draw: Callable[[Results], Iterator[Drawing]]
    for_trajectories: bool = True
    for_given: bool = True
    optional: bool = False


def style_of(method: str, others: Sequence[str]) -> tuple[str, str]:
    """Returns the colour and the marker of a method. others: the drawn methods that have no style of their own.

    >>> style_of("finetune", [])
    ('#D55E00', 'D')
    """
    return METHOD_STYLES.get(method) or OTHER_STYLES[others.index(method) % len(OTHER_STYLES)]


def plot_points(axes: matplotlib.axes.Axes, points: Mapping[float, Point], style: tuple[str, str], label: str) -> None:
    """Draws a line through the means, a band from minimum to maximum over seeds, and a star at the best point."""
    color, marker = style
    epochs, means = list(points), [100 * p.mean for p in points.values()]
    highest = best_of(points)
    if any(p.num_seeds > 1 for p in points.values()):
        lows, highs = [100 * p.low for p in points.values()], [100 * p.high for p in points.values()]
        axes.fill_between(epochs, lows, highs, color=color, alpha=0.2, linewidth=0)
    text = f"{label}, best {tables.percent(points[highest].mean)} at epoch {tables.epoch_name(highest)}"
    marker = marker if len(points) <= MANY_POINTS else ""
    axes.plot(epochs, means, color=color, marker=marker, label=text, clip_on=False)
    star = {"marker": "*", "markersize": 11, "markeredgecolor": "white", "markeredgewidth": 0.6}
    axes.plot([highest], [100 * points[highest].mean], color=color, linestyle="none", clip_on=False, zorder=5, **star)
    axes.axvline(highest, color=color, linewidth=0.7, linestyle=":", zorder=0)


def panels_of(series: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Groups the methods that share axes: all methods, unless one would span less than a quarter of the common axes.

    Accuracies of frozen features often span tens of points, but accuracies of fine-tuning only one point (Figure 2 of
    the paper). On common axes, the fine-tuning curve would look flat; on twin axes, readers may mistake the point where
    the curves cross for a result. In that case the FE methods share axes, and every other method has separate axes.

    >>> low, high, higher = (Point(mean, mean, mean, 1) for mean in (0.5, 0.97, 0.98))
    >>> panels_of({"probe": [low, high], "finetune": [high, higher]})
    [['probe'], ['finetune']]
    """
    frozen = [method for method in series if method.startswith("probe")]
    groups = [group for group in [frozen, *[[method] for method in series if method not in frozen]] if group]
    ranges = [(min(p.mean for m in g for p in series[m]), max(p.mean for m in g for p in series[m])) for g in groups]
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges)
    return [list(series)] if all(high - low >= whole / 4 for low, high in ranges) else groups


@matplotlib.rc_context(STYLE)
def transfer_curves(
    pretrain_rows: Sequence[Row], transfer_rows: Sequence[Row], target: str, source: str = ""
) -> Figure:
    """Draws the accuracy (%) of each method against pre-training epoch, and the source accuracy below.

    Follows Figures 1 to 3 of "Towards Inadequately Pre-trained Models". A star marks the best epoch of each method.

    Args:
      pretrain_rows: rows of results/pretrain.jsonl.
      transfer_rows: rows of results/transfer.jsonl.
      target: name of the target.
      source: the pre-training, if the study has several; see `best.source_of`.

    Raises:
      InputError: if no row evaluates the target.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": accuracy}
    ...         for epoch, accuracy in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> transfer_curves([], rows, "a").axes[0].get_legend().get_texts()[0].get_text()
    'FE, best 90.00\\xa0% at epoch 5'
    """
    transfer_rows, pretrain_rows = (trajectories(rows).get(source, []) for rows in (transfer_rows, pretrain_rows))
    series = {m: best.accuracy_by("epoch", transfer_rows, target, m) for m in best.methods_of(transfer_rows, target)}
    series = {method: points for method, points in series.items() if points}
    if not series:
        raise InputError(f"results/transfer.jsonl has no accuracy for target {target!r}; run stage probe or finetune.")
    accuracies = [
        (row["epoch"], 100 * row["test_accuracy"]) for row in pretrain_rows if is_number(row["test_accuracy"])
    ]
    panels = panels_of({method: list(points.values()) for method, points in series.items()})
    others = [method for method in series if method not in METHOD_STYLES]
    label = best.axis_label(best.metric_of(transfer_rows, target))
    # In inches, and tall enough for the label.
    heights = [max(1.25, 0.075 * len(label)) + 0.14 * len(panel) for panel in panels] + ([0.9] if accuracies else [])
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=False):
        for method in panel:
            plot_points(axes, series[method], style_of(method, others), cut(tables.method_name(method), 14))
        percent_axis(axes, label)
        legend_above(axes)
    if accuracies:
        all_axes[-1].plot(
            *zip(*sorted(accuracies), strict=True), color=GREY, label="Source test accuracy", clip_on=False
        )
        percent_axis(all_axes[-1], "Source (%)")
        legend_above(all_axes[-1])
    epochs = [epoch for points in series.values() for epoch in points] + [epoch for epoch, _ in accuracies]
    epoch_axis(all_axes[-1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(tables.short_target(target) + from_source(source), 38))
    return figure


@matplotlib.rc_context(STYLE)
def compared_trajectories(transfer_rows: Sequence[Row], target: str) -> Figure:
    """Draws the accuracy (%) against pre-training epoch with a line for each pre-training, and axes for each method.

    Follows Figure 7 of "Towards Inadequately Pre-trained Models", which compares self-supervised with supervised
    pre-training. A star marks the best epoch of each pre-training.

    Args:
      transfer_rows: rows of results/transfer.jsonl.
      target: name of the target.

    Raises:
      InputError: if no row evaluates an epoch of a pre-training on the target.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": f"{source}/{epoch}", "epoch": epoch, "accuracy": 0.8}
    ...         for epoch in (0, 5) for source in ("supervised", "moco_v2")]
    >>> [text.get_text() for text in compared_trajectories(rows, "a").axes[0].get_legend().get_texts()]
    ['supervised, best 80.00\\xa0% at epoch 0', 'moco_v2, best 80.00\\xa0% at epoch 0']
    """
    series: dict[str, dict[str, dict[float, Point]]] = {}  # method -> pre-training -> points
    for source, rows in trajectories(transfer_rows).items():
        for method in best.methods_of(rows, target):
            if points := best.accuracy_by("epoch", rows, target, method):
                series.setdefault(method, {})[source] = points
    if not series:
        raise InputError(f"results/transfer.jsonl has no accuracy for target {target!r}; run stage probe or finetune.")
    sources = list(dict.fromkeys(source for lines in series.values() for source in lines))
    metric = best.metric_of(transfer_rows, target)
    labels = [best.axis_label(metric, tables.method_name(method)) for method in series]
    heights = [max(1.25, 0.075 * len(label)) + 0.14 * len(sources) for label in labels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(series), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, label, lines in zip(all_axes, labels, series.values(), strict=True):
        for source, points in lines.items():
            style = PRETRAINING_STYLES[sources.index(source) % len(PRETRAINING_STYLES)]
            plot_points(axes, points, style, cut(source, 14))
        percent_axis(axes, label)
        legend_above(axes)
    epoch_axis(all_axes[-1], [epoch for lines in series.values() for points in lines.values() for epoch in points])
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(tables.short_target(target), 38))
    return figure


def from_source(source: str) -> str:
    """Returns the words that name the source in a title; "" if the study has only one source.

    >>> from_source("cifar10"), from_source("")
    (' from cifar10', '')
    """
    return f" from {source}" if source else ""


@matplotlib.rc_context(STYLE)
def source_accuracy(pretrain_rows: Sequence[Row], source: str = "") -> Figure:
    """Draws the training loss and the training and test accuracy (%) of pre-training against epoch.

    Args:
      pretrain_rows: rows of results/pretrain.jsonl.
      source: the pre-training, if the study has several; see `best.source_of`.

    Raises:
      InputError: if no row holds a loss or an accuracy.

    >>> row = {"checkpoint": "1", "epoch": 1, "train_loss": 0.5, "train_accuracy": 0.8, "test_accuracy": 0.7}
    >>> [axes.get_ylabel() for axes in source_accuracy([row]).axes]
    ['Train loss', 'Accuracy (%)']
    """
    curves = {  # column -> axes, scale, colour, marker, label
        "train_loss": (0, 1, ORANGE, "s", "Train"),
        "train_accuracy": (1, 100, ORANGE, "s", "Train"),
        "test_accuracy": (1, 100, BLUE, "o", "Test"),
    }
    points = {column: _points(pretrain_rows, source, column) for column in curves}
    epochs = [epoch for column in points.values() for epoch in column]
    if not epochs:
        raise InputError("results/pretrain.jsonl has no loss and no accuracy; run stage pretrain.")
    has_accuracies = bool(points["train_accuracy"] or points["test_accuracy"])
    figure = Figure(figsize=(WIDTH, 3.2 if has_accuracies else 1.7), layout="constrained")
    heights = (1, 1.4)[: 1 + has_accuracies]
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for column, (panel, scale, color, marker, label) in curves.items():
        if points[column]:
            marker = marker if len(points[column]) <= MANY_POINTS else ""
            x, y = list(points[column]), [scale * value for value in points[column].values()]
            all_axes[panel].plot(x, y, color=color, marker=marker, label=label, clip_on=False)
    all_axes[0].set_ylabel("Train loss")
    if has_accuracies:
        percent_axis(all_axes[1], "Accuracy (%)")
        legend_above(all_axes[1], columns=2)
    epoch_axis(all_axes[-1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle(_pretraining_title(source))
    return figure


def _points(pretrain_rows: Sequence[Row], source: str, column: str) -> dict[float, float]:
    """Returns the numbers in a column of a pre-training, in the order of its epochs: epoch -> number."""
    rows = sorted(trajectories(pretrain_rows).get(source, []), key=lambda row: row["epoch"])
    return {row["epoch"]: row[column] for row in rows if is_number(row.get(column))}


def _pretraining_title(source: str) -> str:
    return cut(f"Pre-training: {source}" if source else "Pre-training", 38)


# Column of results/pretrain.jsonl by which an epoch is judged without a head -> scale, label.
JUDGED = {
    "knn_accuracy": (100, "k-NN acc. (%)"),
    "effective_rank": (1, "Effective rank"),
    "alignment": (1, "Alignment"),
    "uniformity": (1, "Uniformity"),
}


@matplotlib.rc_context(STYLE)
def judged_epochs(pretrain_rows: Sequence[Row], source: str = "") -> Figure:
    """Draws the numbers by which epochs are judged without a head against epoch, each on its own axes.

    Args:
      pretrain_rows: rows of results/pretrain.jsonl.
      source: the pre-training, if the study has several; see `best.source_of`.

    Raises:
      InputError: if no row holds such a number.

    >>> row = {"checkpoint": "1", "epoch": 1, "knn_accuracy": 0.5, "effective_rank": 9.1}
    >>> [axes.get_ylabel() for axes in judged_epochs([row]).axes]
    ['k-NN acc. (%)', 'Effective rank']
    """
    points = {column: found for column in JUDGED if (found := _points(pretrain_rows, source, column))}
    if not points:
        raise InputError("results/pretrain.jsonl has no judged epoch; set config.pretrain.judged_images.")
    figure = Figure(figsize=(WIDTH, 0.5 + 0.9 * len(points)), layout="constrained")
    all_axes = figure.subplots(len(points), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (column, values) in zip(all_axes, points.items(), strict=True):
        scale, label = JUDGED[column]
        marker = "o" if len(values) <= MANY_POINTS else ""
        axes.plot(list(values), [scale * value for value in values.values()], color=BLUE, marker=marker, clip_on=False)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    epoch_axis(all_axes[-1], [epoch for values in points.values() for epoch in values])
    figure.align_ylabels(all_axes)
    figure.suptitle(_pretraining_title(source))
    return figure


def _draw_pretraining(results: Results) -> Iterator[Drawing]:
    rows = results["pretrain"]
    for source in trajectories(rows):
        of, end = source or "the source data", f"{source and '-'}{source}"
        if any(_points(rows, source, column) for column in ("train_loss", "train_accuracy", "test_accuracy")):
            caption = f"Loss and accuracy on {of}. Epoch 0 is random initialisation."
            yield Drawing("", f"source_accuracy{end}", caption, source_accuracy(rows, source))
        if any(_points(rows, source, column) for column in JUDGED):
            caption = (
                f"The features of test images of {of}: leave-one-out accuracy of 20 nearest neighbours; effective rank "
                "(RankMe); mean squared distance of two views of an image, with the augmentations of this "
                "pre-training (alignment: smaller is closer); "
                "and how evenly directions spread (uniformity: smaller is more even; near 0 all are the same)."
            )
            yield Drawing("", f"judged_epochs{end}", caption, judged_epochs(rows, source))


def _draw_transfer_curves(results: Results) -> Iterator[Drawing]:
    rows = results["transfer"]
    best_rows = best.best_checkpoints(rows)
    names = tables.target_names(row["target"] for row in best_rows)
    for target, metric in dict.fromkeys((row["target"], row["metric"]) for row in best_rows):
        if 1 < len({row["source"] for row in best_rows if row["target"] == target}) <= len(PRETRAINING_STYLES):
            caption = (
                f"{names[target]}: {METRICS[metric]} of each pre-training against its epoch. Stars and dotted lines "
                "mark the best epoch. Bands span all seeds."
            )
            yield Drawing("", f"compared_trajectories-{names[target]}", caption, compared_trajectories(rows, target))
    for target, source, metric in dict.fromkeys((row["target"], row["source"], row["metric"]) for row in best_rows):
        name = names[target] + from_source(source)
        caption = (
            f"{name}: {METRICS[metric]} against pre-training epoch. Stars and dotted lines mark the best epoch. Bands "
            f"span all seeds.{swept_note(swept(rows), target, best.methods_of(rows, target))}"
        )
        figure = transfer_curves(results.get("pretrain", []), rows, target, source)
        yield Drawing("", f"transfer_curves-{name}", caption, figure)


# Heading of a section of the page -> its figures.
FIGURES = {
    "Transfer along the trajectory": Section(("transfer",), _draw_transfer_curves, for_given=False),
    "Pre-training": Section(("pretrain",), _draw_pretraining, for_given=False),
}
