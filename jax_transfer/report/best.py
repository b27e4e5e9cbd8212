"""Which checkpoint is best: the one reading of `results/transfer.jsonl` that tables, figures, words and stages share.

Each target has a metric, a key of `records.METRICS`. Every row holds both accuracies, so the metric is a matter of
reading: `with_metrics` says in each row which of them counts, and a row that does not say so counts by its accuracy.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

import rich.box
from rich.table import Table
from rich.text import Text

from jax_transfer.logs import log
from jax_transfer.records import METRICS
from jax_transfer.report.tables import METHODS, is_number, method_name, percent, showable, target_names
from jax_transfer.results import Row

DEFAULT = "accuracy"


@dataclasses.dataclass(frozen=True)
class Point:
    """One checkpoint's accuracy in [0, 1], by its target's metric: mean, lowest and highest over its seeds."""

    epoch: int
    mean: float
    low: float
    high: float
    num_seeds: int


def with_metrics(rows: Iterable[Row], metrics: Mapping[str, str]) -> list[Row]:
    """Returns rows of results/transfer.jsonl or spectral.jsonl that say which accuracy counts.

    Args:
      metrics: target -> a key of `records.METRICS`.
    """
    return [{**row, "metric": metrics.get(row["target"], DEFAULT)} for row in rows]


def by_metric(results: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Returns a study's results, with rows that say which accuracy counts, as results/targets.jsonl has it."""
    metrics = {row["target"]: row["metric"] for row in results.get("targets", [])}
    read = {name: with_metrics(results[name], metrics) for name in ("transfer", "spectral") if name in results}
    return {**results, **read}


def value(row: Row) -> float | None:
    """Returns the accuracy of a row that counts on its target."""
    return row.get(row.get("metric", DEFAULT))


def metric_of(rows: Iterable[Row], target: str) -> str:
    """Returns the metric of a target, as its rows say."""
    return next((row.get("metric", DEFAULT) for row in rows if row["target"] == target), DEFAULT)


def axis_label(metric: str, before: str = "") -> str:
    """Returns what an axis is called: "Mean class accuracy (%)", "FE accuracy (%)"."""
    name = METRICS[metric]
    return f"{before} {name} (%)" if before else f"{name.capitalize()} (%)"


def heading(metrics: Iterable[str]) -> str:
    """Returns the heading of a column of accuracies: the name of their metric, "Accuracy" if they have several."""
    names = set(metrics)
    return METRICS[names.pop()].capitalize() if len(names) == 1 else "Accuracy"


def metric_cell(metrics: Iterable[str], metric: str) -> Row:
    """Returns the cell that tells a row's metric where those of a table differ."""
    return {"Metric": METRICS[metric]} if len(set(metrics)) > 1 else {}


def source_of(row: Row) -> str:
    """The pre-training that a row's checkpoint comes from: "cifar10" of "cifar10/5", "" where a study has one only."""
    return row["checkpoint"].rpartition("/")[0]


def sources_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(map(source_of, rows)))


def methods_of(transfer_rows: Iterable[Row], target: str) -> list[str]:
    """The methods that evaluated a target: those of `METHODS` in its order, then others by name."""
    found = {row["method"] for row in transfer_rows if row["target"] == target}
    return [method for method in METHODS if method in found] + sorted(found - set(METHODS))


def accuracy_by(key: str, transfer_rows: Iterable[Row], target: str, method: str) -> dict[str | int, Point]:
    """Value of column `key` ("epoch" or "checkpoint") -> `Point`, by ascending epoch; rows without numbers left out."""
    groups = {}
    for row in transfer_rows:
        if row["target"] == target and row["method"] == method:
            if is_number(row["epoch"]) and is_number(value(row)):
                groups.setdefault((row["epoch"], row[key]), []).append(value(row))
            elif not row.get("error"):  # a failure is listed on the page
                log.warning("transfer of %s, %s: a row without epoch or accuracy left out.", target, method)
    # Rounded: two means that differ in the last bit are a tie.
    return {
        name: Point(epoch, round(statistics.fmean(values), 12), min(values), max(values), len(values))
        for (epoch, name), values in sorted(groups.items())
    }


def best_point(points: Iterable[Point]) -> Point:
    """Returns the best checkpoint of a trajectory: the highest mean over seeds, and the earliest epoch of equal ones.

    Whatever names or draws a best checkpoint of a study asks here.
    """
    return max(points, key=lambda point: (point.mean, -point.epoch))


def best_checkpoints(transfer_rows: Sequence[Row]) -> list[Row]:
    """The best epoch per target, method and source; see `best_point`.

    Returns:
      A row per target, method and source: target, method, metric, source ("" if there is one only), best_epoch,
      best_accuracy, last_epoch (the last one evaluated), last_accuracy, gain (best minus last, in [0, 1]), seed_spread
      (highest minus lowest accuracy over seeds, at the best or the last epoch, whichever is larger; None with one seed),
      num_seeds (the most at an epoch), num_checkpoints, incomplete_epochs (those with fewer seeds), is_best_source (none
      has a higher best_accuracy). The best is chosen on the accuracies it is reported with, so the gain is an optimistic
      estimate.
    """
    best_rows = []
    by_source = {
        source: [row for row in transfer_rows if source_of(row) == source] for source in sources_of(transfer_rows)
    }
    for target in dict.fromkeys(row["target"] for row in transfer_rows):
        metric = metric_of(transfer_rows, target)
        for method in methods_of(transfer_rows, target):
            found = [
                {"target": target, "method": method, "metric": metric, "source": source, **_best_of(points)}
                for source, rows in by_source.items()
                if (points := list(accuracy_by("epoch", rows, target, method).values()))
            ]
            highest = max((row["best_accuracy"] for row in found), default=None)
            best_rows += [{**row, "is_best_source": row["best_accuracy"] == highest} for row in found]
    return best_rows


def _best_of(points: Sequence[Point]) -> Row:
    best, last = best_point(points), points[-1]
    num_seeds = max(point.num_seeds for point in points)
    return {
        "best_epoch": best.epoch,
        "best_accuracy": best.mean,
        "last_epoch": last.epoch,
        "last_accuracy": last.mean,
        "gain": best.mean - last.mean,
        "seed_spread": max(best.high - best.low, last.high - last.low) if num_seeds > 1 else None,
        "num_seeds": num_seeds,
        "num_checkpoints": len(points),
        "incomplete_epochs": [point.epoch for point in points if point.num_seeds < num_seeds],
    }


def summary_rows(transfer_rows: Sequence[Row]) -> list[Row]:
    """`best_checkpoints` as a reader sees them: column title -> text or integer."""
    names = target_names(row["target"] for row in transfer_rows)
    several = len(sources_of(transfer_rows)) > 1
    best = best_checkpoints(transfer_rows)
    metrics = [row["metric"] for row in best]
    title = heading(metrics)
    return [
        {
            "Target": names[row["target"]],
            "Method": method_name(row["method"]),
            **({"Source": _marked_source(row)} if several else {}),
            **metric_cell(metrics, row["metric"]),
            "Best epoch": row["best_epoch"],
            title: percent(row["best_accuracy"]),
            "Last epoch": row["last_epoch"],
            f"Its {title.lower()}": percent(row["last_accuracy"]),
            "Gain (points)": percent(row["gain"], unit=""),
            "Seed spread (points)": percent(row["seed_spread"], unit=""),
            "Seeds": row["num_seeds"],
        }
        for row in best
    ]


def _marked_source(row: Row) -> str:
    return showable(row["source"]) + (" \N{BLACK STAR}" if row["is_best_source"] else "")


def summary_table(transfer_rows: Sequence[Row]) -> Table:
    """The best checkpoint per target for FE and for FT, 80 columns wide: `rich.print(summary_table(rows))`."""
    best = best_checkpoints(transfer_rows)
    names = target_names(row["target"] for row in transfer_rows)
    said = metric_words({row["target"]: row["metric"] for row in best}, names)
    table = Table(
        title="Best checkpoint per target",
        caption="" if said == METRICS[DEFAULT] else f"{said.capitalize()}, in per cent.",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    several = len(sources_of(transfer_rows)) > 1
    for column in ("Target", "Method", *(("Source",) if several else ())):
        table.add_column(column)
    for column in ("Best\nepoch", "\n%", "Last\nepoch", "\n%", "Gain\npoints", "Seed\nspread"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in best:
        cells = [names[row["target"]], method_name(row["method"]), *([_marked_source(row)] if several else [])]
        cells += [str(row["best_epoch"]), percent(row["best_accuracy"], unit="")]
        cells += [str(row["last_epoch"]), percent(row["last_accuracy"], unit="")]
        cells += [percent(row["gain"], unit=""), percent(row["seed_spread"], unit="")]
        table.add_row(*map(Text, cells))  # Text: brackets in a name are no markup
    return table


def metric_words(metrics: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Returns what accuracies are: "accuracy", "mean class accuracy", or "accuracy (mean class accuracy on pets)".

    Args:
      metrics: target -> a key of `records.METRICS`. names: target -> how it is shown.
    """
    used = set(metrics.values())
    if len(used) < 2:
        return METRICS[used.pop() if used else DEFAULT]
    others = ", ".join(names[target] for target, metric in metrics.items() if metric != DEFAULT)
    return f"accuracy (mean class accuracy on {others})"
