"""The "finetune" stage: fine-tunes the checkpoints, and provides the features of the fine-tuned models."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import jax

from jax_transfer import devices, preemption
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data.batches import joined
from jax_transfer.data.crops import crops_of
from jax_transfer.logs import log
from jax_transfer.results import VERSIONS, Rows, results_of
from jax_transfer.study import estimates, settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import Candidate, Finetuned, FinetuneSettings, finetune, total_steps


def run(work: Workspace) -> None:
    """Fine-tunes the checkpoints on every target with every seed, and writes each row as soon as it is available."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        seeds = range(work.config.seed, work.config.seed + tuning.num_seeds)
        done = results_of(rows.rows)
        missing = [
            (snapshot, seed)
            for seed in seeds
            for snapshot in finetuned_snapshots(work.config, target)
            if (snapshot.name, target, "finetune", seed) not in done
        ]
        for snapshot, seed, result in _finetune(work, missing, target, keep_features="spectral" in work.config.stages):
            rows.append(
                work.transfer_row(
                    snapshot,
                    target,
                    "finetune",
                    seed,
                    learning_rate=tuning.optimizer.learning_rate,
                    weight_decay=tuning.optimizer.weight_decay,
                    **result.metrics,
                    seconds=result.seconds,
                    gflops=result.gflops,
                    error=divergence(result),
                )
            )
            log.info(
                "finetune checkpoint %s on %s, seed %d: accuracy %.4f (%.1f s)",
                snapshot.name,
                target,
                seed,
                result.metrics["accuracy"],
                result.seconds,
            )


def divergence(result: Finetuned) -> str:
    """Returns a message that says at which step training diverged; "" if it did not."""
    return "" if result.diverged_at is None else f"the loss is not finite at step {result.diverged_at}"


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return estimates.checkpoints(work)


def gigaflops(work: Workspace) -> float:
    """Computes the work of fine-tuning and testing all models, in GFLOP."""
    total = 0.0
    for (model, target), step in estimates.finetune_step_gigaflops(work).items():
        tuning = settings.finetune_settings(work.config, target)
        train, test = (len(work.source(target, split)) for split in ("train", "test"))
        one = total_steps(tuning, train, target) * step + test * estimates.gigaflops_per_image(work, model)
        tuned = [s for s in finetuned_snapshots(work.config, target) if s.pretraining.model == model]
        total += len(tuned) * tuning.num_seeds * one
    return total


def tuned_checkpoint(work: Workspace, snapshot: Snapshot, target: str, model: Model | None = None) -> Checkpoint:
    """Returns a checkpoint after fine-tuning on a target with the first seed.

    Only the features of a fine-tuned model are kept on disk, not its weights. The cache key of the features
    includes everything that determines the weights.

    Args:
      model: the fine-tuned weights. If this is None and a feature file is missing, the checkpoint is fine-tuned again.
    """
    tuning = settings.finetune_settings(work.config, target)
    source, train = work.checkpoint(snapshot), work.source(target, "train")
    made_from = (source.fingerprint, train.fingerprint, _tuning_key(tuning), work.config.seed)

    def read_model() -> Model:
        if model is not None:
            return model
        log.info("Fine-tuning checkpoint %s on %s again: its features are missing.", snapshot.name, target)
        models: list[Model] = []
        todo = [(snapshot, work.config.seed)]
        splits = ("train", "test")
        for _ in finetuned(work, todo, target, splits, tuning, lambda *tuned: models.append(tuned[-1]), alone=True):
            pass
        return models[0]

    return Checkpoint.stored(
        source.name,
        work.net(snapshot.pretraining.model, train.num_classes),
        read_model,
        source.preprocessing,
        settings=source.settings,
        known_fingerprint=f"fine-tuned {(*made_from, VERSIONS['transfer'])}",
    )


def _tuning_key(tuning: FinetuneSettings) -> str:
    """Returns a text that contains all settings that determine a fine-tuned model."""
    values = dataclasses.asdict(tuning)
    # The choice of checkpoints and the number of seeds change no fine-tuned model, and `remat` only by rounding.
    values |= {"checkpoints": None, "num_seeds": None}
    del values["remat"]
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

    def is_missing(snapshot: Snapshot) -> bool:
        tuned = tuned_checkpoint(work, snapshot, target)
        return not all(work.features_of.is_kept(tuned, split) for split in splits)

    missing = [snapshot for snapshot in snapshots if is_missing(snapshot)]
    if missing:
        log.info("Fine-tuning %d checkpoints on %s again: their features are missing.", len(missing), target)
    # The processes may disagree on which features are missing, because others write files in the meantime.
    # Therefore no process waits for the results of another one.
    share = [(snapshot, work.config.seed) for snapshot in missing[jax.process_index() :: jax.process_count()]]
    for _ in _finetune(work, share, target, keep_features=True, alone=True):
        pass
    devices.wait_for_all(f"tuned again on {target}")


def _finetune(
    work: Workspace, todo: Sequence[tuple[Snapshot, int]], target: str, keep_features: bool, alone: bool = False
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    """Fine-tunes checkpoints on a target, and caches the features of the first seed's models if `keep_features`."""
    tuning = settings.finetune_settings(work.config, target)

    def cache_features(snapshot: Snapshot, seed: int, model: Model) -> None:
        if seed == work.config.seed:
            tuned = tuned_checkpoint(work, snapshot, target, devices.replicate(model, work.mesh))
            for split in ("train", "test"):
                work.features_of(tuned, work.source(target, split))

    on_tuned = cache_features if keep_features else None
    yield from finetuned(work, todo, target, ("train", "test"), tuning, on_tuned, alone)


def finetuned(
    work: Workspace,
    todo: Sequence[tuple[Snapshot, int]],
    target: str,
    splits: tuple[str, str],
    tuning: FinetuneSettings,
    on_tuned: Callable[[Snapshot, int, Model], None] | None = None,
    alone: bool = False,
    epochs: Sequence[int] = (),
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    """Fine-tunes checkpoints on the first split and tests them on the second split.

    All checkpoints of a model train together, spread over the devices. With several processes, each trains its share,
    and all of them yield all results.

    Args:
      todo: (checkpoint, seed) of each training run.
      on_tuned: called with (checkpoint, seed, fine-tuned weights) in the process that trained them. The call comes
        before the result is yielded, so that a kill between the two loses nothing.
      alone: whether this process trains all of `todo`, independently of the other processes.
      epochs: the epochs after which a result is yielded, see `finetune`; empty for one result at the end.
    """
    process, num_processes = (0, 1) if alone else (jax.process_index(), jax.process_count())
    mesh = devices.make_mesh(sweep=jax.local_device_count())
    for model in dict.fromkeys(snapshot.pretraining.model for snapshot, _ in todo):
        trainings = [(snapshot, seed) for snapshot, seed in todo if snapshot.pretraining.model == model]
        share = trainings[process::num_processes]
        net = work.net(model, work.source(target, "train").num_classes)
        crops = crops_of((tuning.augment,))
        train, test = work.feed(target, splits[0], crops=crops).on(mesh), work.feed(target, splits[1]).on(mesh)
        results = finetune(
            {f"checkpoint {snapshot.name}": work.checkpoint(snapshot) for snapshot, _ in share},
            [Candidate(f"checkpoint {snapshot.name}", seed) for snapshot, seed in share],
            net,
            functools.partial(OBJECTIVES["supervised"], net, tuning.augment),
            joined({"train": (train, tuning.batch_size)}),
            test,
            work.preprocessing,
            tuning,
            mesh,
            epochs=epochs,
            eval_batch_size=work.config.data.eval_batch_size,
        )
        # The same number of iterations in all processes, because each of them takes part in `gather`.
        for _ in range(-(-len(trainings) // num_processes) * max(1, len(epochs))):
            if not alone:
                preemption.stop_if_requested()
            result = next(results, None)  # None if other processes have one more result
            if on_tuned and result and result.model is not None:
                on_tuned(*share[result.index], result.model)
            values = result and {**vars(result), "model": None}
            for other, gathered in enumerate([values] if alone else devices.gather(values)):
                if gathered:
                    yield *trainings[other::num_processes][gathered["index"]], Finetuned(**gathered)
