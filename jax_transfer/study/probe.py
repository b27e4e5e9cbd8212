"""The "probe" stage: fits linear classifiers on the frozen features of every checkpoint."""

import functools
import time

from jax_transfer.features.extract import stack
from jax_transfer.logs import log
from jax_transfer.results import Rows, results_of
from jax_transfer.study import estimates, groups, settings
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.probe import PROTOCOLS, ProbeSettings, probe


def run(work: Workspace) -> None:
    """Fits linear probes on frozen features. For each target, all probes train in one compiled program."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        probing = settings.probe_settings(work.config, target)
        seeds = [work.config.seed + s for s in range(probing.num_seeds)]
        for method in probing.methods:
            done = results_of(rows.rows)
            missing = [s for s in work.snapshots if not all((s.name, target, method, seed) in done for seed in seeds)]
            valid = [snapshot for snapshot in missing if _is_valid(work, target, method, snapshot, seeds, rows)]
            gflops = groups.known_gflops(
                work, (row for row in rows.rows if (row.target, row.method) == (target, method))
            )
            for group in groups.by_feature_dim(work, valid, target):
                log.info("%s on %s: %d checkpoints", method, target, len(group))
                _probe_group(work, target, method, group, seeds, probing, gflops, rows)


def _is_valid(work: Workspace, target: str, method: str, snapshot: Snapshot, seeds: list, rows: Rows) -> bool:
    """Returns whether the features of a checkpoint are valid; if not, writes rows with the reason."""
    error = groups.problem(work, target, functools.partial(work.features, snapshot, target))
    if error:
        log.warning("%s of checkpoint %s on %s is skipped: %s.", method, snapshot.name, target, error)
        for seed in seeds:
            rows.append(work.transfer_row(snapshot, target, method, seed, error=error))
    return not error


def _probe_group(
    work: Workspace,
    target: str,
    method: str,
    group: list[Snapshot],
    seeds: list,
    probing: ProbeSettings,
    gflops: dict[int, float],
    rows: Rows,
) -> None:
    """Probes checkpoints with equal feature dimensions together and writes their rows.

    Args:
      gflops: feature dimension -> work of a probe, see `groups.known_gflops`; a missing dimension is added.
    """
    start = time.perf_counter()
    train, test = (stack([work.features(s, target, split) for s in group]) for split in ("train", "test"))
    result = probe(
        PROTOCOLS[method],
        (train.features, train.labels[0]),
        (test.features, test.labels[0]),
        work.source(target, "train").num_classes,
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


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return f"{', '.join(work.config.probe.methods)}: {estimates.checkpoints(work)}"
