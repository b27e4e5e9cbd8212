"""Selects the best checkpoint from the rows of `results/transfer.jsonl`, for all tables, figures, sentences and stages.

Each target has a metric, a key of `records.METRICS`. Every row holds the values of all metrics, so a change of metric
needs no new computation: `with_metrics` stores the metric's name in each row. The metric of a row without this entry is
"accuracy".
"""

import dataclasses
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeVar, overload

import rich.box
from rich.table import Table
from rich.text import Text

from jax_transfer.logs import log
from jax_transfer.records import METRICS
from jax_transfer.report.grid import SWEPT, is_result, swept
from jax_transfer.report.tables import METHODS, epoch_name, is_number, method_name, percent, showable, target_names
from jax_transfer.results import Row, is_plain

DEFAULT = "accuracy"
STAR = "*"  # in terminal tables, marks a method of `grid.swept`


@dataclasses.dataclass(frozen=True)
class Point:
    """Accuracy of one checkpoint in [0, 1] by the target's metric: mean, minimum and maximum over seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int


def with_metrics(rows: Iterable[Row], metrics: Mapping[str, str]) -> list[Row]:
    """Adds the metric of the target to each row of results/transfer.jsonl or results/spectral.jsonl.

    Args:
      rows: the rows, which are left unchanged.
      metrics: target -> a key of `records.METRICS`; "accuracy" for targets that are missing.

    >>> with_metrics([{"target": "tfds:pets"}], {"tfds:pets": "mean_class_accuracy"})
    [{'target': 'tfds:pets', 'metric': 'mean_class_accuracy'}]
    """
    return [{**row, "metric": metrics.get(row["target"], DEFAULT)} for row in rows]


def by_metric(results: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Adds the metric of the target, from results/targets.jsonl, to the transfer and spectral rows of a study.

    The rows of "transfer" are the plain ones, see `results.is_plain`. If there are others, "reuse" holds all rows of
    fine-tuning, including the plain ones.

    >>> results = {"targets": [{"target": "a", "metric": "accuracy"}], "transfer": [{"target": "a"}]}
    >>> by_metric(results)["transfer"]
    [{'target': 'a', 'metric': 'accuracy'}]
    """
    metrics = {row["target"]: row["metric"] for row in results.get("targets", [])}
    changed = {name: with_metrics(results[name], metrics) for name in ("transfer", "spectral") if name in results}
    rows = changed.get("transfer", [])
    if not all(map(is_plain, rows)):
        changed |= {"transfer": list(filter(is_plain, rows)), "reuse": [r for r in rows if r["method"] == "finetune"]}
    return {**results, **changed}


def value(row: Row) -> float | None:
    """Returns a row's accuracy by the metric of its target, or None if the row lacks it.

    >>> value({"metric": "mean_class_accuracy", "accuracy": 0.9, "mean_class_accuracy": 0.8})
    0.8
    """
    return row.get(row.get("metric", DEFAULT))


def metric_of(rows: Iterable[Row], target: str) -> str:
    """Returns the metric of a target according to its rows.

    >>> metric_of([{"target": "a", "metric": "mean_class_accuracy"}], "a")
    'mean_class_accuracy'
    """
    return next((row.get("metric", DEFAULT) for row in rows if row["target"] == target), DEFAULT)


def axis_label(metric: str, before: str = "") -> str:
    """Returns the axis label of a metric, with optional words before it.

    >>> axis_label("mean_class_accuracy"), axis_label("accuracy", "FE")
    ('Mean class accuracy (%)', 'FE accuracy (%)')
    """
    name = METRICS[metric]
    return f"{before} {name} (%)" if before else f"{name.capitalize()} (%)"


def heading(metrics: Iterable[str]) -> str:
    """Returns the heading of an accuracy column: the name of the metric, or "Accuracy" if there are several metrics.

    >>> heading(["mean_class_accuracy"]), heading(["accuracy", "mean_class_accuracy"])
    ('Mean class accuracy', 'Accuracy')
    """
    names = set(metrics)
    return METRICS[names.pop()].capitalize() if len(names) == 1 else "Accuracy"


def metric_cell(metrics: Iterable[str], metric: str) -> Row:
    """Returns a table cell with the metric of a row, or no cell if all rows of the table have the same metric.

    >>> metric_cell(["accuracy", "mean_class_accuracy"], "accuracy"), metric_cell(["accuracy"], "accuracy")
    ({'Metric': 'accuracy'}, {})
    """
    return {"Metric": METRICS[metric]} if len(set(metrics)) > 1 else {}


def frozen_method(evaluated: Collection[str]) -> str:
    """Returns the method whose accuracy is that of the frozen features: the usual probe, or else the converged one.

    Args:
      evaluated: the methods that have accuracies.

    >>> frozen_method({"probe", "probe_converged"}), frozen_method({"probe_converged"}), frozen_method(set())
    ('probe', 'probe_converged', 'probe')
    """
    return "probe_converged" if "probe_converged" in evaluated and "probe" not in evaluated else "probe"


def is_given(row: Row) -> bool:
    """Returns whether a row's checkpoint was given to the study, instead of being an epoch of its own pre-training.

    >>> is_given({"checkpoint": "run/5", "epoch": None}), is_given({"checkpoint": "5", "epoch": 5})
    (True, False)
    """
    return row["epoch"] is None


def source_of(row: Row) -> str:
    """Returns the pre-training that produced a row's checkpoint, or "" if the study has only one.

    >>> source_of({"checkpoint": "cifar10/5", "epoch": 5}), source_of({"checkpoint": "5", "epoch": 5})
    ('cifar10', '')
    """
    return row["checkpoint"].rpartition("/")[0]


def trajectories(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each pre-training of the study, in order of appearance: source -> rows with an epoch.

    >>> rows = [{"checkpoint": "cifar10/0", "epoch": 0}, {"checkpoint": "run/5", "epoch": None}]
    >>> trajectories(rows)
    {'cifar10': [{'checkpoint': 'cifar10/0', 'epoch': 0}]}
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        if not is_given(row):
            by_source.setdefault(source_of(row), []).append(row)
    return by_source


def given(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of the checkpoints that were given to the study.

    >>> given([{"checkpoint": "cifar10/0", "epoch": 0}, {"checkpoint": "run/5", "epoch": None}])
    [{'checkpoint': 'run/5', 'epoch': None}]
    """
    return [row for row in rows if is_given(row)]


def by_origin(rows: Iterable[Row]) -> dict[str | None, list[Row]]:
    """Returns the rows of each trajectory, and under None those of the given checkpoints if there are any.

    >>> list(by_origin([{"checkpoint": "run/5", "epoch": None}, {"checkpoint": "cifar10/0", "epoch": 0}]))
    ['cifar10', None]
    """
    rows = list(rows)
    own: dict[str | None, list[Row]] = {**trajectories(rows)}
    return own | ({None: found} if (found := given(rows)) else {})


def label_of(row: Row) -> str:
    """Returns the display name of a row's checkpoint: its epoch, or its name if it was given.

    >>> label_of({"checkpoint": "cifar10/5", "epoch": 5}), label_of({"checkpoint": "run/5", "epoch": None})
    ('cifar10 epoch 5', 'run/5')
    """
    if is_given(row):
        return showable(row["checkpoint"])
    return f"{showable(source_of(row))} epoch {epoch_name(row['epoch'])}".lstrip()


def methods_of(transfer_rows: Iterable[Row], target: str) -> list[str]:
    """Returns the methods that evaluated a target: first those in `METHODS`, in that order, then all others by name.

    >>> methods_of([{"target": "a", "method": "finetune"}, {"target": "a", "method": "probe"}], "a")
    ['probe', 'finetune']
    """
    used = {row["method"] for row in transfer_rows if row["target"] == target}
    return [method for method in METHODS if method in used] + sorted(used - set(METHODS))


@overload
def accuracy_by(
    key: Literal["epoch"], transfer_rows: Iterable[Row], target: str, method: str
) -> dict[float, Point]: ...


@overload
def accuracy_by(
    key: Literal["checkpoint"], transfer_rows: Iterable[Row], target: str, method: str
) -> dict[str, Point]: ...


def accuracy_by(key, transfer_rows, target, method):
    """Averages the accuracies of one target and method over seeds, leaving out the points of a grid of settings.

    Args:
      key: the column by which to group: "checkpoint" for all checkpoints, or "epoch" for those of one trajectory.
      transfer_rows: rows of results/transfer.jsonl.
      target: name of the target.
      method: name of the method, such as "probe".

    Returns:
      Value of column `key` -> `Point`, by ascending epoch; then the given checkpoints, in the order of their rows.
      Rows without an accuracy are skipped.

    >>> row = {"target": "a", "method": "probe", "checkpoint": "5", "epoch": 5}
    >>> accuracy_by("epoch", [{**row, "accuracy": 0.75}, {**row, "accuracy": 0.25}], "a", "probe")
    {5: Point(mean=0.5, low=0.25, high=0.75, num_seeds=2)}
    """
    groups = {}
    for row in by_age(transfer_rows):
        if (row["target"], row["method"]) != (target, method) or not is_result(row) or row[key] is None:
            continue
        if is_number(value(row)):
            groups.setdefault(row[key], []).append(value(row))
        elif not row.get("error"):  # failures are listed on the page
            log.warning("results/transfer.jsonl: skipped a row of %s, %s without accuracy.", target, method)
    # Rounded, so that two means that differ only in the last bit count as a tie.
    return {
        name: Point(round(statistics.fmean(values), 12), min(values), max(values), len(values))
        for name, values in groups.items()
    }


def by_age(rows: Iterable[Row]) -> list[Row]:
    """Sorts rows by ascending epoch and then by name, followed by those of the given checkpoints in their own order.

    >>> rows = [{"checkpoint": name, "epoch": epoch} for name, epoch in (("b", None), ("9", 9), ("a", None), ("5", 5))]
    >>> [row["checkpoint"] for row in by_age(rows)]
    ['5', '9', 'b', 'a']
    """
    return sorted(rows, key=lambda row: (True,) if is_given(row) else (False, row["epoch"], row["checkpoint"]))


Name = TypeVar("Name", str, float)


def best_of(points: Mapping[Name, Point]) -> Name:
    """Returns the key of the point with the highest mean over seeds; the first one wins a tie.

    All code that names or draws the best checkpoint of a study calls this function with the points of `accuracy_by`.

    >>> best_of({1: Point(0.8, 0.8, 0.8, 1), 5: Point(0.9, 0.9, 0.9, 1), 9: Point(0.9, 0.9, 0.9, 1)})
    5
    """
    return max(points, key=lambda name: points[name].mean)


def best_checkpoints(transfer_rows: Sequence[Row]) -> list[Row]:
    """Selects the best epoch of each target, method and trajectory; see `best_of`.

    The reported accuracies also select the best epoch, so the gain is an optimistic estimate. For the checkpoints that
    were given to the study, see `comparison.comparisons`.

    Returns:
      One row per target, method and source with these columns: target, method, metric, source ("" if there is only
      one), best_epoch, best_accuracy, last_epoch (the last one evaluated), last_accuracy, gain (best minus last
      accuracy, in [0, 1]), seed_spread (highest minus lowest accuracy over seeds, the larger value of the best and the
      last epoch; None with one seed), num_seeds (the maximum number over epochs), num_checkpoints, incomplete_epochs
      (epochs with fewer seeds), is_best_source (whether no other source has a higher best_accuracy), swept (see
      `grid.swept`).

    >>> rows = [{"target": "tfds:mnist", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": a}
    ...         for epoch, a in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> (best,) = best_checkpoints(rows)
    >>> best["best_epoch"], best["last_epoch"], round(best["gain"], 2)
    (5, 9, 0.05)
    """
    best_rows, by_source, swept_pairs = [], trajectories(transfer_rows), swept(transfer_rows)
    for target in dict.fromkeys(row["target"] for row in transfer_rows):
        common = {"target": target, "metric": metric_of(transfer_rows, target)}
        for method in methods_of(transfer_rows, target):
            found = [
                {**common, "method": method, "source": source, **_best_and_last(points)}
                for source, rows in by_source.items()
                if (points := accuracy_by("epoch", rows, target, method))
            ]
            highest = max((row["best_accuracy"] for row in found), default=None)
            of_sweep = {"swept": (target, method) in swept_pairs}
            best_rows += [{**row, "is_best_source": row["best_accuracy"] == highest, **of_sweep} for row in found]
    return best_rows


def _best_and_last(points: Mapping[float, Point]) -> Row:
    """Compares the best checkpoint of a trajectory with the last one."""
    best, last = best_of(points), max(points)
    num_seeds = max(point.num_seeds for point in points.values())
    return {
        "best_epoch": best,
        "best_accuracy": points[best].mean,
        "last_epoch": last,
        "last_accuracy": points[last].mean,
        "gain": points[best].mean - points[last].mean,
        "seed_spread": seed_spread([points[best], points[last]], num_seeds),
        "num_seeds": num_seeds,
        "num_checkpoints": len(points),
        "incomplete_epochs": [epoch for epoch, point in points.items() if point.num_seeds < num_seeds],
    }


def seed_spread(points: Iterable[Point], num_seeds: int) -> float | None:
    """Returns the highest minus the lowest accuracy over seeds, the largest value of the points; None with one seed.

    >>> seed_spread([Point(0.5, 0.25, 0.75, 2), Point(0.5, 0.5, 0.5, 2)], 2)
    0.5
    """
    return max(point.high - point.low for point in points) if num_seeds > 1 else None


def summary_rows(transfer_rows: Sequence[Row]) -> list[Row]:
    """Formats `best_checkpoints` for display: one dict per row, column title -> text or integer.

    >>> rows = [{"target": "tfds:mnist", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": a}
    ...         for epoch, a in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> (summary,) = summary_rows(rows)
    >>> summary["Best epoch"], summary["Accuracy"], summary["Gain (points)"]
    ('5', '90.00\\xa0%', '5.00')
    """
    names = target_names(row["target"] for row in transfer_rows)
    several = len(trajectories(transfer_rows)) > 1
    best = best_checkpoints(transfer_rows)
    metrics = [row["metric"] for row in best]
    title = heading(metrics)
    return [
        {
            "Target": names[row["target"]],
            "Method": method_name(row["method"]) + (f" ({SWEPT})" if row["swept"] else ""),
            **({"Pre-training": _marked_source(row)} if several else {}),
            **metric_cell(metrics, row["metric"]),
            "Best epoch": epoch_name(row["best_epoch"]),
            title: percent(row["best_accuracy"]),
            "Last epoch": epoch_name(row["last_epoch"]),
            f"Its {title.lower()}": percent(row["last_accuracy"]),
            "Gain (points)": percent(row["gain"], unit=""),
            "Seed spread (points)": percent(row["seed_spread"], unit=""),
            "Seeds": row["num_seeds"],
        }
        for row in best
    ]


def _marked_source(row: Row) -> str:
    """Returns the name of the source, with a star if this source is the best one."""
    return showable(row["source"]) + (" \N{BLACK STAR}" if row["is_best_source"] else "")


def summary_table(transfer_rows: Sequence[Row]) -> Table:
    """Builds a terminal table of `best_checkpoints` that fits into 80 columns.

    >>> rows = [{"target": "tfds:mnist", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": a}
    ...         for epoch, a in ((1, 0.8), (5, 0.9), (9, 0.85))]
    >>> import rich
    >>> rich.print(summary_table(rows))
              Best checkpoint per target
                    Best          Last           Gain    Seed
    Target  Method  epoch      %  epoch      %  points  spread
    ───────────────────────────────────────────────────────────
    mnist   FE          5  90.00      9  85.00    5.00       –
    """
    best = best_checkpoints(transfer_rows)
    names = target_names(row["target"] for row in transfer_rows)
    metric = metric_words({row["target"]: row["metric"] for row in best}, names)
    table = Table(
        title="Best checkpoint per target",
        caption=table_caption(metric, any(row["swept"] for row in best)),
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    several = len(trajectories(transfer_rows)) > 1
    for column in ("Target", "Method", *(("Pre-training",) if several else ())):
        table.add_column(column)
    for column in ("Best\nepoch", "\n%", "Last\nepoch", "\n%", "Gain\npoints", "Seed\nspread"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in best:
        cells = [names[row["target"]], method_name(row["method"]) + STAR * row["swept"]]
        cells += [_marked_source(row)] if several else []
        cells += [epoch_name(row["best_epoch"]), percent(row["best_accuracy"], unit="")]
        cells += [epoch_name(row["last_epoch"]), percent(row["last_accuracy"], unit="")]
        cells += [percent(row["gain"], unit=""), percent(row["seed_spread"], unit="")]
        table.add_row(*map(Text, cells))  # Text, because brackets in a name are not markup
    return table


def table_caption(metric: str, has_swept: bool) -> str:
    """Returns the caption of a terminal table: the metric unless it is the accuracy, and what a star means.

    Args:
      metric: the words of `metric_words`.
      has_swept: whether a method in the table is marked with `STAR`.

    >>> table_caption("accuracy", True)
    '* The best of the sweep on the test images: not an honest test accuracy.'
    """
    words = [] if metric == METRICS[DEFAULT] else [f"{metric.capitalize()}, in percent."]
    words += [f"{STAR} The {SWEPT}: not an honest test accuracy."] if has_swept else []
    return " ".join(words)


def metric_words(metrics: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Describes the metrics of several targets in words.

    Args:
      metrics: target -> a key of `records.METRICS`.
      names: target -> its display name.

    >>> metric_words({"a": "accuracy", "b": "mean_class_accuracy"}, {"a": "mnist", "b": "pets"})
    'accuracy (mean class accuracy on pets)'
    """
    used = set(metrics.values())
    if len(used) < 2:
        return METRICS[used.pop() if used else DEFAULT]
    others = ", ".join(names[target] for target, metric in metrics.items() if metric != DEFAULT)
    return f"accuracy (mean class accuracy on {others})"
