"""The "finetune" stage: fine-tunes the checkpoints, and provides the features of the fine-tuned models."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from jax_transfer import devices, preemption
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data.batches import joined
from jax_transfer.data.crops import crops_of
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.results import TEST, TEST_GRID, VALIDATION, VERSIONS, Rows, TransferRow, is_plain, results_of
from jax_transfer.study import estimates, settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.grid import IMAGES, SPLIT_OF, choice, rates, tried
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import (
    Candidate,
    Finetuned,
    FinetuneSettings,
    finetune,
    grid,
    total_steps,
)


class Run(NamedTuple):
    """A fine-tuning run: a checkpoint, a seed, and the rates that replace those of the config (`Candidate.changes`)."""

    snapshot: Snapshot
    seed: int
    changes: Mapping[str, float] = {}


def run(work: Workspace) -> None:
    """Fine-tunes the checkpoints on every target with every seed, and writes each row as soon as it is available.

    If the config has a grid of settings, all of its points are trained first, with the first seed.
    """
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    devices.wait_for_all("fine-tuning: rows are read")  # a row that one process writes must not be news to another
    for target in work.config.targets:
        tuning, first = settings.finetune_settings(work.config, target), work.config.seed
        snapshots = finetuned_snapshots(work.config, work.snapshots, target)
        wanted = [Run(snapshot, first + s) for s in range(tuning.num_seeds) for snapshot in snapshots]
        todo = _without_result(wanted, target, rows)
        if todo and len(points := grid(tuning)) > 1:
            _try_grid(work, list(dict.fromkeys(own.snapshot for own in todo)), target, points, rows)
            choices = {own.snapshot: choice(rows.rows, own.snapshot, target, tuning) for own in todo}
            _record_choices(work, choices, target, tuning, rows)
            todo = [
                own._replace(changes=rates(row))
                for own in _without_result(wanted, target, rows)
                if (row := choices[own.snapshot])
            ]
        for own, result in _finetune(work, todo, target, keep_features="spectral" in work.config.stages):
            _record(work, own, target, TEST, result, rows)


def _without_result(wanted: Sequence[Run], target: str, rows: Rows) -> list[Run]:
    done = results_of(rows.rows)
    return [own for own in wanted if (own.snapshot.name, target, "finetune", own.seed) not in done]


def _try_grid(work: Workspace, snapshots: list[Snapshot], target: str, points: list[dict], rows: Rows) -> None:
    """Trains all points of the grid that have no row yet, with the first seed, and writes their rows."""
    tuning = settings.finetune_settings(work.config, target)
    split = SPLIT_OF[tuning.choose]
    todo = [
        Run(snapshot, work.config.seed, point)
        for snapshot in snapshots
        for point in points
        if tuple(point.values()) not in tried(rows.rows, snapshot, target, split)
    ]
    for own, result in finetuned(work, todo, target, IMAGES[split], tuning):
        _record(work, own, target, split, result, rows)


def _record_choices(
    work: Workspace,
    choices: Mapping[Snapshot, TransferRow | None],
    target: str,
    tuning: FinetuneSettings,
    rows: Rows,
) -> None:
    """Writes the results that need no further training: the points chosen by test accuracy, and failed grids."""
    for snapshot, row in choices.items():
        if row is None:
            error = f"the loss is not finite with any of the {len(grid(tuning))} settings of the grid"
            for s in range(tuning.num_seeds):
                rows.append(work.transfer_row(snapshot, target, "finetune", work.config.seed + s, error=error))
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
        "finetune checkpoint %s on %s, seed %d%s: %saccuracy %.4f (%.1f s)",
        own.snapshot.name,
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
    points = max(len(grid(settings.finetune_settings(work.config, target))) for target in work.config.targets)
    return estimates.checkpoints(work) + (f", up to {points} settings each" if points > 1 else "")


def gigaflops(work: Workspace) -> float:
    """Computes the work of fine-tuning and testing all models, in GFLOP."""
    total = 0.0
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        step, points = estimates.finetune_step_gigaflops(work, target), len(grid(tuning))
        runs = {TEST: tuning.num_seeds}
        if points > 1:
            runs[SPLIT_OF[tuning.choose]] = points
            runs[TEST] -= tuning.choose == "test"  # the first seed's result is a point of the grid
        for split, count in runs.items():
            train, test = (len(work.source(target, part)) for part in IMAGES[split])
            for snapshot in finetuned_snapshots(work.config, work.snapshots, target):
                steps = total_steps(tuning, train, target)
                total += count * (steps * step[snapshot] + test * work.gigaflops_per_image(snapshot))
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
    made_from = (source.fingerprint, train.fingerprint, _tuning_key(tuning, changes), work.config.seed)

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


def _tuning_key(tuning: FinetuneSettings, changes: Mapping[str, float]) -> str:
    """Returns a text that contains all settings that determine a fine-tuned model."""
    values = dataclasses.asdict(tuning)
    # The choice of checkpoints and the number of seeds change no fine-tuned model, and `remat` only by rounding.
    values |= {"checkpoints": None, "num_seeds": None}
    for name in ("remat", "learning_rates", "weight_decays", "choose"):
        del values[name]
    values["optimizer"] |= changes
    # Files older than these settings stay valid.
    if values["microbatches"] == 1:
        del values["microbatches"]
    if values["optimizer"]["head_learning_rate_factor"] == 1:
        del values["optimizer"]["head_learning_rate_factor"]
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

    All checkpoints with the same net and preprocessing train together, spread over the devices. With several processes,
    each trains its share, and all of them yield all results.

    Args:
      todo: the training runs.
      on_tuned: called with (run, fine-tuned weights) in the process that trained them. The call comes before the result
        is yielded, so that a kill between the two loses nothing.
      alone: whether this process trains all of `todo`, independently of the other processes.
      epochs: the epochs after which a result is yielded, see `finetune`; empty for one result at the end.
    """
    process, num_processes = (0, 1) if alone else (jax.process_index(), jax.process_count())
    mesh = devices.make_mesh(sweep=jax.local_device_count())
    kinds: dict[tuple[Net, Preprocessing], list[Run]] = {}
    for own in todo:
        kind = work.tuned_net(own.snapshot, target), work.checkpoint(own.snapshot).preprocessing
        kinds.setdefault(kind, []).append(own)
    for (net, preprocessing), runs in kinds.items():
        share = runs[process::num_processes]
        crops = crops_of((tuning.augment,))
        train = work.feed(target, splits[0], preprocessing, crops=crops).on(mesh)
        test = work.feed(target, splits[1], preprocessing).on(mesh)
        results = finetune(
            {f"checkpoint {own.snapshot.name}": work.checkpoint(own.snapshot) for own in share},
            [Candidate(f"checkpoint {own.snapshot.name}", own.seed, own.changes) for own in share],
            net,
            functools.partial(OBJECTIVES["supervised"], net, tuning.augment),
            joined({"train": (train, tuning.batch_size)}),
            test,
            preprocessing,
            tuning,
            mesh,
            epochs=epochs,
            eval_batch_size=work.config.data.eval_batch_size,
        )
        # The same number of iterations in all processes, because each of them takes part in `gather`.
        for _ in range(-(-len(runs) // num_processes) * max(1, len(epochs))):
            if not alone:
                preemption.stop_if_requested()
            result = next(results, None)  # None if other processes have one more result
            if on_tuned and result and result.model is not None:
                on_tuned(share[result.index], result.model)
            values = result and {**vars(result), "model": None}
            for other, gathered in enumerate([values] if alone else devices.gather(values)):
                if gathered:
                    yield runs[other::num_processes][gathered["index"]], Finetuned(**gathered)
