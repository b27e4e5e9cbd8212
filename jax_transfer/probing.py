"""Stages of a study on frozen features: extract them, and fit linear probes on them."""

import time

import jax

from jax_transfer import estimates, logs, settings
from jax_transfer.logs import Rows, log
from jax_transfer.transfer.probe import PROTOCOLS, probe
from jax_transfer.workspace import Workspace


def features(work: Workspace) -> None:
    """Extracts what the later stages will ask for, one compiled forward pass for the checkpoints of a pre-training.

    Several processes share the work.
    """
    pairs = [(snapshot, target) for target in work.config.targets for snapshot in work.snapshots]
    pairs = pairs[jax.process_index() :: jax.process_count()]
    with logs.progress(2 * len(pairs), "features", "sets") as bar:
        for snapshot, target in pairs:
            for split in ("train", "test"):
                work.features(snapshot, target, split)
                bar.update()


def probes(work: Workspace) -> None:
    """Linear probes on the frozen features: all checkpoints of a target in one compiled program."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        probing = settings.probe_settings(work.config, target)
        num_classes = work.source(target, "train").num_classes
        seeds = [work.config.seed + s for s in range(probing.num_seeds)]
        for method in probing.methods:
            missing = [s for s in work.snapshots if not all((s.name, target, method, seed) in rows for seed in seeds)]
            sound = []
            for snapshot in missing:
                error = work.problem(snapshot, target)
                if not error:
                    sound.append(snapshot)
                    continue
                log.warning("%s of checkpoint %s on %s is left out: %s.", method, snapshot.name, target, error)
                for seed in seeds:
                    rows.append(work.transfer_row(snapshot, target, method, seed, error=error))
            gflops = work.counted(row for row in rows.rows if (row.target, row.method) == (target, method))
            for group in work.groups(sound, target):
                log.info("%s on %s: %d checkpoints", method, target, len(group))
                start = time.perf_counter()
                train, test = (work.stacked_features(group, target, split) for split in ("train", "test"))
                result = probe(
                    PROTOCOLS[method],
                    (train.features, train.labels[0]),
                    (test.features, test.labels[0]),
                    num_classes,
                    probing,
                    work.config.seed,
                )
                seconds = (time.perf_counter() - start) / result.accuracy.size
                count = gflops.setdefault(train.features.shape[-1], result.gflops)
                for i, snapshot in enumerate(group):
                    for s, seed in enumerate(seeds):
                        rows.append(
                            work.transfer_row(
                                snapshot,
                                target,
                                method,
                                seed,
                                learning_rate=float(result.chosen[i, s]),
                                accuracy=float(result.accuracy[i, s]),
                                mean_class_accuracy=float(result.mean_class_accuracy[i, s]),
                                seconds=seconds,
                                gflops=count,
                            )
                        )


def describe_features(work: Workspace) -> str:
    return estimates.checkpoints(work)


def features_gigaflops(work: Workspace) -> float:
    """The forward passes over all images of the targets."""
    images = sum(len(work.source(target, split)) for target in work.config.targets for split in ("train", "test"))
    return sum(len(estimates.own(work, model)) * images * estimates.image(work, model) for model in work.models)


def describe_probes(work: Workspace) -> str:
    return f"{', '.join(work.config.probe.methods)}: {estimates.checkpoints(work)}"
