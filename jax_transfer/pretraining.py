"""The first stage of a study: train on each source, and keep every epoch."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil

import jax

from jax_transfer import devices, logs, preemption, settings
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.logs import Rows, log
from jax_transfer.models.trajectory import Trajectory, abstract
from jax_transfer.preemption import Preempted
from jax_transfer.records import InputError, Pretraining, PretrainRow
from jax_transfer.training import steps as training_steps
from jax_transfer.training.loop import first_bad_step, fit
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.workspace import Workspace

STOPPED = "stopped"  # the folder beside `checkpoints` for the state at which a SIGTERM came


def pretrain(work: Workspace) -> None:
    """Trains each model on each source; every epoch becomes a checkpoint and a row."""
    for pretraining in work.pretrainings:
        _pretrain(work, pretraining)


def _pretrain(work: Workspace, pretraining: Pretraining) -> None:
    rows = Rows(work.results, "pretrain")
    saved = _saved(work, pretraining, rows)
    if saved and saved[-1] >= work.config.pretrain.epochs:
        log.info("Pre-training on %s is complete: %d checkpoints.", _what(pretraining), len(saved))
        return
    with contextlib.closing(Trajectory(work.folder(pretraining) / "checkpoints")) as trajectory:
        _train(work, pretraining, trajectory, rows, saved)


def _what(pretraining: Pretraining) -> str:
    return pretraining.name or pretraining.source


def _train(work: Workspace, pretraining: Pretraining, trajectory: Trajectory, rows: Rows, saved: list[int]) -> None:
    """From the last epoch in `saved`, or from where a SIGTERM came, to the end."""
    source, what = pretraining.source, _what(pretraining)
    config, net = work.config, work.source_net(pretraining)
    last, folder, board = config.pretrain.epochs, work.folder(pretraining), logs.tensorboard(work.workdir)
    mesh = devices.make_global_mesh() if jax.process_count() > 1 else work.mesh
    train, test = (work.feed(source, split, everywhere=True) for split in ("train", "test"))
    batch_size = config.pretrain.batch_size
    total = last * steps_per_epoch(len(train.source), batch_size, source)
    optimizer = make_optimizer(settings.pretrain_optimizer(config), total)
    objective = functools.partial(OBJECTIVES[config.pretrain.objective], **settings.objective_settings(config))
    view = training_steps.training_view(tuple(config.pretrain.augment), work.preprocessing)
    ema_decay = config.pretrain.ema_decay
    step = training_steps.make_train_step(net, objective, optimizer, view, ema_decay)
    run = training_steps.many_steps(step, train.fetch, mesh)
    evaluate = training_steps.make_evaluation(net, work.preprocessing, mesh)
    zeros = devices.replicate(training_steps.zero_counts((net.num_classes,)), mesh)

    @functools.partial(jax.jit, out_shardings=devices.replicated(mesh))
    def start():
        weights = net.init(jax.random.key(config.seed))
        return training_steps.init_state(*weights, optimizer, config.seed, ema=bool(ema_decay))

    def step_gigaflops():
        whole = training_steps.train_step_gigaflops(
            step, net, optimizer, work.preprocessing, batch_size, bool(ema_decay)
        )
        return whole / mesh.size

    def finish_epoch(epoch, state, metrics):
        """Whether it was told to stop instead."""
        model = training_steps.evaluated(state)
        stop = preemption.requested
        counts = training_steps.count_correct(evaluate, model, test, config.data.eval_batch_size, zeros, stop)
        if counts is None:
            return True
        row = PretrainRow(
            epoch=epoch,
            source=source,
            checkpoint=work.snapshot(pretraining, epoch).name,
            model=pretraining.model,
            test_accuracy=training_steps.accuracies(counts)[0],
            **metrics,
        )
        trajectory.save(epoch, state, _metadata(work, pretraining, row))
        rows.append(row)
        where = f"/{pretraining.name}" if pretraining.name else ""
        for name, value in dataclasses.asdict(row).items():
            if isinstance(value, float) and math.isfinite(value):  # there is no training loss yet at epoch 0
                board.add_scalar(f"pretrain{where}/{name}", value, epoch)
        if epoch:
            log.info(
                "%sepoch %d/%d: loss %.4f, train accuracy %.4f, test accuracy %.4f, %.0f images/s",
                f"{pretraining.name}, " if pretraining.name else "",
                epoch,
                last,
                row.train_loss,
                row.train_accuracy,
                row.test_accuracy,
                row.images_per_second,
            )
        return False

    def on_epoch(epoch, state, metrics):
        return finish_epoch(
            epoch,
            state,
            {
                "train_loss": float(metrics["loss"]),
                "train_accuracy": float(metrics["accuracy"]),
                "seconds": metrics["seconds"],
                "images_per_second": metrics["images_per_second"],
            },
        )

    def on_metrics(first, metrics):
        bad = first_bad_step(first, metrics["loss"])
        if bad is not None:
            good = bad // (total // last)
            raise InputError(
                f"The training loss is not finite at step {bad} (epoch {good + 1}): training stops. Epoch {good} is the last "
                f"good checkpoint in {trajectory.folder}; a lower config.pretrain.optimizer.learning_rate may help."
            )

    def on_stop(state, so_far):
        """The state goes to a folder of its own: it is none of the checkpoints to compare."""
        at = int(jax.device_get(state["step"]))
        stopped = Trajectory(folder / STOPPED)
        stopped.save(at, state, {"so_far": so_far})
        stopped.close()
        log.warning("Told to stop: pre-training on %s is saved at step %d of %d.", what, at, total)
        raise Preempted

    so_far = None
    if (at := _stopped_at(folder)) > (saved[-1] if saved else 0) * (total // last):
        stopped = Trajectory(folder / STOPPED)
        log.info("Pre-training on %s goes on after step %d, where it was stopped.", what, at)
        state = stopped.restore_state(at, abstract(jax.eval_shape(start), devices.replicated(mesh)))
        so_far = stopped.metadata(at)["so_far"]
        stopped.close()
    elif saved:
        log.info("Pre-training on %s goes on after epoch %d.", what, saved[-1])
        state = trajectory.restore_state(saved[-1], abstract(jax.eval_shape(start), devices.replicated(mesh)))
    else:
        state = start()
        nothing = dict.fromkeys(("train_loss", "train_accuracy", "images_per_second", "seconds"), math.nan)
        if finish_epoch(0, state, nothing):
            raise Preempted  # the same command makes the same initialisation
    with preemption.training():
        fit(
            state,
            run,
            train,
            seed=config.seed,
            batch_size=batch_size,
            total_steps=total,
            what=f"pretrain on {source}" if not pretraining.name else f"pretrain {what}",
            on_metrics=on_metrics,
            on_epoch=on_epoch,
            # The same for all processes, which each have timed their own devices.
            max_steps=min(devices.gather(devices.max_steps_per_call(step_gigaflops))),
            stop=preemption.requested,
            on_stop=on_stop,
            so_far=so_far,
        )
        trajectory.wait()
    if devices.is_first_process():
        shutil.rmtree(folder / STOPPED, ignore_errors=True)
    board.close()


def _saved(work: Workspace, pretraining: Pretraining, rows: Rows) -> list[int]:
    """The epochs that are on disk. Rows and checkpoints are written one after the other: a kill between them leaves one
    without the other, and the rows are then made from the checkpoints."""
    trajectory = Trajectory(work.folder(pretraining) / "checkpoints", alone=True)
    saved = trajectory.epochs()
    names = [work.snapshot(pretraining, epoch).name for epoch in range(work.config.pretrain.epochs + 1)]
    if saved and [row.epoch for row in rows.rows if row.checkpoint in names] != saved:
        others = [row for row in rows.rows if row.checkpoint not in names]
        rows.replace([*others, *(PretrainRow(**_nan(trajectory.metadata(epoch)["row"])) for epoch in saved)])
    trajectory.close()
    return saved


def _stopped_at(folder: pathlib.Path) -> int:
    """The step of the last state that a SIGTERM left, 0 for none."""
    if not (folder / STOPPED).is_dir():
        return 0
    trajectory = Trajectory(folder / STOPPED, alone=True)
    steps = trajectory.epochs()
    trajectory.close()
    return steps[-1] if steps else 0


def _metadata(work: Workspace, pretraining: Pretraining, row: PretrainRow) -> dict:
    """What one must know to use a checkpoint without its config."""
    values = {
        name: None if isinstance(v, float) and math.isnan(v) else v for name, v in dataclasses.asdict(row).items()
    }
    return {
        "model": {
            **settings.net_arguments(work.config, work.models[pretraining.model]),
            "num_classes": work.source_net(pretraining).num_classes,
        },
        "preprocessing": work.preprocessing.to_json(),
        "source": pretraining.source,
        "source_accuracy": row.test_accuracy,
        "has_head": pretraining.has_head,
        "row": values,
    }


def _nan(values: dict) -> dict:
    return {name: math.nan if value is None else value for name, value in values.items()}
