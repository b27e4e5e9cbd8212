"""Draws the accuracies of the checkpoints that were given to a study, by name."""

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure

from jax_transfer.records import METRICS, InputError
from jax_transfer.report import best, tables
from jax_transfer.report.comparison import comparisons
from jax_transfer.report.figures import Drawing, Results, Section, panels_of, style_of
from jax_transfer.report.grid import swept, swept_note
from jax_transfer.report.style import METHOD_STYLES, STYLE, WIDTH, by_name, cut
from jax_transfer.results import Row


@matplotlib.rc_context(STYLE)
def accuracy_by_name(transfer_rows: Sequence[Row], target: str) -> Figure:
    """Draws the accuracy (%) of each given checkpoint by each method, with the study's own best and last epochs.

    A line spans all seeds. In each panel, the best checkpoint of its first method is at the top.

    Raises:
      InputError: if no given checkpoint has an accuracy on the target.

    >>> row = {"target": "a", "method": "probe", "epoch": None}
    >>> rows = [{**row, "checkpoint": "a", "accuracy": 0.8}, {**row, "checkpoint": "run/b", "accuracy": 0.9}]
    >>> [text.get_text() for text in accuracy_by_name(rows, "a").axes[0].get_yticklabels()]
    ['run/b', 'a']
    """
    compared = [comparison for comparison in comparisons(transfer_rows) if comparison.target == target]
    if not compared:
        raise InputError(f"results/transfer.jsonl has no accuracy for target {target!r}; run stage probe or finetune.")
    labels = {c.checkpoint: c.label for comparison in compared for c in comparison.candidates}
    series = {}
    for method in (comparison.method for comparison in compared):
        points = best.accuracy_by("checkpoint", transfer_rows, target, method)
        series[method] = {labels[name]: point for name, point in points.items() if name in labels}
    panels = panels_of({method: list(points.values()) for method, points in series.items()})
    others = [method for method in series if method not in METHOD_STYLES]
    lines = [dict.fromkeys(label for method in panel for label in series[method]) for panel in panels]
    heights = [0.5 + 0.15 * len(panel) + 0.17 * len(names) for panel, names in zip(panels, lines, strict=True)]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel, names in zip(all_axes, panels, lines, strict=True):
        first = series[panel[0]]
        ordered = sorted(names, key=lambda name, first=first: -first[name].mean if name in first else 1)
        drawn = {
            tables.method_name(method): (
                *style_of(method, others),
                {n: (100 * p.low, 100 * p.mean, 100 * p.high) for n, p in series[method].items()},
            )
            for method in panel
        }
        by_name(axes, ordered, drawn, best.axis_label(compared[0].metric))
    figure.suptitle(cut(tables.short_target(target), 38))
    return figure


def _draw(results: Results) -> Iterator[Drawing]:
    rows = results["transfer"]
    compared = comparisons(rows)
    names = tables.target_names(comparison.target for comparison in compared)
    for target, metric in dict.fromkeys((comparison.target, comparison.metric) for comparison in compared):
        caption = f"{names[target]}: {METRICS[metric]} of each checkpoint. Lines span all seeds."
        caption += swept_note(swept(rows), target, best.methods_of(rows, target))
        yield Drawing("", f"checkpoints-{names[target]}", caption, accuracy_by_name(rows, target))


FIGURES = {"Transfer by checkpoint": Section(("transfer",), _draw, for_trajectories=False)}
