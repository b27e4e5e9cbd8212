"""Draws the report's figures: each function turns result rows into a `matplotlib.figure.Figure` one paper column wide.

`FIGURES` lists the figures on the page: section title -> the result files it needs, and the function that draws its
figures. To add a figure, write a function and add it to `FIGURES`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jax_transfer.analysis import MIN_CHECKPOINTS
from jax_transfer.records import METRICS, InputError
from jax_transfer.report import best, tables
from jax_transfer.report.best import Point, source_of, sources_of
from jax_transfer.report.style import (
    BLUE,
    GREY,
    METHOD_STYLES,
    ORANGE,
    OTHER_STYLES,
    STYLE,
    WIDTH,
    cut,
    epoch_axis,
    is_geometric,
    legend_above,
    percent_axis,
    place_labels,
)
from jax_transfer.report.tables import is_number
from jax_transfer.results import Row

MANY_POINTS = 30  # curves with more points have no markers, which would hide the line and its band
SOURCE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure on the page, with the heading `group` ("" for none) and its file name without .svg."""

    group: str
    name: str
    caption: str
    figure: Figure


def _style_of(method: str, others: Sequence[str]) -> tuple[str, str]:
    return METHOD_STYLES.get(method) or OTHER_STYLES[others.index(method) % len(OTHER_STYLES)]


def _plot_points(axes: matplotlib.axes.Axes, points: Sequence[Point], style: tuple[str, str], label: str) -> None:
    """Draws a line through the means, a band from minimum to maximum over seeds, and a star at the best point."""
    color, marker = style
    epochs, means = [p.epoch for p in points], [100 * p.mean for p in points]
    highest = best.best_point(points)
    if any(p.num_seeds > 1 for p in points):
        lows, highs = [100 * p.low for p in points], [100 * p.high for p in points]
        axes.fill_between(epochs, lows, highs, color=color, alpha=0.2, linewidth=0)
    text = f"{label}, best {tables.percent(highest.mean)} at epoch {highest.epoch}"
    marker = marker if len(points) <= MANY_POINTS else ""
    axes.plot(epochs, means, color=color, marker=marker, label=text, clip_on=False)
    star = {"marker": "*", "markersize": 11, "markeredgecolor": "white", "markeredgewidth": 0.6}
    axes.plot([highest.epoch], [100 * highest.mean], color=color, linestyle="none", clip_on=False, zorder=5, **star)
    axes.axvline(highest.epoch, color=color, linewidth=0.7, linestyle=":", zorder=0)


def _panels(series: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Groups the methods that share axes: all methods, unless one would span less than a quarter of the common axes.

    Accuracies of frozen features often span tens of points, but accuracies of fine-tuning only one point (Figure 2 of
    the paper). On common axes, the fine-tuning curve would look flat; on twin axes, readers may mistake the point where
    the curves cross for a result. In that case the FE methods share axes, and every other method has separate axes.
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
    transfer_rows, pretrain_rows = (
        [r for r in rows if source_of(r) == source] for rows in (transfer_rows, pretrain_rows)
    )
    methods = best.methods_of(transfer_rows, target)
    series = {m: list(best.accuracy_by("epoch", transfer_rows, target, m).values()) for m in methods}
    series = {method: points for method, points in series.items() if points}
    if not series:
        raise InputError(f"results/transfer.jsonl has no accuracy for target {target!r}; run stage probe or finetune.")
    accuracies = [
        (row["epoch"], 100 * row["test_accuracy"]) for row in pretrain_rows if is_number(row["test_accuracy"])
    ]
    panels, others = _panels(series), [method for method in series if method not in METHOD_STYLES]
    label = best.axis_label(best.metric_of(transfer_rows, target))
    # In inches, and tall enough for the label.
    heights = [max(1.25, 0.075 * len(label)) + 0.14 * len(panel) for panel in panels] + ([0.9] if accuracies else [])
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=False):
        for method in panel:
            _plot_points(axes, series[method], _style_of(method, others), cut(tables.method_name(method), 14))
        percent_axis(axes, label)
        legend_above(axes)
    if accuracies:
        all_axes[-1].plot(
            *zip(*sorted(accuracies), strict=True), color=GREY, label="Source test accuracy", clip_on=False
        )
        percent_axis(all_axes[-1], "Source (%)")
        legend_above(all_axes[-1])
    epochs = [p.epoch for points in series.values() for p in points] + [epoch for epoch, _ in accuracies]
    epoch_axis(all_axes[-1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(tables.short_target(target) + from_source(source), 38))
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
    ['Train loss (nats)', 'Accuracy (%)']
    """
    curves = {  # column -> axes, scale, colour, marker, label
        "train_loss": (0, 1, ORANGE, "s", "Train"),
        "train_accuracy": (1, 100, ORANGE, "s", "Train"),
        "test_accuracy": (1, 100, BLUE, "o", "Test"),
    }
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    all_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    rows = sorted((row for row in pretrain_rows if source_of(row) == source), key=lambda row: row["epoch"])
    epochs: list[int] = []
    for column, (panel, scale, color, marker, label) in curves.items():
        points = [(row["epoch"], scale * row[column]) for row in rows if is_number(row[column])]
        if points:
            x, y = zip(*points, strict=True)
            marker = marker if len(x) <= MANY_POINTS else ""
            all_axes[panel].plot(x, y, color=color, marker=marker, label=label, clip_on=False)
            epochs += x
    if not epochs:
        raise InputError("results/pretrain.jsonl has no loss and no accuracy; run stage pretrain.")
    all_axes[0].set_ylabel("Train loss (nats)")
    percent_axis(all_axes[1], "Accuracy (%)")
    if all_axes[1].lines:
        legend_above(all_axes[1], columns=2)
    epoch_axis(all_axes[1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(f"Pre-training: {source}" if source else "Pre-training", 38))
    return figure


def _score_points(score_rows, transfer_rows, target: str, score: str, method: str) -> list[tuple[float, Point, str]]:
    """Returns (score, accuracy, source) of each checkpoint with both a score and an accuracy, by ascending epoch."""
    accuracies = best.accuracy_by("checkpoint", transfer_rows, target, method)
    rows = [row for row in score_rows if row["target"] == target and row["score"] == score and is_number(row["value"])]
    points = [(r["value"], accuracies[r["checkpoint"]], source_of(r)) for r in rows if r["checkpoint"] in accuracies]
    return sorted(points, key=lambda pair: pair[1].epoch)


@matplotlib.rc_context(STYLE)
def score_against_accuracy(
    score_rows: Sequence[Row],
    transfer_rows: Sequence[Row],
    target: str,
    score: str,
    method: str,
    ranking_rows: Sequence[Row] = (),
) -> Figure:
    """Draws each checkpoint's transferability score against its accuracy (%) by one method, coloured by epoch.

    Follows Figure 6 of "Towards Inadequately Pre-trained Models". With fewer than `MIN_CHECKPOINTS` checkpoints, the
    title warns that these are too few. Checkpoints of one trajectory resemble each other, so even many of
    them are weaker evidence than their number suggests.

    Args:
      score_rows: rows of results/scores.jsonl.
      transfer_rows: rows of results/transfer.jsonl.
      target: name of the target.
      score: name of the score, such as "logme".
      method: name of the method, such as "finetune".
      ranking_rows: rows of results/ranking.jsonl, with Kendall's tau and Pearson's r for the title.

    Raises:
      InputError: if no checkpoint has both the score and the accuracy.

    >>> transfer = [{"target": "a", "method": "probe", "checkpoint": "5", "epoch": 5, "accuracy": 0.9}]
    >>> scores = [{"target": "a", "score": "logme", "checkpoint": "5", "value": 0.3}]
    >>> axes = score_against_accuracy(scores, transfer, "a", "logme", "probe").axes[0]
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('LogME', 'FE accuracy (%)')
    """
    points = _score_points(score_rows, transfer_rows, target, score, method)
    if not points:
        raise InputError(f"No checkpoint has both {score!r} and {method!r} accuracy on {target!r}; run stage scores.")
    epochs, values, means = zip(*[(p.epoch, value, 100 * p.mean) for value, p, _ in points], strict=True)
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    lows, highs = [100 * p.low for _, p, _ in points], [100 * p.high for _, p, _ in points]
    axes.vlines(values, lows, highs, color=GREY, linewidth=0.6, zorder=1)  # lowest to highest seed
    span = {"vmin": min(epochs), "vmax": max(max(epochs), min(epochs) + 1)}
    norm = SymLogNorm(linthresh=1, linscale=0.4, **span) if is_geometric(epochs) else Normalize(**span)
    colors = matplotlib.colormaps["viridis"].resampled(24)
    look = {"norm": norm, "cmap": colors, "s": 18, "edgecolors": "black", "linewidths": 0.4}
    markers = dict(zip(dict.fromkeys(source for *_, source in points), SOURCE_MARKERS * len(points), strict=False))
    for source, marker in markers.items():
        own = [i for i, point in enumerate(points) if point[2] == source]
        x, y, c = ([column[i] for i in own] for column in (values, means, epochs))
        dots = axes.scatter(x, y, c=c, marker=marker, **look)
    if len(markers) > 1:
        handles = [
            Line2D([], [], marker=m, label=cut(source, 14), color=GREY, linestyle="none")
            for source, m in markers.items()
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
    axes.margins(0.1)
    shown = sorted(range(len(points)), key=lambda i: (-means[i], -epochs[i]))  # best first
    place_labels(axes, [(values[i], means[i]) for i in shown], [str(epochs[i]) for i in shown])
    bar = figure.colorbar(dots, ax=axes, label="Pre-training epoch", aspect=30, pad=0.02)
    ticks = []
    for epoch in sorted(set(epochs)):
        if not ticks or norm(epoch) - norm(ticks[-1]) > 0.08:
            ticks.append(epoch)
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()
    assert bar.solids is not None  # the colour bar of a scatter plot is filled
    bar.solids.set(rasterized=False, edgecolor="face")  # drawn as vector shapes instead of an embedded bitmap
    bar.outline.set_linewidth(0.5)
    name, label = tables.score_name(score), tables.method_name(method)
    axes.set_xlabel(cut(name, 30))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_ylabel(best.axis_label(best.metric_of(transfer_rows, target), cut(label, 14)))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    figure.suptitle(_correlations(ranking_rows, target, score, method, len(points)))
    return figure


def _correlations(ranking_rows: Sequence[Row], target: str, score: str, method: str, num_points: int) -> str:
    """Returns the title: the target, tau and r from the ranking row, and a note if there are too few checkpoints."""
    key = (target, score, method)
    row = next((row for row in ranking_rows if (row["target"], row["score"], row["method"]) == key), {})
    tau, r = (f"{row[k]:.2f}" if is_number(row.get(k)) else tables.EN_DASH for k in ("kendall", "pearson"))
    num_checkpoints, num_scored = row.get("num_checkpoints", num_points), row.get("num_scored")
    ends = [row.get("kendall_low"), row.get("kendall_high")]
    interval = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if all(map(is_number, ends)) else ""
    note = f"\n{num_checkpoints} checkpoints: too few to trust" if num_checkpoints < MIN_CHECKPOINTS else ""
    if num_scored is not None and num_scored < num_checkpoints:
        note = f"\n{num_scored} of {num_checkpoints} scored"
    return f"{cut(tables.short_target(target), 38)}\nKendall's τ = {tau}{interval}, Pearson's r = {r}{note}"


Results = Mapping[str, Sequence[Row]]


def _draw_source_accuracy(results: Results) -> Iterator[Drawing]:
    columns = ("train_loss", "train_accuracy", "test_accuracy")
    if not any(is_number(row[column]) for row in results["pretrain"] for column in columns):
        return
    for source in sources_of(results["pretrain"]):
        caption = f"Loss and accuracy on {source or 'the source data'}. Epoch 0 is random initialisation."
        yield Drawing(
            "", f"source_accuracy{source and '-'}{source}", caption, source_accuracy(results["pretrain"], source)
        )


def _draw_transfer_curves(results: Results) -> Iterator[Drawing]:
    rows = results["transfer"]
    best_rows = best.best_checkpoints(rows)
    names = tables.target_names(row["target"] for row in best_rows)
    for target, source, metric in dict.fromkeys((row["target"], row["source"], row["metric"]) for row in best_rows):
        name = names[target] + from_source(source)
        caption = (
            f"{name}: {METRICS[metric]} against pre-training epoch. Stars and dotted lines mark the best epoch. Bands "
            "span all seeds."
        )
        figure = transfer_curves(results.get("pretrain", []), rows, target, source)
        yield Drawing("", f"transfer_curves-{name}", caption, figure)


def _draw_scores(results: Results) -> Iterator[Drawing]:
    rows, scores = results["transfer"], results["scores"]
    pairs = dict.fromkeys((row["target"], row["score"]) for row in scores)
    names = tables.target_names(target for target, _ in pairs)
    for target, score in pairs:
        metric = METRICS[best.metric_of(rows, target)]
        for method in best.methods_of(rows, target):
            if not _score_points(scores, rows, target, score, method):
                continue  # so far no checkpoint has both a score and an accuracy
            figure = score_against_accuracy(scores, rows, target, score, method, results.get("ranking", []))
            caption = f"{tables.score_name(score)} against {tables.method_name(method)} {metric}, {names[target]}."
            yield Drawing(names[target], f"score-{names[target]}-{score}-{method}", caption, figure)


# Section of the page -> the result files that it needs, and the function that draws its figures.
FIGURES = {
    "Transfer along the trajectory": (("transfer",), _draw_transfer_curves),
    "Pre-training": (("pretrain",), _draw_source_accuracy),
    "Scores against accuracy": (("scores", "transfer"), _draw_scores),
}
