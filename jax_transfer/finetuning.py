"""The stage of a study that fine-tunes, and the features of the models that come out of it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import jax

from jax_transfer import devices, preemption, settings
from jax_transfer.data.batches import joined
from jax_transfer.features import extract
from jax_transfer.logs import Rows, log
from jax_transfer.models import Net
from jax_transfer.records import VERSIONS, Features, Snapshot
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import Candidate, Finetuned, FinetuneSettings, finetune
from jax_transfer.workspace import Workspace


def finetunes(work: Workspace) -> None:
    """Fine-tunes every evaluated checkpoint on every target with every seed, a row as soon as each is done."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        seeds = range(work.config.seed, work.config.seed + tuning.num_seeds)
        missing = [
            (snapshot, seed)
            for seed in seeds
            for snapshot in work.tuned_snapshots(target)
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


def tune_again(work: Workspace, snapshots: list[Snapshot], target: str) -> None:
    """Fine-tunes those whose features are not on disk (first seed), side by side; several processes share the work."""
    lost = [s for s in snapshots if not all(_path(work, s, target, split).exists() for split in ("train", "test"))]
    if lost:
        log.info(
            "The features of %d checkpoints fine-tuned on %s are missing: they are tuned again.", len(lost), target
        )
    # Each process may find something else missing, for the others write meanwhile: nobody waits for a result.
    mine = [(snapshot, work.config.seed) for snapshot in lost[jax.process_index() :: jax.process_count()]]
    for _ in _finetune(work, mine, target, keep_features=True, alone=True):
        pass
    devices.wait_for_all(f"tuned again on {target}")


def tuned_features(work: Workspace, snapshot: Snapshot, target: str, split: str) -> Features:
    """Features of a checkpoint that was fine-tuned on the target (first seed): as the fine-tuning left them on disk.

    Where they cannot be read, the checkpoint is fine-tuned again.
    """
    path = _path(work, snapshot, target, split)
    found = extract.load(path)
    if found is None:
        log.info("Checkpoint %s is fine-tuned on %s again, for its features.", snapshot.name, target)
        for _ in _finetune(work, [(snapshot, work.config.seed)], target, keep_features=True, alone=True):
            found = extract.load(path)
    return found


def _finetune(
    work: Workspace, todo: Sequence[tuple[Snapshot, int]], target: str, keep_features: bool, alone: bool = False
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    tuning = settings.finetune_settings(work.config, target)
    forward = functools.cache(lambda net: extract.make_forward(net, work.preprocessing, work.mesh))

    def keep(snapshot: Snapshot, seed: int, net: Net, model: dict) -> None:
        """The features of the first seed's models."""
        if seed != work.config.seed:
            return
        model = devices.replicate(model, work.mesh)
        for split in ("train", "test"):
            found = extract.extract(forward(net), model, work.feed(target, split), work.config.data.eval_batch_size)
            extract.save(_path(work, snapshot, target, split), found)

    yield from finetuned(work, todo, target, ("train", "test"), tuning, keep if keep_features else None, alone)


def finetuned(
    work: Workspace,
    todo: Sequence[tuple[Snapshot, int]],
    target: str,
    splits: tuple[str, str],
    tuning: FinetuneSettings,
    keep: Callable[[Snapshot, int, Net, dict], None] | None = None,
    alone: bool = False,
    epochs: Sequence[int] = (),
) -> Iterator[tuple[Snapshot, int, Finetuned]]:
    """Fine-tunes on the first split and tests on the second: the checkpoints of a model at once, spread over the devices.

    Several processes share the work and all yield all results.

    Args:
      todo: (checkpoint, seed) of each training.
      keep: called with each tuned model (checkpoint, seed, net, model) where it was tuned, before its result is out, so
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
        named = {f"checkpoint {snapshot.name}": functools.partial(work.model, snapshot) for snapshot, _ in mine}
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
                keep(*mine[done.index], net, done.model)
            own_result = done and {**vars(done), "model": None}
            results = [own_result] if alone else devices.gather(own_result)
            for process, result in enumerate(results):
                if result:
                    yield *own[process::processes][result["index"]], Finetuned(**result)


def _path(work: Workspace, snapshot: Snapshot, target: str, split: str):
    """Named by what determines the fine-tuned model, for the model itself is not kept."""
    tuning = dataclasses.asdict(settings.finetune_settings(work.config, target))
    # The choice of checkpoints and the number of seeds change no model.
    tuning |= {"checkpoints": None, "num_seeds": None}
    if tuning["optimizer"]["head_learning_rate_factor"] == 1:  # the name of a file from before there was one
        del tuning["optimizer"]["head_learning_rate_factor"]
    tuning = json.dumps(tuning, sort_keys=True)
    made_from = (work.model_fingerprint(snapshot), work.source(target, "train").fingerprint, tuning, work.config.seed)
    key = extract.cache_key(
        f"fine-tuned {(*made_from, VERSIONS['transfer'])}",
        work.models[snapshot.pretraining.model],
        work.preprocessing,
        work.source(target, split),
    )
    return work.workdir / "features" / f"{key}.npz"
