"""Explains why a checkpoint transfers: words and tables about its spectral components.

Reproduces Table 1 of "Towards Inadequately Pre-trained Models" for any study. The figures are in `spectral_figures`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, overload

from jax_transfer.analysis import MIN_CHECKPOINTS, kendall
from jax_transfer.records import METRICS
from jax_transfer.report import best, tables
from jax_transfer.report.best import Point, best_of, by_origin, is_given, label_of, trajectories, value
from jax_transfer.report.figures import from_source
from jax_transfer.report.grid import SWEPT, is_result, swept, swept_words
from jax_transfer.report.tables import epoch_name, in_points, is_number, listed, method_name, percent
from jax_transfer.results import Row

Results = Mapping[str, Sequence[Row]]

# State of the model that computes the features -> its abbreviation in the papers, and its description in a title.
STAGES = {"pretrained": ("FE", "before fine-tuning"), "finetuned": ("FT", "after fine-tuning")}
COMPONENTS = {"full": "all", "main": "main", "residual": "residual"}  # component -> its name in tables


def methods(results: Results) -> dict[str, str]:
    """Returns the methods whose accuracies the components should explain: state of the model -> method.

    >>> row = {"checkpoint": "5", "epoch": 5, "target": "a", "method": "probe_converged", "accuracy": 0.9}
    >>> methods({"transfer": [row]})
    {'pretrained': 'probe_converged', 'finetuned': 'finetune'}
    """
    rows = results.get("transfer", [])
    evaluated = {row["method"] for row in rows if is_result(row) and is_number(value(row))}
    return {"pretrained": best.frozen_method(evaluated), "finetuned": "finetune"}


def select(rows: Iterable[Row], target: str, stage: str) -> list[Row]:
    """Selects the rows without errors for a target and a stage, by ascending epoch if they have one.

    >>> row = {"target": "a", "stage": "pretrained", "epoch": 5}
    >>> select([row, {**row, "epoch": 1}, {**row, "epoch": 2, "error": "NaN"}], "a", "pretrained")
    [{'target': 'a', 'stage': 'pretrained', 'epoch': 1}, {'target': 'a', 'stage': 'pretrained', 'epoch': 5}]
    """
    selected = [row for row in rows if (row["target"], row["stage"]) == (target, stage) and not row.get("error")]
    return sorted(selected, key=lambda row: row.get("epoch") or 0)


@overload
def component_accuracies(
    key: Literal["epoch"], rows: Iterable[Row], target: str, stage: str, component: str
) -> dict[float, float]: ...


@overload
def component_accuracies(
    key: Literal["checkpoint"], rows: Iterable[Row], target: str, stage: str, component: str
) -> dict[str, float]: ...


def component_accuracies(key, rows, target, stage, component):
    """Returns the accuracy of the probe on a component: value of column `key` -> accuracy.

    Args:
      key: "checkpoint", or "epoch" for the checkpoints of one trajectory.
      rows: rows of results/spectral.jsonl of one trajectory, or of the given checkpoints.
      target: name of the target.
      stage: "pretrained" or "finetuned".
      component: "full", "main" or "residual".

    >>> row = {"target": "a", "stage": "pretrained", "component": "main", "checkpoint": "5", "epoch": 5}
    >>> component_accuracies("epoch", [{**row, "accuracy": 0.9}], "a", "pretrained", "main")
    {5: 0.9}
    """
    measured = ((row[key], value(row)) for row in select(rows, target, stage) if row["component"] == component)
    return {name: accuracy for name, accuracy in measured if is_number(accuracy)}


def _points(results: Results, target: str, method: str, source: str | None) -> dict[str, Point]:
    """Returns checkpoint -> accuracy of an evaluation protocol, for a trajectory or (None) the given checkpoints."""
    return best.accuracy_by("checkpoint", by_origin(results.get("transfer", [])).get(source, []), target, method)


def shown_checkpoints(results: Results, target: str) -> list[str]:
    """Returns the checkpoints in Table 1 and Figure 4.

    Of each trajectory, these are the best frozen feature extractor and the last epoch; of the given checkpoints, the
    best frozen feature extractor, the next and the last.

    If the probe stage has not run, the best is the one with the highest accuracy of the spectral stage's probe on all
    features.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": accuracy}
    ...         for epoch, accuracy in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> shown_checkpoints({"transfer": rows}, "a")
    ['5', '9']
    """
    spectral, method = by_origin(results.get("spectral", [])), methods(results)["pretrained"]
    shown = []
    for source in {**by_origin(results.get("transfer", [])), **spectral}:
        accuracies = _means(_points(results, target, method, source)) or component_accuracies(
            "checkpoint", spectral.get(source, []), target, "pretrained", "full"
        )
        if accuracies:
            by_accuracy = sorted(accuracies, key=lambda name, of=accuracies: -of[name])  # stable: the first wins a tie
            chosen = {*by_accuracy[:2], by_accuracy[-1]} if source is None else {by_accuracy[0], list(accuracies)[-1]}
            shown += [name for name in (by_accuracy if source is None else accuracies) if name in chosen]
    return shown


def _means(points: Mapping[str, Point]) -> dict[str, float]:
    return {name: point.mean for name, point in points.items()}


def _groups(results: Results) -> Iterator[tuple[str, str | None, list[Row]]]:
    """Yields (target, source, spectral rows) of each trajectory, and of the given checkpoints with the source None."""
    rows = results.get("spectral", [])
    for target in dict.fromkeys(row["target"] for row in rows):
        for source, own in by_origin(row for row in rows if row["target"] == target).items():
            yield target, source, own


def table_1(results: Results) -> list[Row]:
    """Formats the rows of Table 1: column title -> text.

    For each target and source, there is a row for the best FE checkpoint and a row for the last checkpoint; for given
    checkpoints, see `shown_checkpoints`.

    >>> row = {"target": "a", "stage": "pretrained", "checkpoint": "5", "epoch": 5, "rank": 3.0, "accuracy": 0.9}
    >>> (cells,) = table_1({"spectral": [{**row, "component": component} for component in COMPONENTS]})
    >>> cells["Epoch"], cells["Rank of main"]
    ('5', '3 of 3')
    """
    rows, table = results.get("spectral", []), []
    names = tables.target_names(row["target"] for row in rows)
    has_given, several = any(map(is_given, rows)), len(trajectories(rows)) > 1
    metrics = {target: best.metric_of(rows, target) for target in names}
    title = best.heading(metrics.values())
    trained = {row["checkpoint"]: row["test_accuracy"] for row in results.get("pretrain", [])}
    swept_pairs = swept(results.get("transfer", []))
    for target, source, own in _groups(results):
        shown, first = shown_checkpoints(results, target), {row["checkpoint"]: row for row in own}
        for stage, method in methods(results).items():
            parts = {c: component_accuracies("checkpoint", own, target, stage, c) for c in COMPONENTS}
            accuracy = _means(_points(results, target, method, source))
            ranks = {(row["checkpoint"], row["component"]): row["rank"] for row in select(own, target, stage)}
            words = f" ({SWEPT})" if (target, method) in swept_pairs else ""
            for checkpoint in (name for name in shown if name in parts["main"]):
                row = first[checkpoint]
                table.append({
                    "Target": names[target],
                    **({"Pre-training": source} if several and not has_given else {}),
                    "Task": method_name(method) + words,
                    **best.metric_cell(metrics.values(), metrics[target]),
                    **({"Checkpoint": label_of(row)} if has_given else {"Epoch": epoch_name(row["epoch"])}),
                    **({"Source accuracy": percent(trained.get(checkpoint))} if trained or not has_given else {}),
                    title: percent(accuracy.get(checkpoint)),
                    **{f"Probe, {name}": percent(parts[c].get(checkpoint)) for c, name in COMPONENTS.items()},
                    "Rank of main": f"{ranks[checkpoint, 'main']:.0f} of {ranks[checkpoint, 'full']:.0f}",
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
    known = {row["checkpoint"]: row for row in (*rows, *results.get("transfer", []))}
    labels = {name: label_of(row) if is_given(row) else epoch_name(row["epoch"]) for name, row in known.items()}
    for target, source, own in _groups(results):
        sentences, metric = [], METRICS[best.metric_of(rows, target)]
        for method in methods(results).values():
            points = _points(results, target, method, source)
            # Also used for FT, because the features before fine-tuning show what pre-training contributes.
            parts = {c: component_accuracies("checkpoint", own, target, "pretrained", c) for c in ("main", "residual")}
            both = [name for name in points if name in parts["main"] and name in parts["residual"]]
            if len(both) < 3:
                continue
            words = swept_words(swept(results.get("transfer", [])), method, {target: names[target]})
            describe = _compare_by_name if source is None else _compare_epochs
            text = f"{method_name(method)} {metric}{words} is {describe(points, parts, labels)}"
            sentences.append(
                text + _which_component("checkpoints" if source is None else "epochs", both, points, parts)
            )
        if sentences:
            origin = "" if source is None else from_source(source)
            yield names[target] + origin, " ".join(sentences)


def _compare_epochs(points: Mapping[str, Point], parts: Mapping[str, dict[str, float]], labels: dict[str, str]) -> str:
    """Compares the best epoch of a trajectory with the last one."""
    accuracy, highest, last = _means(points), best_of(points), list(points)[-1]
    text = f"highest at epoch {labels[highest]} ({percent(accuracy[highest])})"
    if highest != last and accuracy[highest] == accuracy[last]:
        text += f" and equally high at the last epoch, {labels[last]}"
    elif highest != last:
        text += f" and {in_points(accuracy[highest] - accuracy[last])} lower at the last epoch, "
        text += labels[last]
        text += _change_of_components("Between these epochs", highest, last, parts)
    return text


def _compare_by_name(points: Mapping[str, Point], parts: Mapping[str, dict[str, float]], labels: dict[str, str]) -> str:
    """Compares the best given checkpoint with the worst one."""
    accuracy, highest, lowest = _means(points), best_of(points), min(points, key=lambda name: points[name].mean)
    if accuracy[highest] == accuracy[lowest]:
        return f"equally high for all checkpoints ({percent(accuracy[highest])})"
    tied = [labels[name] for name in points if accuracy[name] == accuracy[highest]]
    text = f"highest for {listed(tied)} ({percent(accuracy[highest])})"
    text += f" and {in_points(accuracy[highest] - accuracy[lowest])} lower for {labels[lowest]}"
    pair = "these checkpoints" if len(tied) == 1 else f"{labels[highest]} and {labels[lowest]}"
    text += _change_of_components(f"Between {pair}", highest, lowest, parts)
    return text


def _change_of_components(between: str, first: str, second: str, parts: Mapping[str, dict[str, float]]) -> str:
    """Describes how the accuracies on the components of two checkpoints differ; "" if one was not measured."""
    if not all(name in part for part in parts.values() for name in (first, second)):
        return ""
    change = {c: 100 * (part[second] - part[first]) for c, part in parts.items()}
    return (
        f". {between}, the accuracy of a probe on the main component changes by {change['main']:+.2f} points and on the"
        f" residual component by {change['residual']:+.2f}"
    )


def _which_component(
    across: str, names: Sequence[str], points: Mapping[str, Point], parts: Mapping[str, dict[str, float]]
) -> str:
    """Describes which component a protocol's accuracies follow across `names`, for which all were measured."""
    accuracy = _means(points)
    taus = {c: kendall([part[name] for name in names], [accuracy[name] for name in names]) for c, part in parts.items()}
    formatted = {c: f"Kendall's \N{GREEK SMALL LETTER TAU} {tau:.2f}" for c, tau in taus.items() if is_number(tau)}
    if len(formatted) < 2:
        return "."
    closer, other = sorted(taus, key=taus.__getitem__, reverse=True)
    if taus[closer] <= 0:
        text = f"neither component (main {formatted['main']}, residual {formatted['residual']})"
    elif taus[closer] == taus[other]:
        text = f"both components equally ({formatted['main']})"
    else:
        text = f"the {closer} component ({formatted[closer]}) rather than the {other} component ({formatted[other]})"
    few = f", but {len(names)} checkpoints are too few to be sure" if len(names) < MIN_CHECKPOINTS else ""
    return f". Across {across} it follows {text}{few}."


def paper_rows(results: Results, paper: Sequence[Row]) -> list[Row]:
    """Formats the paper's numbers, which the config lists, beside ours: column title -> text.

    Args:
      results: result file -> its rows.
      paper: the entries of `config.paper` with an epoch. Each holds "target", "epoch" (ours), "what" ("source", "FE",
        "FT", "FE main", "FE residual", "FT main" or "FT residual"), "accuracy" (theirs) and "where" (in the paper).

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
            "What": entry["what"] + _our_method(results, entry),
            **best.metric_cell([*metrics, best.DEFAULT], metric),
            "In the paper": entry["where"],
            "Paper": percent(entry["accuracy"]),
            "Ours, epoch": entry["epoch"],
            "Ours": percent(_ours(results, entry["target"], entry["what"], entry["epoch"])),
        }
        for entry, metric in zip(paper, metrics, strict=True)
    ]


def _our_method(results: Results, entry: Row) -> str:
    """Returns words in brackets if our method has another name, or if the test images chose its settings; else ""."""
    stage = next((stage for stage, (task, _) in STAGES.items() if task == entry["what"]), None)
    if stage is None:
        return ""
    method = methods(results)[stage]
    name = "" if method_name(method) == entry["what"] else f" (ours: {method_name(method)})"
    return name + swept_words(swept(results.get("transfer", [])), method, {entry["target"]: ""})


def _ours(results: Results, target: str, what: str, epoch: int) -> float | None:
    """Returns our accuracy for an entry of `config.paper`."""
    if what == "source":
        return {row["epoch"]: row["test_accuracy"] for row in results.get("pretrain", [])}.get(epoch)
    task, _, component = what.partition(" ")
    stage = next(stage for stage, (name, _) in STAGES.items() if name == task)
    if component:
        rows = trajectories(results.get("spectral", [])).get("", [])
        return component_accuracies("epoch", rows, target, stage, component).get(epoch)
    rows = trajectories(results.get("transfer", [])).get("", [])
    point = best.accuracy_by("epoch", rows, target, methods(results)[stage]).get(epoch)
    return point and point.mean
