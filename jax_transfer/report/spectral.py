"""Why it transfers: the figures, the table and the words for spectral components, spectra, similarity and t-SNE.

Figures 4 and 5 and Table 1 of "Towards Inadequately Pre-trained Models", for any study.
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

# Stage of a features' model -> what the papers call it, and how a title says it.
STAGES = {"pretrained": ("FE", "before fine-tuning"), "finetuned": ("FT", "after fine-tuning")}
COMPONENTS = {"full": (GREY, "s", "all"), "main": (ORANGE, "o", "main"), "residual": (BLUE, "D", "residual")}
# Method whose accuracy a stage's components are to explain.
METHOD_OF = {"pretrained": "probe", "finetuned": "finetune"}


def _select(rows: Sequence[Row], target: str, stage: str, source: str | None = None) -> list[Row]:
    found = [row for row in rows if (row["target"], row["stage"]) == (target, stage) and not row.get("error")]
    found = [row for row in found if source is None or source_of(row) == source]
    return sorted(found, key=lambda row: row.get("epoch", 0))


def _accuracies(rows: Sequence[Row], target: str, stage: str, source: str, component: str) -> dict[int, float]:
    """epoch -> accuracy of the probe on a component."""
    found = _select(rows, target, stage, source)
    return {r["epoch"]: value(r) for r in found if r["component"] == component and is_number(value(r))}


@matplotlib.rc_context(STYLE)
def component_curves(spectral_rows: Sequence[Row], target: str, source: str = "") -> Figure:
    """Accuracy (%) of probes on all features, the main and the residual component against pre-training epoch: Figure 5.

    Raises:
      InputError: if no component was evaluated on the target.
    """
    stages = [stage for stage in STAGES if _accuracies(spectral_rows, target, stage, source, "main")]
    if not stages:
        raise InputError(f"results/spectral.jsonl has no accuracy for target {target!r}; run stage spectral.")
    labels = [best.axis_label(best.metric_of(spectral_rows, target), STAGES[stage][0]) for stage in stages]
    height = max(1.6, 0.075 * len(labels[0]))  # inches: as tall as the label is long
    figure = Figure(figsize=(WIDTH, 0.7 + height * len(stages)), layout="constrained")
    all_axes = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    epochs = set()
    for axes, stage, label_of_axis in zip(all_axes, stages, labels, strict=True):
        for component, (color, marker, label) in COMPONENTS.items():
            points = _accuracies(spectral_rows, target, stage, source, component)
            values = [100 * accuracy for accuracy in points.values()]
            axes.plot(list(points), values, color=color, marker=marker, label=label, clip_on=False)
            epochs |= set(points)
        percent_axis(axes, label_of_axis)
    legend_above(all_axes[0], columns=3)
    epoch_axis(all_axes[-1], sorted(epochs))
    figure.align_ylabels(all_axes)
    figure.suptitle(cut(tables.short_target(target) + from_source(source), 38))
    return figure


@matplotlib.rc_context(STYLE)
def embeddings(embedding_rows: Sequence[Row], target: str, source: str = "") -> Figure:
    """t-SNE of test images, coloured by class: a row before and one after fine-tuning, a column a checkpoint. Figure 4."""
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
    """Singular values as shares of their sum, a line a checkpoint, and below how many directions count at each epoch."""
    rows = _select(spectrum_rows, target, stage, source)
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    curves, ranks = figure.subplots(2, 1, height_ratios=(1.5, 1))
    colors = matplotlib.colormaps["viridis"]
    for i, row in enumerate(rows):
        first_or_last = f"epoch {row['epoch']}" if i in (0, len(rows) - 1) else None
        shares = [100 * share for share in row["shares"]]
        curves.plot(row["places"], shares, color=colors(0.9 * i / max(len(rows) - 1, 1)), label=first_or_last)
    curves.set(xscale="log", yscale="log", xlabel="Singular value", ylabel="Share of the sum (%)")
    curves.set_ylim(bottom=max(curves.get_ylim()[0], 1e-4))  # below lies rounding
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
    """CKA and the overlap of main subspaces between all checkpoints of a target."""
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
                    "Probes on the spectral components of each batch of features. Main: the directions that hold 80 %."
                )
                figure = component_curves(own["spectral"], target, source)
                yield Drawing(name, f"components-{name}-{source}", caption, figure)
            if any(source_of(row) == source for row in own["embedding"]):
                caption = "t-SNE of test images, a colour a class. Only neighbourhoods mean something, not distances."
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
                    f"How alike the checkpoints represent test images {words}; 1 is the same up to rotation and scale."
                )
                figure = similarity_maps(own["similarity"], target, stage)
                yield Drawing(name, f"similarity-{name}-{stage}", caption, figure)


FIGURES = {"Why it transfers: components, spectra, neighbourhoods": (("spectral",), _draw)}


def _method_points(results: Results, target: str, method: str, source: str) -> dict[int, Point]:
    """epoch -> accuracy of an evaluation protocol."""
    own = [row for row in results.get("transfer", []) if source_of(row) == source]
    return best.accuracy_by("epoch", own, target, method)


def _method_accuracies(results: Results, target: str, method: str, source: str) -> dict[int, float]:
    """epoch -> accuracy of an evaluation protocol, mean over seeds."""
    return _means(_method_points(results, target, method, source))


def _means(points: dict[int, Point]) -> dict[int, float]:
    return {epoch: point.mean for epoch, point in points.items()}


def shown_epochs(results: Results, target: str, source: str) -> list[int]:
    """Returns the epochs that Table 1 and Figure 4 show: the best one as a frozen feature extractor, and the last one.

    Where the stage probe has not run, the best one is that of the probe on all features.
    """
    points = list(_method_points(results, target, "probe", source).values())
    if not points:
        full = _accuracies(results.get("spectral", []), target, "pretrained", source, "full")
        points = [Point(epoch, accuracy, accuracy, accuracy, 1) for epoch, accuracy in full.items()]
    return sorted({best.best_point(points).epoch, max(point.epoch for point in points)}) if points else []


def _groups(results: Results) -> Iterator[tuple[str, str]]:
    """(target, source) of what has been decomposed."""
    yield from dict.fromkeys((row["target"], source_of(row)) for row in results.get("spectral", []))


def table_1(results: Results) -> list[Row]:
    """Table 1 for each target and source: the checkpoint that is best for FE and the last one. Column title -> text."""
    rows, found = results.get("spectral", []), []
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
                found.append({
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
    return found


def story(results: Results) -> Iterator[tuple[str, str]]:
    """(target's name, what its components say, in plain words computed from the numbers)."""
    rows = results.get("spectral", [])
    names = tables.target_names(row["target"] for row in rows)
    for target, source in _groups(results):
        sentences, metric = [], METRICS[best.metric_of(rows, target)]
        for stage, (task, _) in STAGES.items():
            points = _method_points(results, target, METHOD_OF[stage], source)
            # What a checkpoint brings along is in its features before fine-tuning, also for FT.
            parts = {c: _accuracies(rows, target, "pretrained", source, c) for c in ("main", "residual")}
            epochs = sorted(set(points) & set(parts["main"]) & set(parts["residual"]))
            if len(epochs) < 3:
                continue
            sentences.append(_follows(f"{task} {metric}", epochs, points, parts))
        if sentences:
            yield names[target] + from_source(source), " ".join(sentences)


def _follows(words: str, epochs: list[int], points: dict[int, Point], parts: dict) -> str:
    """What the accuracies of a protocol have to do with the components of `epochs`, which all have both."""
    highest, last, accuracy = best.best_point(points.values()).epoch, max(points), _means(points)
    taus = {c: kendall([part[e] for e in epochs], [accuracy[e] for e in epochs]) for c, part in parts.items()}
    said = f"{words} is highest at epoch {highest} ({percent(accuracy[highest])})"
    if highest != last:
        said += f" and {100 * (accuracy[highest] - accuracy[last]):.2f} points lower at the last epoch, {last}"
    if highest != last and {highest, last} <= set(epochs):
        change = {c: 100 * (part[last] - part[highest]) for c, part in parts.items()}
        said += f"; from the one to the other a probe on the main component changes by {change['main']:+.2f} points"
        said += f" and one on the residual by {change['residual']:+.2f}"
    told = {c: f"Kendall's \N{GREEK SMALL LETTER TAU} {tau:.2f}" for c, tau in taus.items() if is_number(tau)}
    if len(told) < 2:
        return f"{said}."
    ahead, behind = sorted(taus, key=taus.get, reverse=True)
    if taus[ahead] <= 0:
        said += f". Over the epochs it follows neither component (main {told['main']}, residual {told['residual']})"
    elif taus[ahead] == taus[behind]:
        said += f". Over the epochs it follows both components alike ({told['main']})"
    else:
        said += f". Over the epochs it follows the {ahead} component ({told[ahead]}) rather than the {behind} ({told[behind]})"
    few = f"; {len(epochs)} checkpoints are few for that" if len(epochs) < MIN_CHECKPOINTS else ""
    return f"{said}{few}."


def paper_rows(results: Results, paper: Sequence[Row]) -> list[Row]:
    """The paper's numbers that a config names beside ours: column title -> text.

    Args:
      paper: `config.paper`: {"target": ..., "epoch": ours, "what": a key of `_lookups`, "accuracy": theirs, "where": ...}.
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
    """The accuracy that a config's entry names: "source", "FE", "FT", "FE main", "FE residual", "FT main", "FT residual"."""
    if what == "source":
        return {row["epoch"]: row["test_accuracy"] for row in results.get("pretrain", [])}.get(epoch)
    task, _, component = what.partition(" ")
    stage = next(stage for stage, (name, _) in STAGES.items() if name == task)
    if component:
        return _accuracies(results.get("spectral", []), target, stage, "", component).get(epoch)
    return _method_accuracies(results, target, METHOD_OF[stage], "").get(epoch)
