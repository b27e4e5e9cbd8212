"""The "probe" stage: fits linear classifiers on the frozen features of every checkpoint."""

import functools
import time

import numpy as np

from jax_transfer.features.extract import stack
from jax_transfer.logs import log
from jax_transfer.results import GRID, TEST, Rows, results_of
from jax_transfer.study import estimates, groups, settings, zero_shot
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.grid import SPLIT_OF
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.probe import PROTOCOLS, Point, ProbeSettings, grid_points, probe


def run(work: Workspace) -> None:
    """Fits linear probes on frozen features. For each target, all probes train in one compiled program."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        probing = settings.probe_settings(work.config, target)
        seeds = [work.config.seed + s for s in range(probing.num_seeds)]
        for method in probing.methods:
            if method == zero_shot.METHOD:
                zero_shot.run(work, target, rows)
                continue
            if len(grid_points(PROTOCOLS[method], probing)) > 1:
                _forget_random_choices(rows, target, method)
            done = results_of(rows.rows)
            missing = [s for s in work.snapshots if not all((s.name, target, method, seed) in done for seed in seeds)]
            valid = [snapshot for snapshot in missing if _is_valid(work, target, method, snapshot, seeds, rows)]
            own = [row for row in rows.rows if (row.target, row.method) == (target, method)]
            gflops = groups.known_gflops(work, (row for row in own if row.split == TEST))
            gflops_of_grid = groups.known_gflops(work, (row for row in own if row.split in GRID))
            for group in groups.by_feature_dim(work, valid, target):
                log.info("%s on %s: %d checkpoints", method, target, len(group))
                _probe_group(work, target, method, group, seeds, probing, gflops, gflops_of_grid, rows)


def _forget_random_choices(rows: Rows, target: str, method: str) -> None:
    """Drops results whose settings were chosen on a random split, as earlier versions did; they have no weight decay.

    They are computed again, since the settings are now chosen on a stratified split, and each grid point has a row.
    """
    kept = [row for row in rows.rows if (row.target, row.method) != (target, method) or row.weight_decay is not None]
    if len(kept) < len(rows.rows):
        number = len(rows.rows) - len(kept)
        log.warning("%s on %s: %d rows chose on a random split and are computed again.", method, target, number)
        rows.replace(kept)


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
    gflops_of_grid: dict[int, float],
    rows: Rows,
) -> None:
    """Probes checkpoints with equal feature dimensions together and writes their rows.

    The rows of the grid come before the result that was chosen from it, so that a study that is killed between them
    resumes with the same file.

    Args:
      gflops: feature dimension -> work of the result's training, see `groups.known_gflops`; a missing dimension is
        added.
      gflops_of_grid: the same for the training of a grid point.
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
    dim, done = train.features.shape[-1], results_of(rows.rows)
    num_rows = result.accuracy.size * (1 + (len(result.points) if result.grid else 0))
    seconds = (time.perf_counter() - start) / num_rows
    for i, s in np.ndindex(result.accuracy.shape):
        snapshot, seed = group[i], seeds[s]
        if (snapshot.name, target, method, seed) in done:
            continue
        make_row = functools.partial(work.transfer_row, snapshot, target, method, seed, seconds=seconds)
        if grid := result.grid:
            for j, point in enumerate(result.points):
                row = make_row(
                    **_columns(point),
                    split=SPLIT_OF[probing.choose],
                    accuracy=float(grid.accuracy[i, s, j]),
                    mean_class_accuracy=float(grid.mean_class_accuracy[i, s, j]),
                    gflops=gflops_of_grid.setdefault(dim, grid.gflops),
                    num_train=grid.num_train,
                    num_test=grid.num_test,
                )
                rows.append(row)
        rows.append(
            make_row(
                **_columns(result.points[result.chosen[i, s]]),
                accuracy=float(result.accuracy[i, s]),
                mean_class_accuracy=float(result.mean_class_accuracy[i, s]),
                gflops=gflops.setdefault(dim, result.gflops),
            )
        )


def _columns(point: Point) -> Point:
    """Returns the columns of a row for the settings of a probe: its l2 is a weight decay."""
    return {"weight_decay" if name == "l2" else name: value for name, value in point.items()}


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return f"{', '.join(work.config.probe.methods)}: {estimates.checkpoints(work)}"
