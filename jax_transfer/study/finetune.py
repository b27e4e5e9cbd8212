"""The "finetune" stage: fine-tunes the checkpoints, and provides the features of the fine-tuned models."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

from jax_transfer import devices, preemption
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data.batches import joined
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.results import TEST, TEST_GRID, VALIDATION, VERSIONS, Rows, TransferRow, is_plain, results_of
from jax_transfer.study import estimates, settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.grid import IMAGES, SPLIT_OF, choice, columns, point_of, rates, tried
from jax_transfer.study.reuse import num_source_views, points, training
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.finetune import (
    Candidate,
    Finetuned,
    FinetuneSettings,
    Reuse,
    finetune,
    grid,
    total_steps,
)

T = TypeVar("T")


class Run(NamedTuple):
    """A fine-tuning run.

    Attributes:
      snapshot: the checkpoint to start from.
      seed: seed of the head, the batches and the augmentation.
      changes: settings that replace those of the config (`Candidate.changes`).
      reuse: how pre-training data is reused; None: not at all.
    """

    snapshot: Snapshot
    seed: int
    changes: Mapping[str, float] = {}
    reuse: Reuse | None = None


def run(work: Workspace) -> None:
    """Fine-tunes the checkpoints on every target with every seed, and writes each row as soon as it is available.

    The ways to reuse pre-training data follow plain fine-tuning. If there is a grid of settings, all of its points are
    trained first, with the first seed.
    """
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    devices.wait_for_all("fine-tuning: rows are read")  # a row that one process writes must not be news to another
    for target in work.config.targets:
        for reuse in (None, *settings.finetune_settings(work.config, target).reuse):
            _run(work, target, reuse, rows)


def _run(work: Workspace, target: str, reuse: Reuse | None, rows: Rows) -> None:
    """Fine-tunes the checkpoints on a target in one way."""
    tuning, first = settings.finetune_settings(work.config, target), work.config.seed
    snapshots = finetuned_snapshots(work.config, work.snapshots, target)
    # Without a grid, plain fine-tuning has the settings of the config, which need not be inputs of the program.
    tried_points = points(tuning, reuse)
    changes = {} if reuse is None else tried_points[0]
    wanted = [Run(snapshot, first + s, changes, reuse) for s in range(tuning.num_seeds) for snapshot in snapshots]
    todo = _without_result(wanted, target, rows)
    if todo and len(tried_points) > 1:
        _try_grid(work, list(dict.fromkeys(own.snapshot for own in todo)), target, reuse, tried_points, rows)
        choices = {own.snapshot: choice(rows.rows, own.snapshot, target, tuning, reuse) for own in todo}
        _record_choices(work, choices, target, tuning, reuse, rows)
        todo = [
            own._replace(changes=rates(row))
            for own in _without_result(wanted, target, rows)
            if (row := choices[own.snapshot])
        ]
    keep_features = "spectral" in work.config.stages and reuse is None
    for own, result in _finetune(work, todo, target, keep_features):
        _record(work, own, target, TEST, result, rows)


def _without_result(wanted: Sequence[Run], target: str, rows: Rows) -> list[Run]:
    done = {reuse: results_of(rows.rows, **columns(reuse)) for reuse in dict.fromkeys(own.reuse for own in wanted)}
    return [own for own in wanted if (own.snapshot.name, target, "finetune", own.seed) not in done[own.reuse]]


def _try_grid(
    work: Workspace, snapshots: list[Snapshot], target: str, reuse: Reuse | None, grid_points: list[dict], rows: Rows
) -> None:
    """Trains all points of the grid that have no row yet, with the first seed, and writes their rows."""
    tuning = settings.finetune_settings(work.config, target)
    split = SPLIT_OF[tuning.choose]
    todo = [
        Run(snapshot, work.config.seed, point, reuse)
        for snapshot in snapshots
        for point in grid_points
        if point_of(point) not in tried(rows.rows, snapshot, target, split, reuse)
    ]
    for own, result in finetuned(work, todo, target, IMAGES[split], tuning):
        _record(work, own, target, split, result, rows)


def _record_choices(
    work: Workspace,
    choices: Mapping[Snapshot, TransferRow | None],
    target: str,
    tuning: FinetuneSettings,
    reuse: Reuse | None,
    rows: Rows,
) -> None:
    """Writes the results that need no further training: the points chosen by test accuracy, and failed grids."""
    for snapshot, row in choices.items():
        if row is None:
            error = f"the loss is not finite with any of the {len(points(tuning, reuse))} settings of the grid"
            for s in range(tuning.num_seeds):
                failed = {**columns(reuse), "error": error}
                rows.append(work.transfer_row(snapshot, target, "finetune", work.config.seed + s, **failed))
        elif row.split == TEST_GRID:
            rows.append(dataclasses.replace(row, split=TEST))


def _record(work: Workspace, own: Run, target: str, split: str, result: Finetuned, rows: Rows) -> None:
    """Writes the row of a run and logs its accuracy."""
    optimizer = settings.finetune_settings(work.config, target).optimizer
    num_train, num_test = (len(work.source(target, part)) for part in IMAGES[split])
    row = work.transfer_row(
        own.snapshot,
        target,
        "finetune",
        own.seed,
        **columns(own.reuse),
        **{"learning_rate": optimizer.learning_rate, "weight_decay": optimizer.weight_decay, **own.changes},
        **result.metrics,
        seconds=result.seconds,
        gflops=result.gflops,
        error=divergence(result),
        split=split,
        num_train=num_train,
        num_test=num_test,
    )
    rows.append(row)
    point = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in own.changes.items())
    log.info(
        "finetune checkpoint %s%s on %s, seed %d%s: %saccuracy %.4f (%.1f s)",
        own.snapshot.name,
        f" ({own.reuse})" if own.reuse else "",
        target,
        own.seed,
        point,
        "validation " if split == VALIDATION else "",
        row.accuracy,
        row.seconds,
    )


def divergence(result: Finetuned) -> str:
    """Returns a message that says at which step training diverged; "" if it did not."""
    return "" if result.diverged_at is None else f"the loss is not finite at step {result.diverged_at}"


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    ways = {target: [None, *settings.finetune_settings(work.config, target).reuse] for target in work.config.targets}
    most = max(len(points(settings.finetune_settings(work.config, t), way)) for t, own in ways.items() for way in own)
    named = dict.fromkeys(str(way) for own in ways.values() for way in own if way)
    return ", ".join((estimates.checkpoints(work), *named)) + (f", up to {most} settings each" if most > 1 else "")


def gigaflops(work: Workspace) -> float:
    """Computes the work of fine-tuning and testing all models, in GFLOP.

    With reuse, a step is estimated from its number of images.
    """
    total = 0.0
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        step = estimates.finetune_step_gigaflops(work, target)
        for reuse in (None, *settings.finetune_settings(work.config, target).reuse):
            runs, count = {TEST: tuning.num_seeds}, len(points(tuning, reuse))
            if count > 1:
                runs[SPLIT_OF[tuning.choose]] = count
                runs[TEST] -= tuning.choose == "test"  # the first seed's result is a point of the grid
            images = 1 + (
                num_source_views(reuse) * (reuse.batch_size or tuning.batch_size) / tuning.batch_size if reuse else 0
            )
            for split, repeats in runs.items():
                train, test = (len(work.source(target, part)) for part in IMAGES[split])
                for snapshot in finetuned_snapshots(work.config, work.snapshots, target):
                    steps = total_steps(tuning, train, target)
                    total += repeats * (steps * images * step[snapshot] + test * work.gigaflops_per_image(snapshot))
    return total


def tuned_checkpoint(
    work: Workspace, snapshot: Snapshot, target: str, changes: Mapping[str, float], model: Model | None = None
) -> Checkpoint:
    """Returns a checkpoint after fine-tuning on a target with the first seed.

    Only the features of a fine-tuned model are kept on disk, not its weights. The cache key of the features
    includes everything that determines the weights.

    Args:
      changes: the chosen point of the grid, see `chosen_rates`.
      model: the fine-tuned weights. If this is None and a feature file is missing, the checkpoint is fine-tuned again.
    """
    tuning = settings.finetune_settings(work.config, target)
    source, train = work.checkpoint(snapshot), work.source(target, "train")
    made_from = (source.fingerprint, train.fingerprint, tuning_key(tuning, changes), work.config.seed)

    def read_model() -> Model:
        if model is not None:
            return model
        log.info("Fine-tuning checkpoint %s on %s again: its features are missing.", snapshot.name, target)
        models: list[Model] = []
        todo = [Run(snapshot, work.config.seed, changes)]
        splits = ("train", "test")
        for _ in finetuned(work, todo, target, splits, tuning, lambda _, tuned: models.append(tuned), alone=True):
            pass
        return models[0]

    return Checkpoint.stored(
        source.name,
        work.tuned_net(snapshot, target),
        read_model,
        source.preprocessing,
        settings=source.settings,
        known_fingerprint=f"fine-tuned {(*made_from, VERSIONS['transfer'])}",
    )


def chosen_rates(work: Workspace, snapshots: Sequence[Snapshot], target: str) -> dict[Snapshot, dict[str, float]]:
    """Returns checkpoint -> the point of the grid with which it was fine-tuned on a target; {} without a grid."""
    if len(grid(settings.finetune_settings(work.config, target))) == 1:
        return {snapshot: {} for snapshot in snapshots}
    rows, key = filter(is_plain, Rows(work.results, "transfer").rows), (target, "finetune", TEST)
    chosen = {row.checkpoint: row for row in rows if (row.target, row.method, row.split) == key}
    return {snapshot: rates(chosen[snapshot.name]) for snapshot in snapshots}


def tuning_key(tuning: FinetuneSettings, changes: Mapping[str, float]) -> str:
    """Returns a text that contains all settings that determine a fine-tuned model."""
    values = dataclasses.asdict(tuning)
    # The choice of checkpoints and the number of seeds change no fine-tuned model, and `remat` only by rounding.
    values |= {"checkpoints": None, "num_seeds": None}
    for name in ("remat", "learning_rates", "weight_decays", "choose", "reuse"):
        del values[name]
    values["optimizer"] |= changes
    # Files older than these settings stay valid.
    if values["microbatches"] == 1:
        del values["microbatches"]
    if values["head_std"] == 0.01:
        del values["head_std"]
    for name, usual in (("head_learning_rate_factor", 1), ("b1", 0.9), ("b2", 0.999), ("clip_norm", None)):
        if values["optimizer"][name] == usual:
            del values["optimizer"][name]
    return json.dumps(values, sort_keys=True)


def tune_again(work: Workspace, snapshots: list[Snapshot], target: str) -> None:
    """Fine-tunes the checkpoints whose fine-tuned features are not on disk, with the first seed.

    They are trained together. With several processes, each trains its share.
    """
    splits = [work.source(target, split) for split in ("train", "test")]
    chosen = chosen_rates(work, snapshots, target)

    def is_missing(snapshot: Snapshot) -> bool:
        tuned = tuned_checkpoint(work, snapshot, target, chosen[snapshot])
        return not all(work.features_of.is_kept(tuned, split) for split in splits)

    missing = [snapshot for snapshot in snapshots if is_missing(snapshot)]
    if missing:
        log.info("Fine-tuning %d checkpoints on %s again: their features are missing.", len(missing), target)
    # The processes may disagree on which features are missing, because others write files in the meantime.
    # Therefore no process waits for the results of another one.
    own = missing[jax.process_index() :: jax.process_count()]
    share = [Run(snapshot, work.config.seed, chosen[snapshot]) for snapshot in own]
    for _ in _finetune(work, share, target, keep_features=True, alone=True):
        pass
    devices.wait_for_all(f"tuned again on {target}")


def _finetune(
    work: Workspace, todo: Sequence[Run], target: str, keep_features: bool, alone: bool = False
) -> Iterator[tuple[Run, Finetuned]]:
    """Fine-tunes checkpoints on a target, and caches the features of the first seed's models if `keep_features`."""
    tuning = settings.finetune_settings(work.config, target)

    def cache_features(own: Run, model: Model) -> None:
        if own.seed == work.config.seed:
            model = devices.replicate(model, work.mesh)
            tuned = tuned_checkpoint(work, own.snapshot, target, own.changes, model)
            for split in ("train", "test"):
                work.features_of(tuned, work.source(target, split))

    on_tuned = cache_features if keep_features else None
    yield from finetuned(work, todo, target, ("train", "test"), tuning, on_tuned, alone)


def finetuned(
    work: Workspace,
    todo: Sequence[Run],
    target: str,
    splits: tuple[str, str],
    tuning: FinetuneSettings,
    on_tuned: Callable[[Run, Model], None] | None = None,
    alone: bool = False,
    epochs: Sequence[int] = (),
) -> Iterator[tuple[Run, Finetuned]]:
    """Fine-tunes checkpoints on the first split and tests them on the second split.

    All checkpoints with the same net and preprocessing train together, spread over the devices, unless they reuse
    pre-training data. With several processes, each trains its share, and all of them yield all results.

    Args:
      todo: the training runs.
      on_tuned: called with (run, fine-tuned weights) in the process that trained them. The call comes before the result
        is yielded, so that a kill between the two loses nothing.
      alone: whether this process trains all of `todo`, independently of the other processes.
      epochs: the epochs after which a result is yielded, see `finetune`; empty for one result at the end.
    """
    process, num_processes = (0, 1) if alone else (jax.process_index(), jax.process_count())
    mesh = devices.make_mesh(sweep=jax.local_device_count())
    kinds: dict[tuple[Net, Preprocessing, Reuse | None, Snapshot | None], list[Run]] = {}
    for own in todo:
        kind = work.tuned_net(own.snapshot, target), work.checkpoint(own.snapshot).preprocessing
        # Each checkpoint selects its own source images.
        kinds.setdefault((*kind, own.reuse, own.snapshot if own.reuse else None), []).append(own)
    for (net, preprocessing, reuse, _), runs in kinds.items():
        share = runs[process::num_processes]
        needed = training(work, runs[0].snapshot, target, splits[0], net, tuning, reuse, mesh)
        test = work.feed(target, splits[1], preprocessing).on(mesh)
        results = finetune(
            {f"checkpoint {own.snapshot.name}": work.checkpoint(own.snapshot) for own in share},
            [Candidate(f"checkpoint {own.snapshot.name}", own.seed, own.changes, needed.arrays) for own in share],
            net,
            needed.make_objective,
            joined(needed.feeds),
            test,
            preprocessing,
            tuning,
            mesh,
            epochs=epochs,
            eval_batch_size=work.config.data.eval_batch_size,
        )
        yield from gathered(runs, results, on_tuned, alone, max(1, len(epochs)))


def gathered(
    runs: Sequence[T],
    results: Iterator[Finetuned],
    on_tuned: Callable[[T, Model], None] | None,
    alone: bool = False,
    results_each: int = 1,
) -> Iterator[tuple[T, Finetuned]]:
    """Yields the results of all processes, each of which trains its share of some runs.

    Args:
      runs: what is trained, by all processes together; this one trains `runs[process_index::process_count]`.
      results: the results of this process.
      on_tuned, alone: see `finetuned`.
      results_each: number of results of each run.
    """
    process, num_processes = (0, 1) if alone else (jax.process_index(), jax.process_count())
    # The same number of iterations in all processes, because each of them takes part in `gather`.
    for _ in range(-(-len(runs) // num_processes) * results_each):
        if not alone:
            preemption.stop_if_requested()
        result = next(results, None)  # None if other processes have one more result
        if on_tuned and result and result.model is not None:
            on_tuned(runs[process::num_processes][result.index], result.model)
        values = result and {**vars(result), "model": None}
        for other, each in enumerate([values] if alone else devices.gather(values)):
            if each:
                yield runs[other::num_processes][each["index"]], Finetuned(**each)
