"""Explains why a checkpoint transfers, with spectral components, spectra, similarities and t-SNE.

Reproduces Figures 4 and 5 and Table 1 of "Towards Inadequately Pre-trained Models" for any study.
"""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from jax_transfer.analysis import MIN_CHECKPOINTS, kendall
from jax_transfer.records import METRICS, InputError
from jax_transfer.report import best, tables
from jax_transfer.report.best import Point, source_of, sources_of, value
from jax_transfer.report.figures import Drawing, from_source
from jax_transfer.report.style import BLUE, GREY, ORANGE, STYLE, WIDTH, cut, epoch_axis, legend_above, percent_axis
from jax_transfer.report.tables import is_number, percent
from jax_transfer.results import Row

# State of the model that computes the features -> its abbreviation in the papers, and its description in a title.
STAGES = {"pretrained": ("FE", "before fine-tuning"), "finetuned": ("FT", "after fine-tuning")}
COMPONENTS = {"full": (GREY, "s", "all"), "main": (ORANGE, "o", "main"), "residual": (BLUE, "D", "residual")}
# State of the model -> method whose accuracy its components should explain.
METHOD_OF = {"pretrained": "probe", "finetuned": "finetune"}


def _select(rows: Sequence[Row], target: str, stage: str, source: str | None = None) -> list[Row]:
    """Selects the rows without errors for a target, a stage and, if given, a source, by ascending epoch."""
    selected = [row for row in rows if (row["target"], row["stage"]) == (target, stage) and not row.get("error")]
    selected = [row for row in selected if source is None or source_of(row) == source]
    return sorted(selected, key=lambda row: row.get("epoch", 0))


def _accuracies(rows: Sequence[Row], target: str, stage: str, source: str, component: str) -> dict[int, float]:
    """Returns epoch -> accuracy of the probe on a component."""
    selected = _select(rows, target, stage, source)
    measured = ((row["epoch"], value(row)) for row in selected if row["component"] == component)
    return {epoch: accuracy for epoch, accuracy in measured if is_number(accuracy)}


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
    stages = [stage for stage in STAGES if _accuracies(spectral_rows, target, stage, source, "main")]
    if not stages:
        raise InputError(f"results/spectral.jsonl has no accuracy for target {target!r}; run stage spectral.")
    labels = [best.axis_label(best.metric_of(spectral_rows, target), STAGES[stage][0]) for stage in stages]
    height = max(1.6, 0.075 * len(labels[0]))  # in inches, and tall enough for the label
    figure = Figure(figsize=(WIDTH, 0.7 + height * len(stages)), layout="constrained")
    all_axes = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    epochs = set()
    for axes, stage, axis_label in zip(all_axes, stages, labels, strict=True):
        for component, (color, marker, label) in COMPONENTS.items():
            points = _accuracies(spectral_rows, target, stage, source, component)
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
def embeddings(embedding_rows: Sequence[Row], target: str, source: str = "") -> Figure:
    """Draws t-SNE of test images, coloured by class (Figure 4).

    The panels in the rows show the features before and after fine-tuning; each column shows one checkpoint.

    Args:
      embedding_rows: rows of results/embedding.jsonl.
      target: name of the target.
      source: the pre-training, if the study has several; see `best.source_of`.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5}
    >>> embeddings([{**row, "x": [0.0, 1.0], "y": [1.0, 0.0], "labels": [0, 1]}], "a").axes[0].get_title()
    'epoch 5, before fine-tuning'
    """
    stages = [stage for stage in STAGES if _select(embedding_rows, target, stage, source)]
    epochs = sorted({row["epoch"] for stage in stages for row in _select(embedding_rows, target, stage, source)})
    figure = Figure(figsize=(WIDTH, 0.45 + WIDTH / 2 * len(stages)), dpi=200, layout="constrained")
    all_axes = figure.subplots(len(stages), max(len(epochs), 2), squeeze=False)
    num_classes = 1 + max(
        max(row["labels"]) for stage in stages for row in _select(embedding_rows, target, stage, source)
    )
    colors = matplotlib.colormaps["tab10" if num_classes <= 10 else "gist_rainbow"]
    for axes in all_axes.flat:
        axes.set_axis_off()
    for line, stage in zip(all_axes, stages, strict=True):
        for row in _select(embedding_rows, target, stage, source):
            axes = line[epochs.index(row["epoch"])]
            axes.set_axis_on()
            labels = np.array(row["labels"])
            shade = labels / 10 + 0.05 if num_classes <= 10 else labels / num_classes
            axes.scatter(row["x"], row["y"], c=colors(shade), s=1.5, linewidths=0, rasterized=True)
            axes.set(xticks=[], yticks=[])
            axes.spines[["top", "right"]].set_visible(True)
            axes.set_title(f"epoch {row['epoch']}, {STAGES[stage][1]}", fontsize=7)
    figure.suptitle(cut(tables.short_target(target) + from_source(source), 38))
    return figure


@matplotlib.rc_context(STYLE)
def spectra(spectrum_rows: Sequence[Row], target: str, stage: str, source: str = "") -> Figure:
    """Draws singular values as shares of their sum, one line per checkpoint. Below: the number of main directions.

    Args:
      spectrum_rows: rows of results/spectrum.jsonl.
      target: name of the target.
      stage: "pretrained" or "finetuned".
      source: the pre-training, if the study has several; see `best.source_of`.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5, "rank": 2, "effective_rank": 1.9}
    >>> len(spectra([{**row, "places": [1, 2, 3], "shares": [0.5, 0.3, 0.2]}], "a", "pretrained").axes)
    2
    """
    rows = _select(spectrum_rows, target, stage, source)
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    curves, ranks = figure.subplots(2, 1, height_ratios=(1.5, 1))
    colors = matplotlib.colormaps["viridis"]
    for i, row in enumerate(rows):
        first_or_last = f"epoch {row['epoch']}" if i in (0, len(rows) - 1) else None
        shares = [100 * share for share in row["shares"]]
        curves.plot(row["places"], shares, color=colors(0.9 * i / max(len(rows) - 1, 1)), label=first_or_last)
    curves.set(xscale="log", yscale="log", xlabel="Singular value", ylabel="Share of the sum (%)")
    curves.set_ylim(bottom=max(curves.get_ylim()[0], 1e-4))  # smaller shares are only rounding errors
    for axis in (curves.xaxis, curves.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    legend_above(curves, columns=2)
    epochs = [row["epoch"] for row in rows]
    ranks.plot(epochs, [row["rank"] for row in rows], color=ORANGE, marker="o", label="main: 80 % of the sum")
    ranks.plot(epochs, [row["effective_rank"] for row in rows], color=GREY, marker="s", label="effective rank")
    ranks.set_ylabel("Directions")
    legend_above(ranks, columns=2)
    epoch_axis(ranks, epochs)
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
    rows = _select(similarity_rows, target, stage)
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
        axes.set_xticks([i + 0.5 for i in ticks], [names[i] for i in ticks], rotation=90 if len(names[-1]) > 3 else 0)
        axes.set_yticks([i + 0.5 for i in ticks], [names[i] for i in ticks])
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=7)
    figure.colorbar(image, ax=figure.axes, aspect=30, pad=0.02)
    figure.supxlabel("Checkpoint", fontsize=8)
    figure.suptitle(f"{cut(tables.short_target(target), 38)}\n{STAGES[stage][1]}")
    return figure


Results = Mapping[str, Sequence[Row]]


def _draw(results: Results) -> Iterator[Drawing]:
    names = tables.target_names(row["target"] for row in results["spectral"])
    for target, name in names.items():
        own = {kind: [row for row in results.get(kind, []) if row["target"] == target] for kind in
               ("spectral", "embedding", "spectrum", "similarity")}  # fmt: skip
        for source in sources_of(own["spectral"]):
            if any(_accuracies(own["spectral"], target, stage, source, "main") for stage in STAGES):
                caption = (
                    "Accuracy of probes on the spectral components of each batch of features. Main: the directions "
                    "that hold 80 % of the sum of the singular values."
                )
                figure = component_curves(own["spectral"], target, source)
                yield Drawing(name, f"components-{name}-{source}", caption, figure)
            if any(source_of(row) == source for row in own["embedding"]):
                caption = (
                    "t-SNE of test images, one colour per class. Neighbourhoods are meaningful, but distances are not."
                )
                yield Drawing(name, f"tsne-{name}-{source}", caption, embeddings(own["embedding"], target, source))
            for stage, (_, words) in STAGES.items():
                if _select(own["spectrum"], target, stage, source):
                    caption = (
                        f"Spectrum of the training features {words}, from the first checkpoint (dark) to the last."
                    )
                    figure = spectra(own["spectrum"], target, stage, source)
                    yield Drawing(name, f"spectrum-{name}-{source}-{stage}", caption, figure)
        for stage, (_, words) in STAGES.items():
            if len(_select(own["similarity"], target, stage)) > 1:
                caption = (
                    f"Similarity between the checkpoints' features of test images, {words}. 1 means equal up to "
                    "rotation and scale."
                )
                figure = similarity_maps(own["similarity"], target, stage)
                yield Drawing(name, f"similarity-{name}-{stage}", caption, figure)


FIGURES = {"Why it transfers: components, spectra, neighbourhoods": (("spectral",), _draw)}


def _method_points(results: Results, target: str, method: str, source: str) -> dict[int, Point]:
    """Returns epoch -> mean accuracy of an evaluation protocol, with the range over seeds."""
    own = [row for row in results.get("transfer", []) if source_of(row) == source]
    return best.accuracy_by("epoch", own, target, method)


def _method_accuracies(results: Results, target: str, method: str, source: str) -> dict[int, float]:
    """Returns epoch -> accuracy of an evaluation protocol, averaged over seeds."""
    return _means(_method_points(results, target, method, source))


def _means(points: dict[int, Point]) -> dict[int, float]:
    return {epoch: point.mean for epoch, point in points.items()}


def shown_epochs(results: Results, target: str, source: str) -> list[int]:
    """Returns the epochs in Table 1 and Figure 4: the best frozen feature extractor and the last epoch.

    If the probe stage has not run, the best epoch is the one with the highest accuracy of the spectral stage's probe on
    all features.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": accuracy}
    ...         for epoch, accuracy in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> shown_epochs({"transfer": rows}, "a", "")
    [5, 9]
    """
    points = list(_method_points(results, target, "probe", source).values())
    if not points:
        full = _accuracies(results.get("spectral", []), target, "pretrained", source, "full")
        points = [Point(epoch, accuracy, accuracy, accuracy, 1) for epoch, accuracy in full.items()]
    return sorted({best.best_point(points).epoch, max(point.epoch for point in points)}) if points else []


def _groups(results: Results) -> Iterator[tuple[str, str]]:
    """Yields each (target, source) that has spectral rows."""
    yield from dict.fromkeys((row["target"], source_of(row)) for row in results.get("spectral", []))


def table_1(results: Results) -> list[Row]:
    """Formats the rows of Table 1: column title -> text.

    For each target and source, there is a row for the best FE checkpoint and a row for the last checkpoint.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5, "rank": 3.0, "accuracy": 0.9}
    >>> (cells,) = table_1({"spectral": [{**row, "component": component} for component in COMPONENTS]})
    >>> cells["Epoch"], cells["Rank of main"]
    (5, '3 of 3')
    """
    rows, table = results.get("spectral", []), []
    names, several = tables.target_names(row["target"] for row in rows), len(sources_of(rows)) > 1
    metrics = {target: best.metric_of(rows, target) for target in names}
    title = best.heading(metrics.values())
    trained = {row["checkpoint"]: row["test_accuracy"] for row in results.get("pretrain", [])}
    for target, source in _groups(results):
        parts = {(s, c): _accuracies(rows, target, s, source, c) for s in STAGES for c in COMPONENTS}
        shown = set(shown_epochs(results, target, source))
        for stage, (task, _) in STAGES.items():
            accuracy = _method_accuracies(results, target, METHOD_OF[stage], source)
            ranks = {(row["epoch"], row["component"]): row["rank"] for row in _select(rows, target, stage, source)}
            for epoch in sorted(shown & set(parts[stage, "main"])):
                table.append({
                    "Target": names[target],
                    **({"Source": source} if several else {}),
                    "Task": task,
                    **best.metric_cell(metrics.values(), metrics[target]),
                    "Epoch": epoch,
                    "Source accuracy": percent(trained.get(f"{source}/{epoch}" if source else str(epoch))),
                    title: percent(accuracy.get(epoch)),
                    **{f"Probe, {name}": percent(parts[stage, c].get(epoch)) for c, (_, _, name) in COMPONENTS.items()},
                    "Rank of main": f"{ranks[epoch, 'main']:.0f} of {ranks[epoch, 'full']:.0f}",
                })  # fmt: skip
    return table


def story(results: Results) -> Iterator[tuple[str, str]]:
    """Yields (name, sentences) for each target: how its accuracies relate to those of probes on spectral components.

    >>> epochs = (1, 5, 9)
    >>> accuracy = {"main": (0.5, 0.8, 0.6), "residual": (0.3, 0.4, 0.5)}
    >>> row = {"target": "tfds:mnist", "stage": "pretrained"}
    >>> spectral = [{**row, "checkpoint": str(e), "epoch": e, "component": c, "accuracy": accuracy[c][i]}
    ...             for i, e in enumerate(epochs) for c in accuracy]
    >>> transfer = [{**row, "method": "probe", "checkpoint": str(e), "epoch": e, "accuracy": accuracy["main"][i]}
    ...             for i, e in enumerate(epochs)]
    >>> for name, sentences in story({"spectral": spectral, "transfer": transfer}):
    ...     print(f"{name}: {sentences}")
    mnist: FE accuracy is highest at epoch 5 ... it follows the main component ...
    """
    rows = results.get("spectral", [])
    names = tables.target_names(row["target"] for row in rows)
    for target, source in _groups(results):
        sentences, metric = [], METRICS[best.metric_of(rows, target)]
        for stage, (task, _) in STAGES.items():
            points = _method_points(results, target, METHOD_OF[stage], source)
            # Also used for FT, because the features before fine-tuning show what pre-training contributes.
            parts = {c: _accuracies(rows, target, "pretrained", source, c) for c in ("main", "residual")}
            epochs = sorted(set(points) & set(parts["main"]) & set(parts["residual"]))
            if len(epochs) < 3:
                continue
            sentences.append(_compare_with_components(f"{task} {metric}", epochs, points, parts))
        if sentences:
            yield names[target] + from_source(source), " ".join(sentences)


def _compare_with_components(accuracy_name: str, epochs: list[int], points: dict[int, Point], parts: dict) -> str:
    """Describes which component a protocol's accuracies follow over `epochs`, at which all were measured."""
    highest, last, accuracy = best.best_point(points.values()).epoch, max(points), _means(points)
    taus = {c: kendall([part[e] for e in epochs], [accuracy[e] for e in epochs]) for c, part in parts.items()}
    text = f"{accuracy_name} is highest at epoch {highest} ({percent(accuracy[highest])})"
    if highest != last:
        text += f" and {100 * (accuracy[highest] - accuracy[last]):.2f} points lower at the last epoch, {last}"
    if highest != last and {highest, last} <= set(epochs):
        change = {c: 100 * (part[last] - part[highest]) for c, part in parts.items()}
        text += ". Between these epochs, the accuracy of a probe on the main component changes by "
        text += f"{change['main']:+.2f} points and on the residual component by {change['residual']:+.2f}"
    formatted = {c: f"Kendall's \N{GREEK SMALL LETTER TAU} {tau:.2f}" for c, tau in taus.items() if is_number(tau)}
    if len(formatted) < 2:
        return f"{text}."
    closer, other = sorted(taus, key=taus.__getitem__, reverse=True)
    if taus[closer] <= 0:
        text += (
            f". Across epochs it follows neither component (main {formatted['main']}, residual {formatted['residual']})"
        )
    elif taus[closer] == taus[other]:
        text += f". Across epochs it follows both components equally ({formatted['main']})"
    else:
        text += (
            f". Across epochs it follows the {closer} component ({formatted[closer]}) rather than the {other} component"
        )
        text += f" ({formatted[other]})"
    few = f", but {len(epochs)} checkpoints are too few to be sure" if len(epochs) < MIN_CHECKPOINTS else ""
    return f"{text}{few}."


def paper_rows(results: Results, paper: Sequence[Row]) -> list[Row]:
    """Formats the paper's numbers, which the config lists, beside ours: column title -> text.

    Args:
      results: result file -> its rows.
      paper: `config.paper`. Each entry holds "target", "epoch" (ours), "what" ("source", "FE", "FT", "FE main",
        "FE residual", "FT main" or "FT residual"), "accuracy" (theirs) and "where" (where the paper reports it).

    >>> entry = {"target": "", "epoch": 5, "what": "source", "accuracy": 0.7024, "where": "Table 1"}
    >>> (row,) = paper_rows({"pretrain": [{"epoch": 5, "test_accuracy": 0.5}]}, [entry])
    >>> row["Paper"], row["Ours"]
    ('70.24\\xa0%', '50.00\\xa0%')
    """
    rows = results.get("transfer", [])
    names = tables.target_names(row["target"] for row in rows)
    metrics = [best.metric_of(rows, entry["target"]) for entry in paper]
    return [
        {
            "Target": names.get(entry["target"], tables.short_target(entry["target"])) if entry["target"] else "source",
            "What": entry["what"],
            **best.metric_cell([*metrics, best.DEFAULT], metric),
            "In the paper": entry["where"],
            "Paper": percent(entry["accuracy"]),
            "Ours, epoch": entry["epoch"],
            "Ours": percent(_ours(results, entry["target"], entry["what"], entry["epoch"])),
        }
        for entry, metric in zip(paper, metrics, strict=True)
    ]


def _ours(results: Results, target: str, what: str, epoch: int) -> float | None:
    """Returns our accuracy for an entry of `config.paper`."""
    if what == "source":
        return {row["epoch"]: row["test_accuracy"] for row in results.get("pretrain", [])}.get(epoch)
    task, _, component = what.partition(" ")
    stage = next(stage for stage, (name, _) in STAGES.items() if name == task)
    if component:
        return _accuracies(results.get("spectral", []), target, stage, "", component).get(epoch)
    return _method_accuracies(results, target, METHOD_OF[stage], "").get(epoch)
