"""The "pretrain" stage: trains each model on each source and keeps a checkpoint of every epoch."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
from typing import Any

import jax

from jax_transfer import devices, logs, preemption
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.data.batches import Joined, joined
from jax_transfer.data.crops import crops_of
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.preemption import Preempted
from jax_transfer.records import InputError
from jax_transfer.results import PretrainRow, Rows, from_json_dict
from jax_transfer.study import estimates, settings
from jax_transfer.study.epochs import Pretraining, snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import Epoch, train
from jax_transfer.training.objectives import Objective
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.training.state import divide, evaluated, init_state, join
from jax_transfer.training.steps import make_train_step, many_steps, memory_advice, train_step_gigaflops

STOPPED = "stopped"  # folder beside `checkpoints` for the training state when SIGTERM stopped the run


def run(work: Workspace) -> None:
    """Trains each model on each source, with a checkpoint and a row for every epoch."""
    for pretraining in work.pretrainings:
        _pretrain(work, pretraining)


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    images = " and ".join(f"{len(work.source(source, 'train')):,}" for source in work.sources)
    return f"{work.config.pretrain.epochs} epochs of {images} images"


def gigaflops(work: Workspace) -> float:
    """Computes the work of all pre-training and of the test after each epoch, in GFLOP."""
    config = work.config.pretrain
    total = 0.0
    for model in work.models:
        pretraining = next(p for p in work.pretrainings if p.model == model)
        objective, sizes = work.objective(pretraining), feed_sizes(work, pretraining)
        optimizer = settings.pretrain_optimizer(work.config)
        step = estimates.step_gigaflops(work, objective, optimizer, sizes, work.preprocessing)
        image = work.features_of.gigaflops_per_image(work.source_net(pretraining), work.preprocessing)
        for source in work.sources:
            train, test = (len(work.source(source, split)) for split in ("train", "test"))
            total += config.epochs * (train // config.batch_size * step + test * image)
    return total


def feed_sizes(work: Workspace, pretraining: Pretraining) -> dict[str, tuple[str, int]]:
    """Returns feed -> (data set, number of images in a step): first the source, then `config.pretrain.feeds`.

    Raises:
      InputError: if the feeds are not exactly those that the objective reads.
    """
    config = work.config.pretrain
    main, *others = work.objective(pretraining).views
    if set(others) != set(config.feeds):
        raise InputError(
            f"config.pretrain.feeds has {', '.join(config.feeds) or 'no feeds'}; in addition to the source ({main}), "
            f"the objective {config.objective} reads {', '.join(others) or 'none'}. Give exactly these, each with its "
            "dataset and batch_size."
        )
    further = {name: (config.feeds[name].dataset, config.feeds[name].batch_size) for name in others}
    return {main: (pretraining.source, config.batch_size), **further}


def _pretrain(work: Workspace, pretraining: Pretraining) -> None:
    rows = Rows(work.results, "pretrain")
    saved = _saved(work, pretraining, rows)
    if saved and saved[-1] >= work.config.pretrain.epochs:
        log.info("Pre-training on %s is complete: %d checkpoints.", _label(pretraining), len(saved))
        return
    folder = work.folder(pretraining)
    with (
        contextlib.closing(Trajectory(folder / "checkpoints")) as trajectory,
        contextlib.closing(logs.tensorboard(work.workdir)) as board,
    ):
        _train(_Training(work, pretraining, trajectory, rows, board), saved)
    if devices.is_first_process():
        shutil.rmtree(folder / STOPPED, ignore_errors=True)


def _label(pretraining: Pretraining) -> str:
    """Returns the name of a pre-training for log messages."""
    return pretraining.name or pretraining.source


@dataclasses.dataclass(frozen=True)
class _Training:
    """Parts of a pre-training (built on first use), and the files to which its results are written."""

    work: Workspace
    pretraining: Pretraining
    trajectory: Trajectory
    rows: Rows
    board: Any  # a TensorBoard writer

    @functools.cached_property
    def mesh(self):
        """Mesh over the devices of all processes, which train together."""
        return devices.make_global_mesh() if jax.process_count() > 1 else self.work.mesh

    @functools.cached_property
    def net(self) -> Net:
        return self.work.source_net(self.pretraining)

    @functools.cached_property
    def objective(self) -> Objective:
        return self.work.objective(self.pretraining)

    @functools.cached_property
    def feed(self) -> Joined:
        """All feeds of the objective, joined into one."""
        sizes = feed_sizes(self.work, self.pretraining)
        crops = {name: crops_of(views) for name, views in self.objective.views.items()}
        feeds = {n: self.work.feed(d, "train", self.work.preprocessing, True, crops[n]) for n, (d, _) in sizes.items()}
        return joined({name: (feeds[name], size) for name, (_, size) in sizes.items()})

    @functools.cached_property
    def total_steps(self) -> int:
        return self.work.config.pretrain.epochs * self.feed.steps_per_epoch

    @functools.cached_property
    def optimizer(self):
        return make_optimizer(settings.pretrain_optimizer(self.work.config), self.total_steps, self.objective.groups)

    @property
    def memory(self) -> dict:
        """The settings that save memory."""
        config = self.work.config.pretrain
        return {"remat": config.remat, "microbatches": config.microbatches}

    def make_step(self, **memory):
        """Makes the training step, not yet compiled."""
        preprocessing, decay = self.work.preprocessing, self.work.config.pretrain.ema_decay
        classes = self.feed.num_classes
        return make_train_step(self.objective, self.optimizer, preprocessing, classes, decay, **memory)

    @functools.cached_property
    def start(self):
        """Compiled function that makes the state at step 0."""
        config = self.work.config
        make = functools.partial(
            init_state, self.objective, self.optimizer, config.seed, ema=bool(config.pretrain.ema_decay)
        )
        return jax.jit(make, out_shardings=devices.replicated(self.mesh))

    @functools.cached_property
    def abstract(self) -> dict:
        """Shapes, dtypes and shardings of the state."""
        return abstract(jax.eval_shape(self.start), devices.replicated(self.mesh))

    @functools.cached_property
    def measure(self):
        """Function that computes the test accuracy of a model."""
        return classification(self.net, self.work.preprocessing, self.mesh, stacked=False)

    def step_gigaflops(self) -> float:
        """Computes the work of one training step on one device, in GFLOP."""
        whole = train_step_gigaflops(
            self.make_step(), self.abstract, self.feed.sizes, self.objective.views, self.work.preprocessing
        )
        return whole / self.mesh.size

    def test_accuracy(self, state: dict) -> float | None:
        """Computes the accuracy on the source's test images; NaN without a head, None if a stop is requested."""
        if not self.objective.has_head:
            return math.nan
        test = self.work.feed(self.pretraining.source, "test", self.work.preprocessing, everywhere=True)
        model = evaluated(self.objective, state)
        metrics = self.measure(model, test, self.work.config.data.eval_batch_size, preemption.requested)
        return metrics[0]["accuracy"] if metrics else None

    def record(self, epoch: int, state: dict, test_accuracy: float, **measured: float) -> PretrainRow:
        """Saves the checkpoint of an epoch, then writes its row. Numbers that are not in `measured` are NaN."""
        row = PretrainRow(
            epoch=epoch,
            source=self.pretraining.source,
            checkpoint=snapshot(self.pretraining, epoch).name,
            model=self.pretraining.model,
            test_accuracy=test_accuracy,
            step=epoch * self.feed.steps_per_epoch,
            train_loss=measured.get("train_loss", math.nan),
            train_accuracy=measured.get("train_accuracy", math.nan),
            images_per_second=measured.get("images_per_second", math.nan),
            seconds=measured.get("seconds", math.nan),
        )
        metadata = _metadata(self.work, self.pretraining, row)
        self.trajectory.save(epoch, *divide(self.objective, state), metadata)
        self.rows.append(row)
        where = f"/{self.pretraining.name}" if self.pretraining.name else ""
        for name, value in dataclasses.asdict(row).items():
            if isinstance(value, float) and math.isfinite(value):  # at epoch 0 there is no training loss yet
                self.board.add_scalar(f"pretrain{where}/{name}", value, epoch)
        return row

    def restore(self, trajectory: Trajectory, number: int) -> dict:
        """Reads the state that a trajectory stores under a number, which is an epoch or a step."""
        trees = trajectory.restore(number, *divide(self.objective, self.abstract))
        return join(self.objective, self.abstract, *trees)


def _train(training: _Training, saved: list[int]) -> None:
    """Trains to the last epoch, starting after the last epoch in `saved` or where SIGTERM stopped training."""
    config, pretraining = training.work.config, training.pretraining
    state, begun = _initial_state(training, saved)
    label = f"pretrain {pretraining.name}" if pretraining.name else f"pretrain on {pretraining.source}"
    with preemption.training():
        for epoch in train(
            state,
            many_steps(training.make_step(**training.memory), training.feed.fetch, training.mesh),
            training.feed,
            seed=config.seed,
            total_steps=training.total_steps,
            what=label,
            # The minimum, because all processes must use the same number, but each has timed only its local devices.
            max_steps=min(devices.gather(devices.max_steps_per_call(training.step_gigaflops))),
            stop=preemption.requested,
            begun=begun,
            advice=memory_advice("config.pretrain", **training.memory),
        ):
            if epoch.diverged_at[0] is not None:
                _raise_divergence(training, epoch.diverged_at[0])
            accuracy = None if epoch.stopped else training.test_accuracy(epoch.state)
            if accuracy is None:
                _save_stopped(training, epoch)
                raise Preempted
            means = {name: float(value) for name, value in epoch.means.items()}
            row = training.record(
                epoch.number,
                epoch.state,
                accuracy,
                train_loss=means["loss"],
                train_accuracy=means.get("accuracy", math.nan),
                seconds=epoch.seconds,
                images_per_second=epoch.images_per_second,
            )
            _log_epoch(row, config.pretrain.epochs, pretraining)
        training.trajectory.wait()


def _log_epoch(row: PretrainRow, num_epochs: int, pretraining: Pretraining) -> None:
    log.info(
        "%sepoch %d/%d: loss %.4f, train accuracy %.4f, test accuracy %.4f, %.0f images/s",
        f"{pretraining.name}, " if pretraining.name else "",
        row.epoch,
        num_epochs,
        row.train_loss,
        row.train_accuracy,
        row.test_accuracy,
        row.images_per_second,
    )


def _initial_state(training: _Training, saved: list[int]) -> tuple[dict, dict | None]:
    """Returns the state from which to train and, within an epoch, the metrics of that epoch so far (`Epoch.begun`)."""
    label, folder = _label(training.pretraining), training.work.folder(training.pretraining)
    step = _stopped_at(folder)
    if step > (saved[-1] if saved else 0) * training.feed.steps_per_epoch:
        log.info("Resuming pre-training on %s after step %d, where it was stopped.", label, step)
        with contextlib.closing(Trajectory(folder / STOPPED)) as stopped:
            return training.restore(stopped, step), stopped.metadata(step)["so_far"]
    if saved:
        log.info("Resuming pre-training on %s after epoch %d.", label, saved[-1])
        return training.restore(training.trajectory, saved[-1]), None
    state = training.start()
    accuracy = training.test_accuracy(state)
    if accuracy is None:
        raise Preempted  # nothing is lost, because the same command repeats the same initialisation
    training.record(0, state, accuracy)
    return state, None


def _save_stopped(training: _Training, epoch: Epoch) -> None:
    """Saves the state in a separate folder, because it is not one of the checkpoints that are compared."""
    step = int(jax.device_get(epoch.state["step"]))
    with contextlib.closing(Trajectory(training.work.folder(training.pretraining) / STOPPED)) as stopped:
        stopped.save(step, *divide(training.objective, epoch.state), {"so_far": epoch.begun()})
    log.warning(
        "Stopping on request: pre-training on %s is saved at step %d of %d.",
        _label(training.pretraining),
        step,
        training.total_steps,
    )


def _raise_divergence(training: _Training, step: int) -> None:
    last_good = step // training.feed.steps_per_epoch
    raise InputError(
        f"The training loss is not finite at step {step} (epoch {last_good + 1}). The last good checkpoint in "
        f"{training.trajectory.folder} is epoch {last_good}. Try a lower config.pretrain.optimizer.learning_rate."
    )


def _saved(work: Workspace, pretraining: Pretraining, rows: Rows) -> list[int]:
    """Lists the epochs on disk, and makes sure that each of them has a row.

    If the run was killed between writing a checkpoint and its row, or if checkpoints were copied from another study,
    the missing rows are rebuilt from the checkpoints.
    """
    with contextlib.closing(Trajectory(work.folder(pretraining) / "checkpoints", alone=True)) as trajectory:
        saved = trajectory.epochs()
        names = {epoch: snapshot(pretraining, epoch).name for epoch in range(work.config.pretrain.epochs + 1)}
        if saved and [row.epoch for row in rows.rows if row.checkpoint in names.values()] != saved:
            others = [row for row in rows.rows if row.checkpoint not in names.values()]
            restored = [from_json_dict(PretrainRow, trajectory.metadata(epoch)["row"]) for epoch in saved]
            rows.replace([*others, *(dataclasses.replace(row, checkpoint=names[row.epoch]) for row in restored)])
    return saved


def _stopped_at(folder: pathlib.Path) -> int:
    """Returns the step at which SIGTERM last stopped training; 0 if it did not."""
    if not (folder / STOPPED).is_dir():
        return 0
    trajectory = Trajectory(folder / STOPPED, alone=True)
    steps = trajectory.epochs()
    trajectory.close()
    return steps[-1] if steps else 0


def _metadata(work: Workspace, pretraining: Pretraining, row: PretrainRow) -> dict:
    """Returns the metadata needed to use a checkpoint without the study's config."""
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
        "source_accuracy": values["test_accuracy"],
        "has_head": work.objective(pretraining).has_head,
        "row": values,
    }
