"""Draws transferability scores against accuracies, as in Figure 6 of "Towards Inadequately Pre-trained Models"."""

import dataclasses
from collections.abc import Iterator, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jax_transfer.analysis import MIN_CHECKPOINTS
from jax_transfer.records import METRICS, InputError
from jax_transfer.report import best, tables
from jax_transfer.report.best import Point, is_given, label_of, source_of
from jax_transfer.report.figures import Drawing, Results, Section
from jax_transfer.report.grid import swept, swept_note
from jax_transfer.report.nleep_figure import draw_heat_maps
from jax_transfer.report.style import GREY, STYLE, VERMILION, WIDTH, cut, is_geometric, place_labels, shorten_all
from jax_transfer.report.tables import epoch_name, is_number
from jax_transfer.report.trust import ground_truth
from jax_transfer.results import Row

SOURCE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MANY_SCORES = 8  # with more, only the method by which scores are judged is drawn
NAME_WIDTH = 14  # columns of text for the name of a given checkpoint or a source


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A checkpoint with a score and an accuracy in [0, 1]; `epoch` is None if it was given to the study."""

    score: float
    accuracy: Point
    epoch: float | None
    source: str
    label: str


def _dots(score_rows, transfer_rows, target: str, score: str, method: str) -> list[_Dot]:
    """Returns the checkpoints with both a score and an accuracy, by ascending epoch, then the given ones."""
    accuracies = best.accuracy_by("checkpoint", transfer_rows, target, method)
    known = {row["checkpoint"]: row for row in transfer_rows}
    scores = {r["checkpoint"]: r["value"] for r in score_rows if (r["target"], r["score"]) == (target, score)}
    labels = shorten_all((label_of(known[name]) for name in accuracies if is_given(known[name])), NAME_WIDTH)
    dots = []
    for name, point in accuracies.items():
        if is_number(scores.get(name)):
            row, given = known[name], is_given(known[name])
            label = labels[label_of(row)] if given else epoch_name(row["epoch"])
            dots.append(_Dot(scores[name], point, row["epoch"], "" if given else source_of(row), label))
    return dots


@matplotlib.rc_context(STYLE)
def score_against_accuracy(
    score_rows: Sequence[Row],
    transfer_rows: Sequence[Row],
    target: str,
    score: str,
    method: str,
    ranking_rows: Sequence[Row] = (),
) -> Figure:
    """Draws each checkpoint's transferability score against its accuracy (%) by one method.

    Colours show the epoch of the study's own pre-training. Given checkpoints are hollow, with their names.
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
    dots = _dots(score_rows, transfer_rows, target, score, method)
    if not dots:
        raise InputError(f"No checkpoint has both {score!r} and {method!r} accuracy on {target!r}; run stage scores.")
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    lows, highs = [100 * dot.accuracy.low for dot in dots], [100 * dot.accuracy.high for dot in dots]
    axes.vlines(_places(dots)[0], lows, highs, color=GREY, linewidth=0.6, zorder=1)  # lowest to highest seed
    if given := [dot for dot in dots if dot.epoch is None]:
        axes.scatter(*_places(given), s=20, facecolors="none", edgecolors=VERMILION, linewidths=1.0)
    own = [dot for dot in dots if dot.epoch is not None]
    coloured = _scatter_by_epoch(axes, own) if own else None
    axes.margins(0.1)
    # The names of the given checkpoints first, then the best.
    shown = sorted(dots, key=lambda dot: (dot.epoch is not None, -dot.accuracy.mean, -(dot.epoch or 0)))
    place_labels(axes, list(zip(*_places(shown), strict=True)), [dot.label for dot in shown])
    if coloured:
        _epoch_bar(figure, axes, coloured, sorted({dot.epoch for dot in own if dot.epoch is not None}))
    name, label = tables.score_name(score), tables.method_name(method)
    axes.set_xlabel(cut(name, 30))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_ylabel(best.axis_label(best.metric_of(transfer_rows, target), cut(label, 14)))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    figure.suptitle(_correlations(ranking_rows, target, score, method, len(dots)))
    return figure


def _places(dots: Sequence[_Dot]) -> tuple[list[float], list[float]]:
    """Returns the scores and the accuracies (%)."""
    return [dot.score for dot in dots], [100 * dot.accuracy.mean for dot in dots]


def _scatter_by_epoch(axes: matplotlib.axes.Axes, dots: Sequence[_Dot]) -> PathCollection:
    """Draws the study's own checkpoints, coloured by epoch, with a marker for each pre-training if they are few."""
    epochs = [dot.epoch for dot in dots if dot.epoch is not None]
    first, last = min(epochs), max(max(epochs), min(epochs) + 1)
    is_log = is_geometric(epochs)
    norm = SymLogNorm(linthresh=1, linscale=0.4, vmin=first, vmax=last) if is_log else Normalize(first, last)
    colors = matplotlib.colormaps["viridis"].resampled(24)
    look = {"norm": norm, "cmap": colors, "s": 18, "edgecolors": "black", "linewidths": 0.4}
    sources = list(dict.fromkeys(dot.source for dot in dots))
    few = len(sources) <= len(SOURCE_MARKERS)  # a longer legend would leave no room for the dots
    markers = dict(zip(sources, SOURCE_MARKERS if few else SOURCE_MARKERS[:1] * len(sources), strict=False))
    for source, marker in markers.items():
        own = [dot for dot in dots if dot.source == source]
        drawn = axes.scatter(*_places(own), c=[dot.epoch or 0 for dot in own], marker=marker, **look)
    if len(markers) > 1 and few:
        labels = shorten_all(markers, NAME_WIDTH)
        handles = [
            Line2D([], [], marker=m, label=labels[source], color=GREY, linestyle="none")
            for source, m in markers.items()
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
    return drawn


def _epoch_bar(figure: Figure, axes: matplotlib.axes.Axes, dots: PathCollection, epochs: Sequence[float]) -> None:
    """Draws the bar that explains the colours, with as many epochs as fit."""
    bar = figure.colorbar(dots, ax=axes, label="Pre-training epoch", aspect=30, pad=0.02)
    ticks, places = [], np.asarray(dots.norm(np.asarray(epochs, float)))
    for epoch, place in zip(epochs, places, strict=True):
        if not ticks or place - ticks[-1][1] > 0.08:
            ticks.append((epoch, place))
    bar.set_ticks([epoch for epoch, _ in ticks], labels=[epoch_name(epoch) for epoch, _ in ticks])
    bar.minorticks_off()
    assert bar.solids is not None  # the colour bar of a scatter plot is filled
    bar.solids.set(rasterized=False, edgecolor="face")  # drawn as vector shapes instead of an embedded bitmap
    bar.outline.set_linewidth(0.5)


def _correlations(ranking_rows: Sequence[Row], target: str, score: str, method: str, num_points: int) -> str:
    """Returns the title: the target, tau and r from the ranking row, and a note if there are too few checkpoints."""
    key = (target, score, method)
    row = next((row for row in ranking_rows if (row["target"], row["score"], row["method"]) == key), {})
    tau, r = (f"{row[k]:.2f}" if is_number(row.get(k)) else tables.EN_DASH for k in ("kendall", "pearson"))
    num_checkpoints, num_scored = row.get("num_checkpoints", num_points), row.get("num_scored")
    ends = [row.get("kendall_low"), row.get("kendall_high")]
    interval = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if all(map(is_number, ends)) else ""
    note = (
        f"\n{tables.counted(num_checkpoints, 'checkpoint')}: too few to trust"
        if num_checkpoints < MIN_CHECKPOINTS
        else ""
    )
    if num_scored is not None and num_scored < num_checkpoints:
        note = f"\n{num_scored} of {num_checkpoints} scored"
    return f"{cut(tables.short_target(target), 38)}\nKendall's τ = {tau}{interval}, Pearson's r = {r}{note}"


def _draw_scores(results: Results) -> Iterator[Drawing]:
    rows = results["transfer"]
    # Variants of a score have a figure together; lists that need no data of a target are in the table.
    scores = [row for row in results["scores"] if "?" not in row["score"] and row["score"] not in tables.NAIVE_LISTS]
    pairs = dict.fromkeys((row["target"], row["score"]) for row in scores)
    judged = ground_truth(rows)
    is_long = len({score for _, score in pairs}) > MANY_SCORES
    names = tables.target_names(target for target, _ in pairs)
    for target, score in pairs:
        metric = METRICS[best.metric_of(rows, target)]
        for method in best.methods_of(rows, target):
            if is_long and method != judged:
                continue
            if not _dots(scores, rows, target, score, method):
                continue  # so far no checkpoint has both a score and an accuracy
            figure = score_against_accuracy(scores, rows, target, score, method, results.get("ranking", []))
            caption = f"{tables.score_name(score)} against {tables.method_name(method)} {metric}, {names[target]}."
            caption += swept_note(swept(rows), target, [method])
            yield Drawing(names[target], f"score-{names[target]}-{score}-{method}", caption, figure)


FIGURES = {
    "Scores against accuracy": Section(("scores", "transfer"), _draw_scores),
    "Settings of N-LEEP": Section(("ranking",), draw_heat_maps, optional=True),
}
