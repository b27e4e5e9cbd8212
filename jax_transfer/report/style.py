"""What the report's figures have in common: one paper column wide, colours for everybody, text that stays text."""

import io
import unicodedata
import warnings
from collections.abc import Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes for the same rows."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Layout measures with matplotlib's font; the reader's fonts draw the letters which that one lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def cut(text: str, width: int) -> str:
    """At most `width` columns of text: the end goes first. Wide (East Asian) characters count twice."""
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    if sum(widths) <= width:
        return text
    return "".join(c for i, c in enumerate(text) if sum(widths[: i + 1]) < width) + "…"


def is_geometric(epochs: Sequence[int]) -> bool:
    """Whether epochs thin out (1, 2, 5, 10, 20, ...): a linear axis would press the early ones together."""
    epochs = sorted(set(epochs))
    return len(epochs) > 3 and epochs[len(epochs) // 2] < epochs[-1] / 4


def epoch_axis(axes: matplotlib.axes.Axes, epochs: Sequence[int]) -> None:
    axes.set_xlabel("Pre-training epoch")
    if is_geometric(epochs):
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # symlog, since epoch 0 is there too
        ticks = [0] + [m * 10**e for e in range(6) for m in (1, 3)]
        axes.set_xticks([tick for tick in ticks if min(epochs) <= tick <= max(epochs)])
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(7, integer=True))
    if min(epochs) < max(epochs):
        axes.set_xlim(min(epochs), max(epochs))


def percent_axis(axes: matplotlib.axes.Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def legend_above(axes: matplotlib.axes.Axes, columns: int = 1) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)  # outside the axes: covers no data


def place_labels(axes: matplotlib.axes.Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
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
