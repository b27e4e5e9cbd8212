"""Draws spectral components, spectra, similarities and t-SNE.

Follows Figures 4 and 5 of "Towards Inadequately Pre-trained Models". Checkpoints of the study's own pre-training are
drawn against the epoch, and given checkpoints by name.
"""

from collections.abc import Iterable, Iterator, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from jax_transfer.records import InputError
from jax_transfer.report import best, tables
from jax_transfer.report.best import by_origin, is_given, label_of
from jax_transfer.report.figures import Drawing, Results, Section, from_source
from jax_transfer.report.spectral import STAGES, component_accuracies, select
from jax_transfer.report.style import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    WIDTH,
    by_name,
    cut,
    epoch_axis,
    legend_above,
    percent_axis,
    shorten_all,
)
from jax_transfer.report.tables import epoch_name
from jax_transfer.results import Row

LONG_TICK = 8  # names of checkpoints with more characters do not fit below a map of similarities
MANY_LINES = 6  # with more given checkpoints, the legend of the spectra names only the first and the last
COMPONENTS = {"full": (GREY, "s", "all"), "main": (ORANGE, "o", "main"), "residual": (BLUE, "D", "residual")}


@matplotlib.rc_context(STYLE)
def component_curves(spectral_rows: Sequence[Row], target: str, source: str = "") -> Figure:
    """Draws the accuracy (%) of probes on all features and on each component against pre-training epoch (Figure 5).

    Args:
      spectral_rows: rows of results/spectral.jsonl.
      target: name of the target.
      source: the pre-training, if the study has several; see `best.source_of`.

    Raises:
      InputError: if no component was evaluated on the target.

    >>> rows = [{"target": "tfds:mnist", "stage": "pretrained", "checkpoint": str(epoch), "epoch": epoch,
    ...          "component": component, "accuracy": 0.9 - epoch / 100} for epoch in (1, 5) for component in COMPONENTS]
    >>> component_curves(rows, "tfds:mnist").axes[0].get_ylabel()
    'FE accuracy (%)'
    """
    rows = by_origin(spectral_rows).get(source, [])
    stages = [stage for stage in STAGES if component_accuracies("epoch", rows, target, stage, "main")]
    if not stages:
        raise InputError(f"results/spectral.jsonl has no accuracy for target {target!r}; run stage spectral.")
    labels = [best.axis_label(best.metric_of(spectral_rows, target), STAGES[stage][0]) for stage in stages]
    height = max(1.6, 0.075 * len(labels[0]))  # in inches, and tall enough for the label
    figure = Figure(figsize=(WIDTH, 0.7 + height * len(stages)), layout="constrained")
    all_axes = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    epochs = set()
    for axes, stage, axis_label in zip(all_axes, stages, labels, strict=True):
        for component, (color, marker, label) in COMPONENTS.items():
            points = component_accuracies("epoch", rows, target, stage, component)
            values = [100 * accuracy for accuracy in points.values()]
            axes.plot(list(points), values, color=color, marker=marker, label=label, clip_on=False)
            epochs |= set(points)
        percent_axis(axes, axis_label)
    legend_above(all_axes[0], columns=3)
    epoch_axis(all_axes[-1], sorted(epochs))
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(tables.short_target(target) + from_source(source), 38))
    return figure


@matplotlib.rc_context(STYLE)
def components_by_name(spectral_rows: Sequence[Row], target: str) -> Figure:
    """Draws the accuracy (%) of probes on all features and on each component of each given checkpoint.

    The checkpoint with the most accurate main component is at the top of each panel.

    Raises:
      InputError: if no component of a given checkpoint was evaluated on the target.

    >>> rows = [{"target": "tfds:mnist", "stage": "pretrained", "checkpoint": name, "epoch": None,
    ...          "component": component, "accuracy": 0.9} for name in ("a", "run/b") for component in COMPONENTS]
    >>> [text.get_text() for text in components_by_name(rows, "tfds:mnist").axes[0].get_yticklabels()]
    ['a', 'run/b']
    """
    rows = by_origin(spectral_rows).get(None, [])
    stages = [stage for stage in STAGES if component_accuracies("checkpoint", rows, target, stage, "main")]
    if not stages:
        raise InputError(f"results/spectral.jsonl has no accuracy for target {target!r}; run stage spectral.")
    most = len(component_accuracies("checkpoint", rows, target, stages[0], "main"))
    figure = Figure(figsize=(WIDTH, 0.7 + (0.5 + 0.17 * most) * len(stages)), layout="constrained")
    all_axes = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
    for axes, stage in zip(all_axes, stages, strict=True):
        drawn, main = {}, component_accuracies("checkpoint", rows, target, stage, "main")
        for component, (color, marker, label) in COMPONENTS.items():
            values = component_accuracies("checkpoint", rows, target, stage, component)
            dots = {name: (100 * value,) * 3 for name, value in values.items() if name in main}
            drawn[label] = (color, marker, dots)
        label = best.axis_label(best.metric_of(rows, target), STAGES[stage][0])
        by_name(axes, sorted(main, key=lambda name, main=main: -main[name]), drawn, label)
    figure.suptitle(cut(tables.short_target(target), 38))
    return figure


@matplotlib.rc_context(STYLE)
def embeddings(embedding_rows: Sequence[Row], target: str, source: str | None = "") -> Figure:
    """Draws t-SNE of test images, coloured by class (Figure 4).

    The panels in the rows show the features before and after fine-tuning; each column shows one checkpoint. For given
    checkpoints, whose names need space, each row shows one checkpoint.

    Args:
      embedding_rows: rows of results/embedding.jsonl.
      target: name of the target.
      source: the pre-training, if the study has several, see `best.source_of`; None for the given checkpoints.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5}
    >>> embeddings([{**row, "x": [0.0, 1.0], "y": [1.0, 0.0], "labels": [0, 1]}], "a").axes[0].get_title()
    'epoch 5, before fine-tuning'
    """
    rows = by_origin(embedding_rows).get(source, [])
    panels = {(row["checkpoint"], stage): row for stage in STAGES for row in select(rows, target, stage)}
    names, stages = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    places = {(name, stage): (stages.index(stage), names.index(name)) for name, stage in panels}
    if source is None:
        places = {key: (column, row) for key, (row, column) in places.items()}
    num_lines, num_columns = (1 + max(place[i] for place in places.values()) for i in (0, 1))
    figure = Figure(figsize=(WIDTH, 0.45 + WIDTH / 2 * num_lines), dpi=200, layout="constrained")
    all_axes = figure.subplots(num_lines, max(num_columns, 2), squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    num_classes = 1 + max(max(row["labels"]) for row in panels.values())
    labels = _short_labels(panels.values())
    for key, row in panels.items():
        _draw_embedding(all_axes[places[key]], row, labels[row["checkpoint"]], num_classes)
    figure.suptitle(cut(tables.short_target(target) + from_source(source or ""), 38))
    return figure


def _draw_embedding(axes: matplotlib.axes.Axes, row: Row, label: str, num_classes: int) -> None:
    """Draws the images of one checkpoint, whose label is in the title, coloured by class."""
    axes.set_axis_on()
    labels = np.array(row["labels"])
    colors = matplotlib.colormaps["tab10" if num_classes <= 10 else "gist_rainbow"]
    shade = labels / 10 + 0.05 if num_classes <= 10 else labels / num_classes
    axes.scatter(row["x"], row["y"], c=colors(shade), s=1.5, linewidths=0, rasterized=True)
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)
    separator = "\n" if is_given(row) else ", "
    axes.set_title(f"{label}{separator}{STAGES[row['stage']][1]}", fontsize=7)


def _short_labels(rows: Iterable[Row]) -> dict[str, str]:
    """Returns checkpoint -> its epoch, whose source is in the title; or the shortened name of a given one."""
    rows = list(rows)
    names = shorten_all(label_of(row) for row in rows if is_given(row))
    return {
        row["checkpoint"]: names[label_of(row)] if is_given(row) else f"epoch {epoch_name(row['epoch'])}"
        for row in rows
    }


@matplotlib.rc_context(STYLE)
def spectra(spectrum_rows: Sequence[Row], target: str, stage: str, source: str | None = "") -> Figure:
    """Draws singular values as shares of their sum, one line per checkpoint. Below: the number of main directions.

    Args:
      spectrum_rows: rows of results/spectrum.jsonl.
      target: name of the target.
      stage: "pretrained" or "finetuned".
      source: the pre-training, if the study has several, see `best.source_of`; None for the given checkpoints.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5, "rank": 2, "effective_rank": 1.9}
    >>> len(spectra([{**row, "places": [1, 2, 3], "shares": [0.5, 0.3, 0.2]}], "a", "pretrained").axes)
    2
    """
    rows = select(by_origin(spectrum_rows).get(source, []), target, stage)
    heights = (2.25, 1.0 + 0.17 * len(rows) if source is None else 1.5)  # in inches
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.15), layout="constrained")
    curves, ranks = figure.subplots(2, 1, height_ratios=heights)
    colors, labels = matplotlib.colormaps["viridis"], _short_labels(rows)
    for i, row in enumerate(rows):
        named = i in (0, len(rows) - 1) or (source is None and len(rows) <= MANY_LINES)
        label = labels[row["checkpoint"]] if named else None
        shares = [100 * share for share in row["shares"]]
        curves.plot(row["places"], shares, color=colors(0.9 * i / max(len(rows) - 1, 1)), label=label)
    curves.set(xscale="log", yscale="log", xlabel="Singular value", ylabel="Share of the sum (%)")
    curves.set_ylim(bottom=max(curves.get_ylim()[0], 1e-4))  # smaller shares are only rounding errors
    for axis in (curves.xaxis, curves.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    legend_above(curves, 1 if source is None else 2)  # names need space
    measured = {"rank": (ORANGE, "o", "main: 80 % of the sum"), "effective_rank": (GREY, "s", "effective rank")}
    if source is None:
        dots = {
            label: (color, marker, {label_of(row): (row[column],) * 3 for row in rows})
            for column, (color, marker, label) in measured.items()
        }
        by_name(ranks, list(map(label_of, rows)), dots, "Directions")
    else:
        epochs = [row["epoch"] for row in rows]
        for column, (color, marker, label) in measured.items():
            ranks.plot(epochs, [row[column] for row in rows], color=color, marker=marker, label=label)
        ranks.set_ylabel("Directions")
        epoch_axis(ranks, epochs)
        legend_above(ranks, columns=2)
    figure.suptitle(f"{cut(tables.short_target(target), 38)}\n{STAGES[stage][1]}")
    return figure


@matplotlib.rc_context(STYLE)
def similarity_maps(similarity_rows: Sequence[Row], target: str, stage: str) -> Figure:
    """Draws CKA and the overlap of main subspaces between all pairs of checkpoints.

    Args:
      similarity_rows: rows of results/similarity.jsonl.
      target: name of the target.
      stage: "pretrained" or "finetuned".

    >>> rows = [{"target": "a", "stage": "pretrained", "checkpoint": i, "other": j, "cka": 1.0, "overlap": 1.0}
    ...         for i in "12" for j in "12"]
    >>> [axes.get_title() for axes in similarity_maps(rows, "a", "pretrained").axes[:2]]
    ['CKA', 'Overlap of main subspaces']
    """
    rows = select(similarity_rows, target, stage)
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True), ("cka", "overlap"), ("CKA", "Overlap of main subspaces"), strict=True
    ):
        grid = np.full((len(names), len(names)), np.nan)
        for row in rows:
            grid[names.index(row["checkpoint"]), names.index(row["other"])] = row[column]
        image = axes.pcolormesh(grid, vmin=0, vmax=1, cmap="viridis", rasterized=True)
        step = max(1, -(-len(names) // 8))
        ticks = range(0, len(names), step)
        texts = list(shorten_all(names, 12).values())[::step]
        longest = max(map(len, texts))
        below = texts if longest <= LONG_TICK else [""] * len(texts)
        axes.set_xticks([i + 0.5 for i in ticks], below, rotation=90 if longest > 3 else 0)
        axes.set_yticks([i + 0.5 for i in ticks], texts)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=7 if longest <= LONG_TICK else 6)
    figure.colorbar(image, ax=figure.axes, aspect=30, pad=0.02)
    figure.supxlabel("Checkpoint" if longest <= LONG_TICK else "The same checkpoints, in the same order", fontsize=8)
    figure.suptitle(f"{cut(tables.short_target(target), 38)}\n{STAGES[stage][1]}")
    return figure


def _draw(results: Results) -> Iterator[Drawing]:
    names = tables.target_names(row["target"] for row in results["spectral"])
    for target, name in names.items():
        own = {kind: [row for row in results.get(kind, []) if row["target"] == target] for kind in
               ("spectral", "embedding", "spectrum", "similarity")}  # fmt: skip
        for source, rows in by_origin(own["spectral"]).items():
            stem = "given" if source is None else source
            key = "checkpoint" if source is None else "epoch"
            if any(component_accuracies(key, rows, target, stage, "main") for stage in STAGES):
                caption = (
                    "Accuracy of probes on the spectral components of each batch of features. Main: the directions "
                    "that hold 80 % of the sum of the singular values."
                )
                figure = components_by_name(rows, target) if source is None else component_curves(rows, target, source)
                yield Drawing(name, f"components-{name}-{stem}", caption, figure)
            if any(select(by_origin(own["embedding"]).get(source, []), target, stage) for stage in STAGES):
                caption = (
                    "t-SNE of test images, one colour per class. Neighbourhoods are meaningful, but distances are not."
                )
                yield Drawing(name, f"tsne-{name}-{stem}", caption, embeddings(own["embedding"], target, source))
            for stage, (_, words) in STAGES.items():
                if select(by_origin(own["spectrum"]).get(source, []), target, stage):
                    caption = f"Spectrum of the training features {words}"
                    caption += "." if source is None else ", from the first checkpoint (dark) to the last."
                    figure = spectra(own["spectrum"], target, stage, source)
                    yield Drawing(name, f"spectrum-{name}-{stem}-{stage}", caption, figure)
        for stage, (_, words) in STAGES.items():
            if len(select(own["similarity"], target, stage)) > 1:
                caption = (
                    f"Similarity between the checkpoints' features of test images, {words}. 1 means equal up to "
                    "rotation and scale."
                )
                figure = similarity_maps(own["similarity"], target, stage)
                yield Drawing(name, f"similarity-{name}-{stage}", caption, figure)


FIGURES = {"Why it transfers: components, spectra, neighbourhoods": Section(("spectral",), _draw)}
