"""How checkpoints are processed together: those of one feature dimension, as many at a time as fit the memory budget."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.records import Features
from jax_transfer.results import ScoreRow, TransferRow
from jax_transfer.study.snapshots import Snapshot
from jax_transfer.study.workspace import Workspace


def by_feature_dim(work: Workspace, snapshots: list[Snapshot], dataset: str, copies: int = 1) -> list[list[Snapshot]]:
    """Groups checkpoints of equal feature dimension, so that `copies` of a group's stacked features fit the budget."""
    by_dim: dict[int, list[Snapshot]] = {}
    for snapshot in snapshots:
        by_dim.setdefault(work.source_net(snapshot.pretraining).feature_dim, []).append(snapshot)
    images = sum(len(work.source(dataset, split)) for split in ("train", "test"))
    most_classes = max(work.source(source, "train").num_classes for source in work.sources)
    return [
        group
        for dim, group_of_dim in by_dim.items()
        for group in within_budget(work, group_of_dim, images * (dim + most_classes) * 4 * copies, "features", dataset)
    ]


def within_budget(
    work: Workspace, snapshots: list[Snapshot], bytes_each: int, content: str, dataset: str
) -> list[list[Snapshot]]:
    """Splits checkpoints into groups of nearly equal size that fit `config.data.features_gigabytes`; logs it if it must."""
    budget = work.config.data.features_gigabytes
    largest = max(1, int(budget * 1e9 // bytes_each))
    count = math.ceil(len(snapshots) / largest)
    if count > 1:
        log.info(
            "The %s of %d checkpoints on %s exceed config.data.features_gigabytes = %g: processed in %d groups.",
            content,
            len(snapshots),
            dataset,
            budget,
            count,
        )
    positions = np.array_split(np.arange(len(snapshots)), count)
    return [[snapshots[i] for i in group] for group in positions]


def problem(work: Workspace, dataset: str, load: Callable[[str], Features]) -> str:
    """Says what is wrong with a checkpoint's features of a data set; "" if nothing is. `load`: split -> features."""
    num_classes = work.source(dataset, "train").num_classes
    for split in ("train", "test"):
        if found := extract.problem(load(split), num_classes):
            return f"{split} {found}"
    return ""


def known_gflops(work: Workspace, rows: Iterable[TransferRow | ScoreRow]) -> dict[int, float]:
    """Returns feature dimension -> gflops as the rows have it.

    The work of what runs until it converges is that of the first checkpoint, no matter which ones a resumed run lacks.
    """
    dims = {s.name: work.source_net(s.pretraining).feature_dim for s in work.snapshots}
    found: dict[int, float] = {}
    for row in rows:
        if row.checkpoint in dims and not row.error:
            found.setdefault(dims[row.checkpoint], row.gflops)
    return found
