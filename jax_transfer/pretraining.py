"""The first stage of a study: train on each source, and keep every epoch."""

import dataclasses
import functools
import math

import jax

from jax_transfer import config as settings
from jax_transfer import devices, logs
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.logs import Rows, log
from jax_transfer.models.trajectory import abstract
from jax_transfer.records import InputError, Pretraining, PretrainRow
from jax_transfer.training import steps as training_steps
from jax_transfer.training.loop import first_bad_step, fit
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.workspace import Workspace


def pretrain(work: Workspace) -> None:
    """Trains each model on each source; every epoch becomes a checkpoint and a row."""
    for pretraining in work.pretrainings:
        _pretrain(work, pretraining)


def _pretrain(work: Workspace, pretraining: Pretraining) -> None:
    source, what = pretraining.source, pretraining.name or pretraining.source
    config, mesh, net = work.config, work.mesh, work.source_net(pretraining)
    train, test = (work.feed(source, split) for split in ("train", "test"))
    batch_size, last = config.pretrain.batch_size, config.pretrain.epochs
    total = last * steps_per_epoch(len(train.source), batch_size, source)
    optimizer = make_optimizer(settings.pretrain_optimizer(config), total)
    objective = functools.partial(
        OBJECTIVES[config.pretrain.objective], label_smoothing=config.pretrain.label_smoothing
    )
    view = training_steps.training_view(tuple(config.pretrain.augment), work.preprocessing)
    ema_decay = config.pretrain.ema_decay
    step = training_steps.make_train_step(net, objective, optimizer, view, ema_decay)
    run = training_steps.many_steps(step, train.fetch, mesh)
    evaluate = training_steps.make_evaluation(net, work.preprocessing, mesh)
    zeros = devices.replicate(training_steps.zero_counts((net.num_classes,)), mesh)
    rows, board = Rows(work.results, "pretrain"), logs.tensorboard(work.workdir)
    trajectory = work.trajectory(pretraining)

    @functools.partial(jax.jit, out_shardings=devices.replicated(mesh))
    def start():
        weights = net.init(jax.random.key(config.seed))
        return training_steps.init_state(*weights, optimizer, config.seed, ema=bool(ema_decay))

    def finish_epoch(epoch, state, metrics):
        model = training_steps.evaluated(state)
        counts = training_steps.count_correct(evaluate, model, test, config.data.eval_batch_size, zeros)
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

    def on_epoch(epoch, state, metrics):
        finish_epoch(
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

    saved = trajectory.epochs()
    # Rows and checkpoints are written one after the other: a kill between them leaves one without the other.
    names = [work.snapshot(pretraining, epoch).name for epoch in range(last + 1)]
    own = [row for row in rows.rows if row.checkpoint in names]
    if saved and [row.epoch for row in own] != saved:
        others = [row for row in rows.rows if row.checkpoint not in names]
        rows.replace([*others, *(PretrainRow(**_nan(trajectory.metadata(epoch)["row"])) for epoch in saved)])
    if saved and saved[-1] >= last:
        log.info("Pre-training on %s is complete: %d checkpoints.", what, len(saved))
        return
    if saved:
        log.info("Pre-training on %s goes on after epoch %d.", what, saved[-1])
        shapes = jax.eval_shape(start)
        state = trajectory.restore_state(saved[-1], abstract(shapes, devices.replicated(mesh)))
    else:
        state = start()
        nothing = dict.fromkeys(("train_loss", "train_accuracy", "images_per_second", "seconds"), math.nan)
        finish_epoch(0, state, nothing)
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
    )
    trajectory.wait()
    board.close()


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
        "row": values,
    }


def _nan(values: dict) -> dict:
    return {name: math.nan if value is None else value for name, value in values.items()}
