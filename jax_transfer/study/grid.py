"""The grid of settings of a target: what its rows are, which points of fine-tuning have rows, and which is chosen."""

from collections.abc import Iterable

from jax_transfer.results import TEST, TEST_GRID, VALIDATION, TransferRow, is_plain
from jax_transfer.study.epochs import Snapshot
from jax_transfer.transfer.finetune import FinetuneSettings, grid

# Value of `config.finetune.choose` and `config.probe.choose` -> the split of the rows of the grid.
SPLIT_OF = {"validation": VALIDATION, "test": TEST_GRID}

# Split of a row -> the images on which its model was trained, and those on which it was tested.
IMAGES = {TEST: ("train", "test"), TEST_GRID: ("train", "test"), VALIDATION: ("fit", "held_out")}


def tried(
    rows: Iterable[TransferRow], snapshot: Snapshot, target: str, split: str
) -> dict[tuple[float, float | None], TransferRow]:
    """Returns the rows of the grid of plain fine-tuning, keyed by (learning rate, weight decay)."""
    key = snapshot.name, target, "finetune", split
    return {
        (row.learning_rate, row.weight_decay): row
        for row in rows
        if (row.checkpoint, row.target, row.method, row.split) == key and is_plain(row)
    }


def rates(row: TransferRow) -> dict[str, float]:
    """Returns the settings of the point of the grid that a row records, as `Candidate.changes`."""
    return {"learning_rate": row.learning_rate, "weight_decay": row.weight_decay or 0.0}


def choice(
    rows: Iterable[TransferRow], snapshot: Snapshot, target: str, settings: FinetuneSettings
) -> TransferRow | None:
    """Returns the row of the grid with the highest accuracy, the first in the order of the grid in case of a tie.

    Returns:
      The row, or None if training diverged at every point.
    """
    found = tried(rows, snapshot, target, SPLIT_OF[settings.choose])
    points = [found[point["learning_rate"], point["weight_decay"]] for point in grid(settings)]
    return max((row for row in points if not row.error), key=lambda row: row.accuracy, default=None)
