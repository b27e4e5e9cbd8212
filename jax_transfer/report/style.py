"""Shared style of the report's figures: one paper column wide, colour-blind-safe colours, searchable text."""

import io
import itertools
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.ticker
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 3.4  # inches: one column of a paper, or a phone in portrait mode

LONG_NAME = 22  # columns of text; longer names of checkpoints are cut in figures

# Okabe and Ito's palette, which colour-blind readers can tell apart. The markers also differ, for printing in grey.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, PURPLE, YELLOW, GREY = "#D55E00", "#CC79A7", "#F0E442", "#555555"
METHOD_STYLES = {"probe": (BLUE, "o"), "probe_converged": (SKY, "s"), "finetune": (VERMILION, "D")}
OTHER_STYLES = ((GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"))
PRETRAINING_STYLES = ((BLUE, "o"), (ORANGE, "D"), (GREEN, "^"), (PURPLE, "v"), (GREY, "P"))

STYLE: dict[Any, Any] = {  # Any, since only some versions of matplotlib have a type for the keys
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
    # Keep text as text, so that readers can search it, their fonts can draw names in any script, and the page contains
    # no glyph outlines whose ids would collide.
    "svg.fonttype": "none",
    "svg.hashsalt": "jax_transfer",
    "text.parse_math": False,  # so that a dollar sign in a folder's name does not start a formula
}


def to_svg(figure: Figure) -> str:
    """Returns the figure as an SVG document. The same result rows always give the same bytes.

    >>> to_svg(Figure(figsize=(1, 1))).startswith("<?xml")
    True
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The layout is computed with matplotlib's font; the reader's fonts draw any glyphs that it lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def cut(text: str, width: int) -> str:
    """Shortens a text so that it fits into `width` columns. Wide (East Asian) characters count twice.

    >>> cut("embedded:digits", 9)
    'embedded…'
    """
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    if sum(widths) <= width:
        return text
    return "".join(c for i, c in enumerate(text) if sum(widths[: i + 1]) < width) + "…"


def shorten(name: str, width: int = LONG_NAME) -> str:
    """Shortens the name of a checkpoint to `width` columns, but keeps its end, which often tells it from others.

    >>> shorten("first_run/checkpoints/5", 12)
    'first…ints/5'
    """
    if cut(name, width) == name:
        return name
    end = cut(name[::-1], width - width // 2 + 1)[-2::-1]  # without the ellipsis
    return cut(name, width // 2) + end


def shorten_all(names: Iterable[str], width: int = LONG_NAME) -> dict[str, str]:
    """Shortens names that are shown together, as `shorten` does, so that they stay distinct: name -> shown text.

    Where shortened names would be equal, what these names have in common is cut first: whole words at the ends, and if
    that is not enough, all whole words. Names that differ only within long words are numbered.

    >>> shorten_all(["mobilenet_v2", "random resnet10?width=4&stem=cifar", "random resnet18?width=4&stem=cifar"], 14)
    {'mobilenet_v2': 'mobilenet_v2', 'random resnet10?...': '…resnet10…', 'random resnet18?...': '…resnet18…'}
    """
    texts = {name: shorten(name, width) for name in names}
    by_text: dict[str, list[str]] = {}
    for name, text in texts.items():
        by_text.setdefault(text, []).append(name)
    alike = [group for group in by_text.values() if len(group) > 1]
    for groups in (alike, [list(itertools.chain(*alike))]) if alike else ():
        for cut_common in (cut_common_ends, _cut_common_words):
            changed = {n: shorten(text, width) for g in groups for n, text in zip(g, cut_common(g), strict=True)}
            if len(set((texts | changed).values())) == len(texts):
                return texts | changed
    if not alike:
        return texts
    marks = {name: f" #{number}" for number, name in enumerate(texts, 1)}
    return {name: shorten(name, width - len(mark)) + mark for name, mark in marks.items()}


def cut_common_ends(names: Sequence[str]) -> list[str]:
    """Replaces the words at the start and at the end that all names share; at least one word of each name stays.

    >>> cut_common_ends(["neucrab_group1/vae", "neucrab_group2/cifar10"])
    ['…group1/vae', '…group2/cifar10']
    """
    words = [_words(name) for name in names]
    shortest = min(map(len, words))
    start = min(_num_common(words), shortest - 1)
    end = min(_num_common([own[::-1] for own in words]), shortest - 1 - start)
    before, after = "…" * (start > 0), "…" * (end > 0)
    return [before + "".join(own[start : len(own) - end]) + after for own in words]


def _num_common(words: Sequence[list[str]]) -> int:
    """Counts the words with which all lists start."""
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))))


def _cut_common_words(names: Sequence[str]) -> list[str]:
    """Replaces all words that all names share."""
    words = [_words(name) for name in names]
    common = set(words[0]).intersection(*words)
    return [re.sub("…+", "…", "".join("…" if word in common else word for word in own)) for own in words]


def _words(name: str) -> list[str]:
    """Splits a name into its words and the characters between them."""
    return re.split(r"([ /?&=_-])", name)


def is_geometric(epochs: Sequence[float]) -> bool:
    """Returns whether the distances between epochs grow (1, 2, 5, 10, 20, ...), which suggests a logarithmic axis.

    >>> is_geometric([0, 1, 2, 5, 10, 20, 50]), is_geometric([10, 20, 30, 40])
    (True, False)
    """
    epochs = sorted(set(epochs))
    return len(epochs) > 3 and epochs[len(epochs) // 2] < epochs[-1] / 4


def epoch_axis(axes: matplotlib.axes.Axes, epochs: Sequence[float]) -> None:
    """Labels and scales the x-axis for pre-training epochs, with a logarithmic scale for geometric epochs.

    >>> axes = Figure().subplots()
    >>> epoch_axis(axes, [0, 1, 2, 5, 10, 20, 50])
    >>> axes.get_xscale(), axes.get_xlabel()
    ('symlog', 'Pre-training epoch')
    """
    axes.set_xlabel("Pre-training epoch")
    if is_geometric(epochs):
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # symlog because epoch 0 is included
        ticks = [0] + [m * 10**e for e in range(6) for m in (1, 3)]
        axes.set_xticks([tick for tick in ticks if min(epochs) <= tick <= max(epochs)])
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(7, integer=True))
    if min(epochs) < max(epochs):
        axes.set_xlim(min(epochs), max(epochs))


def percent_axis(axes: matplotlib.axes.Axes, label: str) -> None:
    """Labels the y-axis and limits it to 100 %.

    >>> axes = Figure().subplots()
    >>> _ = axes.plot([90, 100])
    >>> percent_axis(axes, "Accuracy (%)")
    >>> float(axes.get_ylim()[1])
    100.0
    """
    axes.set_ylabel(label)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def by_name(
    axes: matplotlib.axes.Axes,
    names: Sequence[str],
    series: Mapping[str, tuple[str, str, Mapping[str, tuple[float, float, float]]]],
    label: str,
) -> None:
    """Draws values as dots, with a line for each name, the first at the top, and a legend above.

    Args:
      axes: where to draw.
      names: the names in order, without duplicates; long ones are cut, see `shorten_all`.
      series: label -> (colour, marker, name -> (lowest, mean and highest value)).
      label: label of the values.

    >>> axes = Figure().subplots()
    >>> by_name(axes, ["a", "b"], {"FE": ("red", "o", {"b": (1.0, 2.0, 3.0)})}, "Accuracy (%)")
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['a', 'b']
    """
    height = {name: i for i, name in enumerate(names)}
    axes.hlines(list(height.values()), 0, 1, transform=axes.get_yaxis_transform(), color="#DDDDDD", linewidth=0.5)
    for text, (color, marker, values) in series.items():
        y, found = [height[name] for name in values], list(values.values())
        axes.hlines(y, [low for low, _, _ in found], [high for *_, high in found], color=color, linewidth=1.0)
        x = [mean for _, mean, _ in found]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linestyle="none", label=text)
    axes.set_yticks(list(height.values()), list(shorten_all(names).values()))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.margins(x=0.06)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=3)  # it may extend over the space of the names
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))


def legend_above(axes: matplotlib.axes.Axes, columns: int = 1) -> None:
    """Places the legend above the axes, where it covers no data.

    >>> axes = Figure().subplots()
    >>> _ = axes.plot([1, 2], label="FE")
    >>> legend_above(axes)
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['FE']
    """
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)


def place_labels(axes: matplotlib.axes.Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Labels each point on the first side that is free. A point with no free side gets no label.

    Distances are measured in points (1/72 inch), on axes of about 150 by 130 points, as in figures of width WIDTH.

    >>> axes = Figure().subplots()
    >>> place_labels(axes, [(0.5, 0.5), (0.5, 0.5)], ["first", "second"])
    >>> [text.get_text() for text in axes.texts]
    ['first', 'second']
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    positions = [(150 * (x - left) / (right - left), 130 * (y - bottom) / (top - bottom)) for x, y in points]
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in positions]
    for (x, y), (px, py), text in zip(points, positions, texts, strict=True):
        width = 4.6 * len(text)
        for dx, dy, align in ((4, 3, "left"), (-4, 3, "right"), (4, -9, "left"), (-4, -9, "right")):
            start = px + dx - (width if align == "right" else 0)
            box = (start, py + dy, start + width, py + dy + 6)
            inside = box[0] > 0 and box[2] < 150 and box[1] > 0 and box[3] < 130
            if inside and all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
                axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=7)
                taken.append(box)
                break
