"""The grid of settings of a target: what its rows are, which points of fine-tuning have rows, and which is chosen."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax_transfer.results import PLAIN, TEST, TEST_GRID, VALIDATION, TransferRow
from jax_transfer.study import reuse as reusing
from jax_transfer.study.epochs import Snapshot
from jax_transfer.transfer.finetune import FinetuneSettings, Reuse

# Value of `config.finetune.choose` and `config.probe.choose` -> the split of the rows of the grid.
SPLIT_OF = {"validation": VALIDATION, "test": TEST_GRID}

SETTINGS = ("learning_rate", "weight_decay", "source_weight")  # settings that a grid changes

# Split of a row -> the images on which its model was trained, and those on which it was tested.
IMAGES = {TEST: ("train", "test"), TEST_GRID: ("train", "test"), VALIDATION: ("fit", "held_out")}


Point = tuple[float | None, ...]  # learning rate, weight decay and weight of the source, which is None without reuse


def point_of(changes: Mapping[str, float]) -> Point:
    """Returns what identifies a point of the grid.

    >>> point_of({"learning_rate": 0.1, "weight_decay": 0.0})
    (0.1, 0.0, None)
    """
    return tuple(changes.get(name) for name in SETTINGS)


def tried(
    rows: Iterable[TransferRow], snapshot: Snapshot, target: str, split: str, reuse: Reuse | None
) -> dict[Point, TransferRow]:
    """Returns the rows of the grid of a checkpoint on a target, keyed by `point_of`."""
    key = snapshot.name, target, "finetune", split, *columns(reuse).values()
    return {
        point_of({name: getattr(row, name) for name in SETTINGS}): row
        for row in rows
        if (row.checkpoint, row.target, row.method, row.split, row.objective, row.selection) == key
    }


def columns(reuse: Reuse | None) -> dict[str, Any]:
    """Returns the columns by which rows tell ways of fine-tuning apart.

    >>> columns(None)
    {'objective': 'supervised', 'selection': None}
    """
    return {"objective": reuse.objective if reuse else PLAIN, "selection": reuse.selection if reuse else None}


def rates(row: TransferRow) -> dict[str, float]:
    """Returns the settings of the point of the grid that a row records, as `Candidate.changes`."""
    weight = {} if row.source_weight is None else {"source_weight": row.source_weight}
    return {"learning_rate": row.learning_rate, "weight_decay": row.weight_decay or 0.0, **weight}


def choice(
    rows: Iterable[TransferRow], snapshot: Snapshot, target: str, settings: FinetuneSettings, reuse: Reuse | None = None
) -> TransferRow | None:
    """Returns the row of the grid with the highest accuracy, the first in the order of the grid in case of a tie.

    Returns:
      The row, or None if training diverged at every point.
    """
    found = tried(rows, snapshot, target, SPLIT_OF[settings.choose], reuse)
    points = [found[point_of(point)] for point in reusing.points(settings, reuse)]
    return max((row for row in points if not row.error), key=lambda row: row.accuracy, default=None)
