"""Compares the checkpoints that were given to a study by name, together with the study's own best and last epochs."""

import dataclasses
from collections.abc import Sequence

import rich.box
from rich.table import Table
from rich.text import Text

from jax_transfer.report.best import (
    STAR,
    Point,
    accuracy_by,
    best_of,
    given,
    heading,
    label_of,
    methods_of,
    metric_cell,
    metric_of,
    metric_words,
    seed_spread,
    table_caption,
    trajectories,
)
from jax_transfer.report.grid import SWEPT, is_result, swept
from jax_transfer.report.style import shorten_all
from jax_transfer.report.tables import EN_DASH, method_name, percent, target_names
from jax_transfer.results import Row


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint in a comparison.

    Attributes:
      checkpoint: its name in the rows.
      label: its display name, see `label_of`.
      role: why an epoch of the study's own pre-training takes part: "best epoch", "last epoch" or "best and last
        epoch"; "" for a given checkpoint.
    """

    checkpoint: str
    label: str
    role: str
    point: Point


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The checkpoints in one target and method, by descending accuracy; of equal ones, the first in the rows is first.

    Attributes:
      metric: a key of `records.METRICS`.
      swept: whether the settings were chosen on the test images, see `grid.swept`.
    """

    target: str
    method: str
    metric: str
    swept: bool
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The checkpoint with the highest accuracy."""
        return self.candidates[0]

    @property
    def winners(self) -> tuple[Candidate, ...]:
        """The checkpoints with the highest accuracy."""
        return tuple(candidate for candidate in self.candidates if candidate.point.mean == self.best.point.mean)

    def behind(self, candidate: Candidate) -> float:
        """Returns by how much the accuracy of a candidate is below the highest one, in [0, 1]."""
        return self.best.point.mean - candidate.point.mean

    @property
    def num_seeds(self) -> int:
        """The largest number of seeds of a candidate."""
        return max(candidate.point.num_seeds for candidate in self.candidates)

    @property
    def seed_spread(self) -> float | None:
        """Highest minus lowest accuracy over seeds, the larger value of the first two; None with one seed."""
        return seed_spread((candidate.point for candidate in self.candidates[:2]), self.num_seeds)


def comparisons(transfer_rows: Sequence[Row]) -> list[Comparison]:
    """Compares the checkpoints of each target and method for which a given checkpoint has an accuracy.

    >>> row = {"target": "tfds:mnist", "method": "probe"}
    >>> rows = [{**row, "checkpoint": name, "epoch": epoch, "accuracy": accuracy}
    ...         for name, epoch, accuracy in (("a", None, 0.8), ("run/b", None, 0.9), ("1", 1, 0.7), ("5", 5, 0.6))]
    >>> (comparison,) = comparisons(rows)
    >>> [(candidate.label, candidate.role) for candidate in comparison.candidates]
    [('run/b', ''), ('a', ''), ('epoch 1', 'best epoch'), ('epoch 5', 'last epoch')]
    """
    results = [row for row in transfer_rows if is_result(row)]
    swept_pairs = swept(transfer_rows)
    return [
        Comparison(target, method, metric_of(results, target), (target, method) in swept_pairs, tuple(candidates))
        for target in dict.fromkeys(row["target"] for row in results)
        for method in methods_of(results, target)
        if (candidates := _candidates(results, target, method)) and not all(found.role for found in candidates)
    ]


def _candidates(results: Sequence[Row], target: str, method: str) -> list[Candidate]:
    """Returns the given checkpoints, and the best and the last epoch of each trajectory, by descending accuracy."""
    own = [row for row in results if (row["target"], row["method"]) == (target, method)]
    points = accuracy_by("checkpoint", own, target, method)
    roles = {row["checkpoint"]: "" for row in given(own)}
    for rows in trajectories(own).values():
        found = accuracy_by("checkpoint", rows, target, method)
        if found:
            best, last = best_of(found), list(found)[-1]
            roles |= {best: "best epoch", last: "last epoch"} if best != last else {best: "best and last epoch"}
    labels = {row["checkpoint"]: label_of(row) for row in own}  # in the order of the rows, which decides ties
    candidates = [
        Candidate(name, label, roles[name], points[name])
        for name, label in labels.items()
        if name in roles and name in points
    ]
    return sorted(candidates, key=lambda candidate: -candidate.point.mean)


def comparison_rows(compared: Sequence[Comparison]) -> list[Row]:
    """Formats comparisons for display: one dict per checkpoint, target and method, column title -> text or integer.

    >>> row = {"target": "tfds:mnist", "method": "probe", "epoch": None}
    >>> rows = [{**row, "checkpoint": "a", "accuracy": 0.8}, {**row, "checkpoint": "run/b", "accuracy": 0.9}]
    >>> for cells in comparison_rows(comparisons(rows)):
    ...     print(cells["Checkpoint"], cells["Behind (points)"])
    run/b 0.00
    a 10.00
    """
    names = target_names(comparison.target for comparison in compared)
    metrics = [comparison.metric for comparison in compared]
    return [
        {
            "Target": names[comparison.target],
            "Method": method_name(comparison.method) + (f" ({SWEPT})" if comparison.swept else ""),
            **metric_cell(metrics, comparison.metric),
            "Checkpoint": f"{candidate.label} ({candidate.role})" if candidate.role else candidate.label,
            heading(metrics): percent(candidate.point.mean),
            "Behind (points)": percent(comparison.behind(candidate), unit=""),
            "Seed spread (points)": percent(seed_spread([candidate.point], candidate.point.num_seeds), unit=""),
            "Seeds": candidate.point.num_seeds,
        }
        for comparison in compared
        for candidate in comparison.candidates
    ]


def comparison_table(compared: Sequence[Comparison]) -> Table:
    """Builds a terminal table of the best and the next checkpoint of each comparison that fits into 80 columns.

    >>> row = {"target": "tfds:mnist", "method": "probe", "epoch": None}
    >>> rows = [{**row, "checkpoint": "a", "accuracy": 0.8}, {**row, "checkpoint": "run/b", "accuracy": 0.9}]
    >>> import rich
    >>> rich.print(comparison_table(comparisons(rows)))
    Best checkpoint per target, by name...
    """
    names = target_names(comparison.target for comparison in compared)
    metric = metric_words({comparison.target: comparison.metric for comparison in compared}, names)
    table = Table(
        title="Best checkpoint per target, by name",
        caption=table_caption(metric, any(comparison.swept for comparison in compared)),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    for column in ("Target", "Method"):
        table.add_column(column)
    short = shorten_all((c.label for comparison in compared for c in comparison.candidates), 12)
    longest = max((len(comparison.best.label) for comparison in compared), default=0)
    table.add_column("Best\ncheckpoint", overflow="fold", width=min(max(longest, 10), 20))
    table.add_column("\n%", justify="right", no_wrap=True)
    table.add_column("\nNext", no_wrap=True)
    for column in ("Lead\npoints", "Seed\nspread"):
        table.add_column(column, justify="right", no_wrap=True)
    for comparison in compared:
        second = next(iter(comparison.candidates[1:]), None)
        cells = [names[comparison.target], method_name(comparison.method) + STAR * comparison.swept]
        cells += [comparison.best.label, percent(comparison.best.point.mean, unit="")]
        cells += [
            short[second.label] if second else EN_DASH,
            percent(comparison.behind(second) if second else None, unit=""),
        ]
        table.add_row(*map(Text, [*cells, percent(comparison.seed_spread, unit="")]))
    return table
