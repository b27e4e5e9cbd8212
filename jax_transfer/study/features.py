"""The "features" stage: extracts the features of every checkpoint on every target, for the later stages."""

import jax

from jax_transfer import logs
from jax_transfer.study import estimates
from jax_transfer.study.workspace import Workspace


def run(work: Workspace) -> None:
    """Extracts the features that the later stages read.

    Checkpoints with the same net and preprocessing share one compiled forward pass. With several processes, each
    extracts its share.
    """
    pairs = [(snapshot, target) for target in work.config.targets for snapshot in work.snapshots]
    pairs = pairs[jax.process_index() :: jax.process_count()]
    with logs.progress(2 * len(pairs), "features", "sets") as bar:
        for snapshot, target in pairs:
            for split in ("train", "test"):
                work.features(snapshot, target, split)
                bar.update()


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return estimates.checkpoints(work)


def gigaflops(work: Workspace) -> float:
    """Computes the work of the forward passes over all images of the targets, in GFLOP."""
    images = sum(len(work.source(target, split)) for target in work.config.targets for split in ("train", "test"))
    return images * sum(work.gigaflops_per_image(snapshot) for snapshot in work.snapshots)
