"""The report's figures: one function each, from result rows to a `matplotlib.figure.Figure` one paper column wide.

`FIGURES` says what the page shows: section title -> the results it needs, and the function that draws its
figures. A new figure is one function here and one line there.
"""

import dataclasses
import io
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from jax_transfer.records import InputError
from jax_transfer.report import tables
from jax_transfer.report.tables import Point, Row, is_number

MANY_POINTS = 30  # on a curve: from there on markers would hide the line and its band
WIDTH = 3.4  # inches: one column of a paper, and a telephone held upright

# Okabe and Ito's palette, which the colour-blind can tell apart; markers differ too, for print in grey.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#555555"
METHOD_STYLES = {"probe": (BLUE, "o"), "probe_converged": (SKY, "s"), "finetune": (VERMILION, "D")}
OTHER_STYLES = ((GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"))

STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,  # points; labels, ticks and legends follow
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "axes.ymargin": 0.1,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "legend.borderaxespad": 0.1,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.25,
    # Text stays text: it can be searched, a name in any script is drawn with the reader's fonts, and the page holds
    # no glyph outlines whose ids would collide.
    "svg.fonttype": "none",
    "svg.hashsalt": "jax_transfer",
    "text.parse_math": False,  # a dollar sign in a folder's name is no formula
}

# A rank correlation over fewer checkpoints says little: of k unrelated ones, Kendall's tau has the standard deviation
# sqrt(2 (2k + 5) / (9 k (k - 1))), 0.25 at k = 10 and 0.41 at k = 5, so that |tau| up to twice that is chance.
MIN_CHECKPOINTS = 10

SCORE_NAMES = {"logme": "LogME", "leep": "LEEP", "nce": "NCE", "nleep": "N-LEEP", "h_score": "H-score"}
SCORE_NAMES |= {"transrate": "TransRate", "mutual_information": "Mutual information"}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of the page: `group` is the heading it stands under ("" for none), `name` its file without .svg."""

    group: str
    name: str
    caption: str
    figure: Figure


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes for the same rows."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Layout measures with matplotlib's font; the reader's fonts draw the letters which that one lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def _cut(text: str, width: int) -> str:
    """At most `width` columns of text: the end goes first. Wide (East Asian) characters count twice."""
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    if sum(widths) <= width:
        return text
    return "".join(c for i, c in enumerate(text) if sum(widths[: i + 1]) < width) + "…"


def _style_of(method: str, others: Sequence[str]) -> tuple[str, str]:
    return METHOD_STYLES.get(method) or OTHER_STYLES[others.index(method) % len(OTHER_STYLES)]


def _is_geometric(epochs: Sequence[int]) -> bool:
    """Whether epochs thin out (1, 2, 5, 10, 20, ...): a linear axis would press the early ones together."""
    epochs = sorted(set(epochs))
    return len(epochs) > 3 and epochs[len(epochs) // 2] < epochs[-1] / 4


def _epoch_axis(axes: matplotlib.axes.Axes, epochs: Sequence[int]) -> None:
    axes.set_xlabel("Pre-training epoch")
    if _is_geometric(epochs):
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # symlog, since epoch 0 is there too
        ticks = [0] + [m * 10**e for e in range(6) for m in (1, 3)]
        axes.set_xticks([tick for tick in ticks if min(epochs) <= tick <= max(epochs)])
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(7, integer=True))
    if min(epochs) < max(epochs):
        axes.set_xlim(min(epochs), max(epochs))


def _percent_axis(axes: matplotlib.axes.Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def _legend_above(axes: matplotlib.axes.Axes, columns: int = 1) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)  # outside the axes: covers no data


def _plot_points(axes: matplotlib.axes.Axes, points: Sequence[Point], style: tuple[str, str], label: str) -> None:
    """A line through the means, a band from the lowest to the highest seed, and a star at the (first) best point."""
    color, marker = style
    epochs, means = [p.epoch for p in points], [100 * p.mean for p in points]
    best = max(points, key=lambda point: point.mean)
    if any(p.num_seeds > 1 for p in points):
        lows, highs = [100 * p.low for p in points], [100 * p.high for p in points]
        axes.fill_between(epochs, lows, highs, color=color, alpha=0.2, linewidth=0)
    text = f"{label}, best {tables.percent(best.mean)} at epoch {best.epoch}"
    marker = marker if len(points) <= MANY_POINTS else ""
    axes.plot(epochs, means, color=color, marker=marker, label=text, clip_on=False)
    star = {"marker": "*", "markersize": 11, "markeredgecolor": "white", "markeredgewidth": 0.6}
    axes.plot([best.epoch], [100 * best.mean], color=color, linestyle="none", clip_on=False, zorder=5, **star)
    axes.axvline(best.epoch, color=color, linewidth=0.7, linestyle=":", zorder=0)


def _panels(series: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Which methods share axes: all, unless one's range would be under a quarter of them; then FE apart from others.

    Frozen features range over tens of points where fine-tuning moves by one (papers' Figure 2): on common axes the
    second would be a flat line, and twin axes invite reading their crossing as a result.
    """
    frozen = [method for method in series if method.startswith("probe")]
    groups = [group for group in [frozen, *[[method] for method in series if method not in frozen]] if group]
    ranges = [(min(p.mean for m in g for p in series[m]), max(p.mean for m in g for p in series[m])) for g in groups]
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges)
    return [list(series)] if all(high - low >= whole / 4 for low, high in ranges) else groups


@matplotlib.rc_context(STYLE)
def transfer_curves(pretrain_rows: Sequence[Row], transfer_rows: Sequence[Row], target: str) -> Figure:
    """Accuracy (%) on a target against pre-training epoch, FE and FT, with the source accuracy below for comparison.

    Inadequately Pre-trained Models, Figures 1 to 3. The best epoch of each method has a star.

    Raises:
      InputError: if no row evaluates the target.
    """
    methods = tables.methods_of(transfer_rows, target)
    series = {m: list(tables.accuracy_by("epoch", transfer_rows, target, m).values()) for m in methods}
    series = {method: points for method, points in series.items() if points}
    if not series:
        raise InputError(f"results/transfer.jsonl has no accuracy for target {target!r}; run stage probe or finetune.")
    source = [(row["epoch"], 100 * row["test_accuracy"]) for row in pretrain_rows if is_number(row["test_accuracy"])]
    panels, others = _panels(series), [method for method in series if method not in METHOD_STYLES]
    heights = [1.25 + 0.14 * len(panel) for panel in panels] + ([0.9] if source else [])
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=False):
        for method in panel:
            label = _cut(tables.method_name(method), 14)
            _plot_points(axes, series[method], _style_of(method, others), label)
        _percent_axis(axes, "Accuracy (%)")
        _legend_above(axes)
    if source:
        all_axes[-1].plot(*zip(*sorted(source), strict=True), color=GREY, label="Source test accuracy", clip_on=False)
        _percent_axis(all_axes[-1], "Source (%)")
        _legend_above(all_axes[-1])
    epochs = [p.epoch for points in series.values() for p in points] + [epoch for epoch, _ in source]
    _epoch_axis(all_axes[-1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle(_cut(tables.short_target(target), 38))
    return figure


@matplotlib.rc_context(STYLE)
def source_accuracy(pretrain_rows: Sequence[Row]) -> Figure:
    """Pre-training itself: train loss, train and test accuracy (%) against epoch.

    Raises:
      InputError: if no row holds any of them.
    """
    curves = {  # column -> axes, scale, colour, marker, label
        "train_loss": (0, 1, ORANGE, "s", "Train"),
        "train_accuracy": (1, 100, ORANGE, "s", "Train"),
        "test_accuracy": (1, 100, BLUE, "o", "Test"),
    }
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    all_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    rows, epochs = sorted(pretrain_rows, key=lambda row: row["epoch"]), []
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
    _percent_axis(all_axes[1], "Accuracy (%)")
    if all_axes[1].lines:
        _legend_above(all_axes[1], columns=2)
    _epoch_axis(all_axes[1], epochs)
    figure.align_ylabels(all_axes)
    figure.suptitle("Pre-training on the source data")
    return figure


def _place_labels(axes: matplotlib.axes.Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Writes each text beside its point, on the first side that is free; with no free side the colour alone tells it.

    Sides are judged in points (1/72 inch) on axes of about 150 by 130, which is what WIDTH leaves them.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = [(150 * (x - left) / (right - left), 130 * (y - bottom) / (top - bottom)) for x, y in points]
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in places]
    for (x, y), (px, py), text in zip(points, places, texts, strict=True):
        width = 4.6 * len(text)
        for dx, dy, align in ((4, 3, "left"), (-4, 3, "right"), (4, -9, "left"), (-4, -9, "right")):
            start = px + dx - (width if align == "right" else 0)
            box = (start, py + dy, start + width, py + dy + 6)
            inside = box[0] > 0 and box[2] < 150 and box[1] > 0 and box[3] < 130
            if inside and all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
                axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=7)
                taken.append(box)
                break


def _score_points(score_rows, transfer_rows, target: str, score: str, method: str) -> list[tuple[float, Point]]:
    """(score, accuracy) of the checkpoints that have both, by epoch."""
    accuracies = tables.accuracy_by("checkpoint", transfer_rows, target, method)
    rows = [row for row in score_rows if row["target"] == target and row["score"] == score and is_number(row["value"])]
    points = [(row["value"], accuracies[row["checkpoint"]]) for row in rows if row["checkpoint"] in accuracies]
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
    """Each checkpoint's transferability score against its accuracy (%) by one method, coloured by epoch.

    Inadequately Pre-trained Models, Figure 6. Kendall's tau and Pearson's r in the title are those of the ranking
    rows. Below `MIN_CHECKPOINTS` checkpoints the figure says that these are too few. (Checkpoints of one
    trajectory resemble each other, so that even more of them are weaker evidence than their number suggests.)

    Raises:
      InputError: if no checkpoint has both the score and the accuracy.
    """
    points = _score_points(score_rows, transfer_rows, target, score, method)
    if not points:
        raise InputError(f"No checkpoint has both {score!r} and {method!r} accuracy on {target!r}; run stage scores.")
    epochs, values, means = zip(*[(p.epoch, value, 100 * p.mean) for value, p in points], strict=True)
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    lows, highs = [100 * p.low for _, p in points], [100 * p.high for _, p in points]
    axes.vlines(values, lows, highs, color=GREY, linewidth=0.6, zorder=1)  # lowest to highest seed
    span = {"vmin": min(epochs), "vmax": max(max(epochs), min(epochs) + 1)}
    norm = SymLogNorm(linthresh=1, linscale=0.4, **span) if _is_geometric(epochs) else Normalize(**span)
    colors = matplotlib.colormaps["viridis"].resampled(24)
    dots = axes.scatter(values, means, c=epochs, norm=norm, cmap=colors, s=18, edgecolors="black", linewidths=0.4)
    axes.margins(0.1)
    shown = sorted(range(len(points)), key=lambda i: (-means[i], -epochs[i]))  # the best is labelled before the rest
    _place_labels(axes, [(values[i], means[i]) for i in shown], [str(epochs[i]) for i in shown])
    bar = figure.colorbar(dots, ax=axes, label="Pre-training epoch", aspect=30, pad=0.02)
    ticks = []
    for epoch in sorted(set(epochs)):
        if not ticks or norm(epoch) - norm(ticks[-1]) > 0.08:
            ticks.append(epoch)
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()
    bar.solids.set(rasterized=False, edgecolor="face")  # steps of colour, not an embedded bitmap
    bar.outline.set_linewidth(0.5)
    name, label = SCORE_NAMES.get(score, tables.printable(score)), tables.method_name(method)
    axes.set_xlabel(_cut(name, 30))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_ylabel(f"{_cut(label, 14)} accuracy (%)")
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    figure.suptitle(_correlations(ranking_rows, target, score, method, len(points)))
    return figure


def _correlations(ranking_rows: Sequence[Row], target: str, score: str, method: str, num_points: int) -> str:
    """The title: target, tau and r of the ranking row, and a note if they rest on too few checkpoints."""
    key = (target, score, method)
    row = next((row for row in ranking_rows if (row["target"], row["score"], row["method"]) == key), {})
    tau, r = (f"{row[k]:.2f}" if is_number(row.get(k)) else tables.EN_DASH for k in ("kendall", "pearson"))
    num_checkpoints = row.get("num_checkpoints", num_points)
    note = f"\n{num_checkpoints} checkpoints: too few to trust" if num_checkpoints < MIN_CHECKPOINTS else ""
    return f"{_cut(tables.short_target(target), 38)}\nKendall's τ = {tau}, Pearson's r = {r}{note}"


Results = Mapping[str, Sequence[Row]]


def _draw_source_accuracy(results: Results) -> Iterator[Drawing]:
    columns = ("train_loss", "train_accuracy", "test_accuracy")
    if not any(is_number(row[column]) for row in results["pretrain"] for column in columns):
        return
    caption = "Loss and accuracy on the source data. Epoch 0 is random initialisation."
    yield Drawing("", "source_accuracy", caption, source_accuracy(results["pretrain"]))


def _draw_transfer_curves(results: Results) -> Iterator[Drawing]:
    rows = results["transfer"]
    for target, name in tables.target_names(row["target"] for row in tables.best_checkpoints(rows)).items():
        caption = f"{name}: accuracy against pre-training epoch. Stars and dotted lines: best epoch. Bands: all seeds."
        figure = transfer_curves(results.get("pretrain", []), rows, target)
        yield Drawing("", f"transfer_curves-{name}", caption, figure)


def _draw_scores(results: Results) -> Iterator[Drawing]:
    rows, scores = results["transfer"], results["scores"]
    pairs = dict.fromkeys((row["target"], row["score"]) for row in scores)
    names = tables.target_names(target for target, _ in pairs)
    for target, score in pairs:
        for method in tables.methods_of(rows, target):
            if not _score_points(scores, rows, target, score, method):
                continue  # the stages have not met at a checkpoint yet
            figure = score_against_accuracy(scores, rows, target, score, method, results.get("ranking", []))
            caption = f"{SCORE_NAMES.get(score, score)} against {tables.method_name(method)} accuracy, {names[target]}."
            yield Drawing(names[target], f"score-{names[target]}-{score}-{method}", caption, figure)


# Section of the page -> the result files it needs, and the function that draws its figures.
FIGURES = {
    "Transfer along the trajectory": (("transfer",), _draw_transfer_curves),
    "Pre-training": (("pretrain",), _draw_source_accuracy),
    "Scores against accuracy": (("scores", "transfer"), _draw_scores),
}
