"""The stages of a study in their order. They talk only through the working directory, so each can run alone."""

import dataclasses
import functools
import math
import time

import jax

from jax_transfer import config as settings
from jax_transfer import devices, logs, trees
from jax_transfer.analysis import SCORES, ranking_row
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.logs import Rows, log
from jax_transfer.records import Features, InputError, PretrainRow, ScoreRow, TransferRow
from jax_transfer.report.page import write_report
from jax_transfer.training import steps as training_steps
from jax_transfer.training.loop import first_bad_step, fit
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.training.trajectory import abstract
from jax_transfer.transfer.finetune import finetune
from jax_transfer.transfer.probe import PROTOCOLS, probe
from jax_transfer.workspace import Workspace


def pretrain(work: Workspace) -> None:
    """Trains the source model; every epoch becomes a checkpoint and a row."""
    config, mesh, net = work.config, work.mesh, work.source_net
    train, test = (work.feed(config.source.dataset, split) for split in ("train", "test"))
    batch_size, last = config.pretrain.batch_size, config.pretrain.epochs
    total = last * steps_per_epoch(len(train.source), batch_size, config.source.dataset)
    optimizer = make_optimizer(settings.pretrain_optimizer(config), total)
    objective = functools.partial(
        OBJECTIVES[config.pretrain.objective], label_smoothing=config.pretrain.label_smoothing
    )
    view = training_steps.training_view(tuple(config.pretrain.augment), work.preprocessing)
    step = training_steps.make_train_step(net, objective, optimizer, view)
    run = training_steps.many_steps(step, train.fetch, mesh)
    evaluate = training_steps.make_evaluation(net, work.preprocessing, mesh)
    zeros = devices.replicate(training_steps.zero_counts((net.num_classes,)), mesh)
    rows, board, trajectory = Rows(work.results, "pretrain"), logs.tensorboard(work.workdir), work.trajectory

    @functools.partial(jax.jit, out_shardings=devices.replicated(mesh))
    def start():
        return training_steps.init_state(*net.init(jax.random.key(config.seed)), optimizer, config.seed)

    def finish_epoch(epoch, state, metrics):
        counts = training_steps.count_correct(evaluate, state, test, config.data.eval_batch_size, zeros)
        row = PretrainRow(epoch=epoch, test_accuracy=training_steps.accuracies(counts)[0], **metrics)
        trajectory.save(epoch, state, _metadata(work, row))
        rows.append(row)
        for name, value in dataclasses.asdict(row).items():
            if math.isfinite(value):  # there is no training loss yet at epoch 0
                board.add_scalar(f"pretrain/{name}", value, epoch)
        if epoch:
            log.info(
                "epoch %d/%d: loss %.4f, train accuracy %.4f, test accuracy %.4f, %.0f images/s",
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
    if saved and [row.epoch for row in rows.rows] != saved:
        rows.replace(PretrainRow(**_nan(trajectory.metadata(epoch)["row"])) for epoch in saved)
    if saved and saved[-1] >= last:
        log.info("Pre-training is complete: %d checkpoints.", len(saved))
        return
    if saved:
        log.info("Pre-training goes on after epoch %d.", saved[-1])
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
        what="pretrain",
        on_metrics=on_metrics,
        on_epoch=on_epoch,
    )
    trajectory.wait()
    board.close()


def _metadata(work: Workspace, row: PretrainRow) -> dict:
    """What one must know to use a checkpoint without its config."""
    values = {
        name: None if isinstance(v, float) and math.isnan(v) else v for name, v in dataclasses.asdict(row).items()
    }
    return {
        "model": {**work.config.model.to_dict(), "num_classes": work.source_net.num_classes},
        "preprocessing": work.preprocessing.to_json(),
        "source": work.config.source.dataset,
        "source_accuracy": row.test_accuracy,
        "row": values,
    }


def _nan(values: dict) -> dict:
    return {name: math.nan if value is None else value for name, value in values.items()}


def features(work: Workspace) -> None:
    """Extracts what the later stages will ask for, one compiled forward pass for all."""
    pairs = [(epoch, target) for target in work.config.targets for epoch in work.epochs]
    with logs.progress(2 * len(pairs), "features", "sets") as bar:
        for epoch, target in pairs:
            for split in ("train", "test"):
                work.features(epoch, target, split)
                bar.update()


def probes(work: Workspace) -> None:
    """Linear probes on the frozen features: all checkpoints of a target in one compiled program."""
    rows = Rows(work.results, "transfer")
    for target in work.config.targets:
        probing = settings.probe_settings(work.config, target)
        num_classes = work.source(target, "train").num_classes
        for method in probing.methods:
            missing = [
                epoch
                for epoch in work.epochs
                if not all((str(epoch), target, method, work.config.seed + s) in rows for s in range(probing.num_seeds))
            ]
            for group in work.groups(missing, target):
                log.info("%s on %s: %d checkpoints", method, target, len(group))
                start = time.perf_counter()
                train, test = (_stack(work, group, target, split) for split in ("train", "test"))
                result = probe(
                    PROTOCOLS[method],
                    (train.features, train.labels[0]),
                    (test.features, test.labels[0]),
                    num_classes,
                    probing,
                    work.config.seed,
                )
                seconds = (time.perf_counter() - start) / result.accuracy.size
                for i, epoch in enumerate(group):
                    for s in range(probing.num_seeds):
                        rows.append(
                            _transfer_row(
                                work,
                                epoch,
                                target,
                                method,
                                s,
                                float(result.chosen[i, s]),
                                float(result.accuracy[i, s]),
                                float(result.mean_class_accuracy[i, s]),
                                seconds,
                                result.gflops,
                            )
                        )


def _stack(work: Workspace, group: list[int], target: str, split: str) -> Features:
    return trees.stack([work.features(epoch, target, split) for epoch in group])


def _transfer_row(work, epoch, target, method, seed, learning_rate, accuracy, mean_class_accuracy, seconds, gflops):
    sizes = {f"num_{split}": len(work.source(target, split)) for split in ("train", "test")}
    return TransferRow(
        checkpoint=str(epoch),
        epoch=epoch,
        target=target,
        method=method,
        seed=work.config.seed + seed,
        learning_rate=learning_rate,
        accuracy=accuracy,
        mean_class_accuracy=mean_class_accuracy,
        seconds=seconds,
        gflops=gflops,
        **sizes,
    )


def finetunes(work: Workspace) -> None:
    """Fine-tunes every evaluated checkpoint on every target, a row as soon as each is done."""
    rows = Rows(work.results, "transfer")
    mesh = devices.make_mesh(sweep=jax.device_count())
    for target in work.config.targets:
        tuning = settings.finetune_settings(work.config, target)
        net = work.net(work.source(target, "train").num_classes)
        for s in range(tuning.num_seeds):
            seed = work.config.seed + s
            missing = [epoch for epoch in work.epochs if (str(epoch), target, "finetune", seed) not in rows]
            if not missing:
                continue
            train, test = (work.feed(target, split).on(mesh) for split in ("train", "test"))
            tuned = finetune(
                [f"epoch {epoch}" for epoch in missing],
                lambda i, missing=missing: work.model(missing[i]),
                net,
                train,
                test,
                work.preprocessing,
                tuning,
                mesh,
                seed,
                work.config.data.eval_batch_size,
            )
            for done in tuned:
                epoch = missing[done.index]
                rows.append(
                    _transfer_row(
                        work,
                        epoch,
                        target,
                        "finetune",
                        s,
                        tuning.optimizer.learning_rate,
                        done.accuracy,
                        done.mean_class_accuracy,
                        done.seconds,
                        done.gflops,
                    )
                )
                log.info(
                    "finetune epoch %d on %s, seed %d: accuracy %.4f (%.1f s)",
                    epoch,
                    target,
                    seed,
                    done.accuracy,
                    done.seconds,
                )


def scores(work: Workspace) -> None:
    """Transferability scores on the training features of each target, all checkpoints at once."""
    rows = Rows(work.results, "scores")
    for target in work.config.targets:
        num_classes = work.source(target, "train").num_classes
        for name in work.config.scores:
            missing = [epoch for epoch in work.epochs if (str(epoch), target, name) not in rows]
            for group in work.groups(missing, target):
                stacked = _stack(work, group, target, "train")
                one = functools.partial(SCORES[name], num_classes=num_classes)
                start = time.perf_counter()
                values = jax.device_get(jax.jit(jax.vmap(one))(stacked))
                seconds = (time.perf_counter() - start) / len(group)
                gflops = devices.gigaflops(one, jax.tree.map(lambda x: x[0], stacked))
                for epoch, value in zip(group, values, strict=True):
                    rows.append(ScoreRow(str(epoch), epoch, target, name, float(value), seconds, gflops))


def report(work: Workspace) -> None:
    """How well each score ranks the checkpoints, then tables, figures and the page."""
    transfer, scored = Rows(work.results, "transfer").rows, Rows(work.results, "scores").rows
    ranking = []
    for target in work.config.targets:
        for method in dict.fromkeys(row.method for row in transfer if row.target == target):
            accuracy = _mean_accuracy(transfer, target, method)
            for name in dict.fromkeys(row.score for row in scored if row.target == target):
                value = {row.checkpoint: row.value for row in scored if (row.target, row.score) == (target, name)}
                both = [checkpoint for checkpoint in accuracy if checkpoint in value]
                ranking.append(ranking_row(target, method, name, [value[c] for c in both], [accuracy[c] for c in both]))
    Rows(work.results, "ranking").replace(ranking)
    log.info("Report: %s", write_report(work.workdir))


def _mean_accuracy(transfer: list[TransferRow], target: str, method: str) -> dict[str, float]:
    """checkpoint -> accuracy, the mean over seeds."""
    found: dict[str, list[float]] = {}
    for row in transfer:
        if (row.target, row.method) == (target, method):
            found.setdefault(row.checkpoint, []).append(row.accuracy)
    return {checkpoint: sum(values) / len(values) for checkpoint, values in found.items()}


STAGES = {
    "pretrain": pretrain,
    "features": features,
    "probe": probes,
    "finetune": finetunes,
    "scores": scores,
    "report": report,
}
