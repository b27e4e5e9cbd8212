"""Groups of checkpoints to process together: they have equal feature dimensions and fit into the memory budget."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.records import Features
from jax_transfer.results import ScoreRow, TransferRow
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.workspace import Workspace


def by_feature_dim(work: Workspace, snapshots: list[Snapshot], dataset: str, copies: int = 1) -> list[list[Snapshot]]:
    """Splits checkpoints into groups of equal feature dimension whose stacked features fit into the memory budget.

    Args:
      dataset: the data set from which the features are extracted. Both its training and its test images count towards
        the memory.
      copies: how many copies of a group's features are in memory at once.
    """
    by_dim: dict[int, list[Snapshot]] = {}
    for snapshot in snapshots:
        by_dim.setdefault(work.checkpoint(snapshot).net.feature_dim, []).append(snapshot)
    images = sum(len(work.source(dataset, split)) for split in ("train", "test"))
    most_classes = max((work.checkpoint(snapshot).net.num_classes for snapshot in snapshots), default=0)
    return [
        group
        for dim, same_dim in by_dim.items()
        for group in within_budget(work, same_dim, images * (dim + most_classes) * 4 * copies, "features", dataset)
    ]


def within_budget(
    work: Workspace, snapshots: list[Snapshot], bytes_each: int, content: str, dataset: str
) -> list[list[Snapshot]]:
    """Splits checkpoints into groups of nearly equal size that fit into `config.data.features_gigabytes`.

    If one group is not enough, the number of groups is logged.

    Args:
      bytes_each: number of bytes that one checkpoint takes.
      content: what takes the memory, for the log message.
      dataset: the data set in use, for the log message.
    """
    budget = work.config.data.features_gigabytes
    largest = max(1, int(budget * 1e9 // bytes_each))
    count = math.ceil(len(snapshots) / largest)
    if count > 1:
        log.info(
            "The %s of %d checkpoints on %s exceed config.data.features_gigabytes = %g: "
            "they are processed in %d groups.",
            content,
            len(snapshots),
            dataset,
            budget,
            count,
        )
    positions = np.array_split(np.arange(len(snapshots)), count)
    return [[snapshots[i] for i in group] for group in positions]


def problem(work: Workspace, dataset: str, load: Callable[[str], Features]) -> str:
    """Returns a message that says why a checkpoint's features on a data set are invalid; "" if they are valid.

    Args:
      load: function from the name of a split to the features of the checkpoint.
    """
    num_classes = work.source(dataset, "train").num_classes
    for split in ("train", "test"):
        if message := extract.problem(load(split), num_classes):
            return f"{split} {message}"
    return ""


def known_gflops(work: Workspace, rows: Iterable[TransferRow | ScoreRow]) -> dict[int, float]:
    """Returns feature dimension -> `gflops` of the first row with that dimension.

    An iterative method that runs until it converges takes a different amount of work for each checkpoint. All rows
    record the work for the first checkpoint. A resumed run must therefore read it from the rows instead of measuring it
    on the first of the remaining checkpoints.
    """
    dims = {s.name: work.checkpoint(s).net.feature_dim for s in work.snapshots}
    result: dict[int, float] = {}
    for row in rows:
        if row.checkpoint in dims and not row.error:
            result.setdefault(dims[row.checkpoint], row.gflops)
    return result
