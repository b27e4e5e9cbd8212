"""The stage of a study that fine-tunes, and the features of the models that come out of it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import jax

from jax_transfer import devices, preemption
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data.batches import joined
from jax_transfer.logs import log
from jax_transfer.results import VERSIONS, Rows
from jax_transfer.study import estimates, settings
from jax_transfer.study.snapshots import Snapshot, finetuned_snapshots
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import Candidate, Finetuned, FinetuneSettings, finetune, total_steps


def run(work: Workspace) -> None:
    """Fine-tunes every evaluated checkpoint on every target with every seed, a row as soon as each is done."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        seeds = range(work.config.seed, work.config.seed + tuning.num_seeds)
        missing = [
            (snapshot, seed)
            for seed in seeds
            for snapshot in finetuned_snapshots(work.config, target)
            if (snapshot.name, target, "finetune", seed) not in rows
        ]
        for snapshot, seed, done in _finetune(work, missing, target, keep_features="spectral" in work.config.stages):
            rows.append(
                work.transfer_row(
                    snapshot,
                    target,
                    "finetune",
                    seed,
                    learning_rate=tuning.optimizer.learning_rate,
                    weight_decay=tuning.optimizer.weight_decay,
                    **done.metrics,
                    seconds=done.seconds,
                    gflops=done.gflops,
                    error="" if done.diverged_at is None else f"the loss is not finite at step {done.diverged_at}",
                )
            )
            log.info(
                "finetune checkpoint %s on %s, seed %d: accuracy %.4f (%.1f s)",
                snapshot.name,
                target,
                seed,
                done.metrics["accuracy"],
                done.seconds,
            )


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return estimates.checkpoints(work)


def gigaflops(work: Workspace) -> float:
    """Returns the work of all fine-tunings and their tests, in GFLOP."""
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

    Its weights are not kept on disk, only its features are; they are cached under all that determines the weights.

    Args:
      model: the fine-tuned weights; where they are not given and a feature file is missing, the checkpoint is fine-tuned again.
    """
    tuning = dataclasses.asdict(settings.finetune_settings(work.config, target))
    # The choice of checkpoints and the number of seeds change no model.
    tuning |= {"checkpoints": None, "num_seeds": None}
    if (
        tuning["optimizer"]["head_learning_rate_factor"] == 1
    ):  # files written before this setting existed keep their names
        del tuning["optimizer"]["head_learning_rate_factor"]
    source, train = work.checkpoint(snapshot), work.source(target, "train")
    made_from = (source.fingerprint, train.fingerprint, json.dumps(tuning, sort_keys=True), work.config.seed)

    def read_model() -> Model:
        if model is not None:
            return model
        log.info("Fine-tuning checkpoint %s on %s again, for its features.", snapshot.name, target)
        todo, splits, models = [(snapshot, work.config.seed)], ("train", "test"), []
        again = settings.finetune_settings(work.config, target)
        for _ in finetuned(work, todo, target, splits, again, keep=lambda *kept: models.append(kept[-1]), alone=True):
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


def tune_again(work: Workspace, snapshots: list[Snapshot], target: str) -> None:
    """Fine-tunes those whose features are not on disk (first seed), side by side; several processes share the work."""
    splits = [work.source(target, split) for split in ("train", "test")]

    def is_missing(snapshot: Snapshot) -> bool:
        tuned = tuned_checkpoint(work, snapshot, target)
        return not all(work.features_of.path(tuned, split).exists() for split in splits)

    missing = [snapshot for snapshot in snapshots if is_missing(snapshot)]
    if missing:
        log.info("Fine-tuning %d checkpoints on %s again: their features are missing.", len(missing), target)
    # Each process may find other features missing because the others write meanwhile: nobody waits for a result.
    mine = [(snapshot, work.config.seed) for snapshot in missing[jax.process_index() :: jax.process_count()]]
    for _ in _finetune(work, mine, target, keep_features=True, alone=True):
        pass
    devices.wait_for_all(f"tuned again on {target}")


def _finetune(
    work: Workspace, todo: Sequence[tuple[Snapshot, int]], target: str, keep_features: bool, alone: bool = False
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    tuning = settings.finetune_settings(work.config, target)

    def keep(snapshot: Snapshot, seed: int, model: Model) -> None:
        """Caches the features of the first seed's models."""
        if seed == work.config.seed:
            tuned = tuned_checkpoint(work, snapshot, target, devices.replicate(model, work.mesh))
            for split in ("train", "test"):
                work.features_of(tuned, work.source(target, split))

    yield from finetuned(work, todo, target, ("train", "test"), tuning, keep if keep_features else None, alone)


def finetuned(
    work: Workspace,
    todo: Sequence[tuple[Snapshot, int]],
    target: str,
    splits: tuple[str, str],
    tuning: FinetuneSettings,
    keep: Callable[[Snapshot, int, Model], None] | None = None,
    alone: bool = False,
    epochs: Sequence[int] = (),
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    """Fine-tunes on the first split and tests on the second: the checkpoints of a model at once, spread over the devices.

    Several processes share the work and all yield all results.

    Args:
      todo: (checkpoint, seed) of each training.
      keep: called with each tuned model (checkpoint, seed, model) where it was tuned, before its result is out, so
        that a kill in between leaves nothing out.
      alone: this process does all of its work, whatever the others do.
      epochs: a result for each, see `finetune`; empty for one at the end.
    """
    first, processes = (0, 1) if alone else (jax.process_index(), jax.process_count())
    mesh = devices.make_mesh(sweep=jax.local_device_count())
    for model in dict.fromkeys(snapshot.pretraining.model for snapshot, _ in todo):
        own = [(snapshot, seed) for snapshot, seed in todo if snapshot.pretraining.model == model]
        net = work.net(model, work.source(target, "train").num_classes)
        train, test = (work.feed(target, split).on(mesh) for split in splits)
        mine = own[first::processes]
        named = {f"checkpoint {snapshot.name}": work.checkpoint(snapshot) for snapshot, _ in mine}
        tuned = finetune(
            named,
            [Candidate(f"checkpoint {snapshot.name}", seed) for snapshot, seed in mine],
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
        for _ in range(-(-len(own) // processes) * max(1, len(epochs))):
            if not alone:
                preemption.stop_if_requested()
            done = next(tuned, None)  # none where the others have one more
            if done and keep:
                keep(*mine[done.index], done.model)
            own_result = done and {**vars(done), "model": None}
            results = [own_result] if alone else devices.gather(own_result)
            for process, result in enumerate(results):
                if result:
                    yield *own[process::processes][result["index"]], Finetuned(**result)
