"""The "pretrain" stage: trains each model on each source and keeps a checkpoint of every epoch and selected step."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import reprlib
import shutil
from typing import Any

import jax

from jax_transfer import devices, logs, preemption
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.data.batches import Joined, joined
from jax_transfer.data.crops import crops_of
from jax_transfer.data.source import Source
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.preemption import Preempted
from jax_transfer.records import InputError
from jax_transfer.results import PretrainRow, Rows, from_json_dict
from jax_transfer.study import estimates, judge, settings
from jax_transfer.study.epochs import Pretraining, Saved, evaluated_numbers, length, saved_at, snapshot
from jax_transfer.study.settings import Recipe
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import Epoch, train
from jax_transfer.training.objectives import Objective
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.training.state import divide, evaluated, init_state, join
from jax_transfer.training.steps import make_train_step, many_steps, memory_advice, train_step_gigaflops

STOPPED = "stopped"  # folder beside `checkpoints` for the training state when SIGTERM stopped the run


def run(work: Workspace) -> None:
    """Trains each model on each source, with a checkpoint and a row for every entry of `saved_at`."""
    for pretraining in work.pretrainings:
        _pretrain(work, pretraining)


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    images = " and ".join(f"{len(work.source(source, 'train')):,}" for source in work.sources)
    last, unit = length(work.config)
    sizes = dict.fromkeys(str(recipe.section.batch_size) for recipe in work.recipes.values())
    batch = f"{' or '.join(sizes)} of " if unit == "step" else ""
    return f"{', '.join(work.recipes)}: {last:,} {unit}s of {batch}{images} images"


def gigaflops(work: Workspace) -> float:
    """Computes the work of all pre-training and of the test of each checkpoint, in GFLOP."""
    total = 0.0
    for model, label in itertools.product(work.models, work.recipes):
        trained = [p for p in work.pretrainings if (p.model, p.objective) == (model, label)]
        pretraining = trained[0]
        objective, sizes = work.objective(pretraining), feed_sizes(work, pretraining)
        recipe = work.recipe(pretraining)
        optimizer = settings.pretrain_optimizer(recipe.section, recipe.where)
        sources = training_sources(work, pretraining)
        fed = {feed: (sources[feed], size) for feed, (_, size) in sizes.items()}
        step = estimates.step_gigaflops(objective, optimizer, fed, work.preprocessing)
        image = work.features_of.gigaflops_per_image(work.source_net(pretraining), work.preprocessing)
        for pretraining in trained:
            steps = saved_at(work.config, work.steps_per_epoch(pretraining)).values()
            images = len(work.source(pretraining.source, "test"))
            images += judge.NUM_VIEWS * judge.num_images(work, pretraining)
            total += max(steps) * step + len(steps) * images * image
    return total


def feed_sizes(work: Workspace, pretraining: Pretraining) -> dict[str, tuple[str, int]]:
    """Returns feed -> (data set, number of images in a step): first the source, then the `feeds` of the recipe.

    Raises:
      InputError: if the feeds are not exactly those that the objective reads.
    """
    where, section, *_ = work.recipe(pretraining)
    main, *others = work.objective(pretraining).views
    if set(others) != set(section.feeds):
        raise InputError(
            f"{where}.feeds has {', '.join(section.feeds) or 'no feeds'}; in addition to the source ({main}), the "
            f"objective {section.objective} reads {', '.join(others) or 'none'}. Give exactly these, each with its "
            "dataset and batch_size."
        )
    further = {name: (section.feeds[name].dataset, section.feeds[name].batch_size) for name in others}
    return {main: (pretraining.source, section.batch_size), **further}


def training_sources(work: Workspace, pretraining: Pretraining) -> dict[str, Source]:
    """Returns feed -> the images on which a pre-training trains."""
    main, *others = feed_sizes(work, pretraining).items()
    return {main[0]: work.trained_on(pretraining), **{n: work.source(dataset, "train") for n, (dataset, _) in others}}


def check_saved(work: Workspace, pretraining: Pretraining) -> None:
    """Checks the checkpoints of an earlier run, if there are any.

    Raises:
      InputError: if they are named by epoch and pre-training counts steps, or the other way round; or if training has
        passed an epoch or step that the config evaluates without saving it.
    """
    folder, (_, unit) = work.folder(pretraining) / "checkpoints", length(work.config)
    if not folder.is_dir():
        return
    with contextlib.closing(Trajectory(folder, alone=True)) as trajectory:
        saved = trajectory.epochs()
        last = saved[-1] if saved else 0
        if last and trajectory.metadata(last)["row"].get(unit) != last:
            raise InputError(
                f"{folder} names its checkpoints by {'epoch' if unit == 'step' else 'step'}, and a config with "
                f"config.pretrain.steps = {work.config.pretrain.steps} by {unit}: use the config that made them, or "
                "another --workdir."
            )
    passed = max(work.step(Saved(pretraining, last)), _stopped_at(work.folder(pretraining)))
    numbers = sorted({*evaluated_numbers(work.config)} - {*saved})
    if lost := [number for number in numbers if work.step(Saved(pretraining, number)) < passed]:
        raise InputError(
            f"config.trajectory.{unit}s selects {unit} {reprlib.repr(lost)}, which pre-training has passed without "
            f"saving it in {folder}: select from {reprlib.repr(saved)} or later ones, or use another --workdir."
        )


def _pretrain(work: Workspace, pretraining: Pretraining) -> None:
    rows = Rows(work.results, "pretrain")
    saved = _saved(work, pretraining, rows)
    if saved and saved[-1] >= length(work.config).last:
        log.info("Pre-training on %s is complete: %d checkpoints.", _label(pretraining), len(saved))
        return
    folder = work.folder(pretraining)
    work.trained_on(pretraining)  # its vocabulary is kept before the first checkpoint, which later starts rely on
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

    @property
    def recipe(self) -> Recipe:
        return self.work.recipe(self.pretraining)

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
        sources = training_sources(self.work, self.pretraining)
        feeds = {n: self.work.feed_of(s, self.work.preprocessing, crops[n], True) for n, s in sources.items()}
        return joined({name: (feeds[name], size) for name, (_, size) in sizes.items()})

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Step at which a checkpoint is saved -> the number of the checkpoint."""
        return {step: n for n, step in saved_at(self.work.config, self.work.steps_per_epoch(self.pretraining)).items()}

    @property
    def total_steps(self) -> int:
        return max(self.numbers)

    @functools.cached_property
    def optimizer(self):
        optimizer = settings.pretrain_optimizer(self.recipe.section, self.recipe.where)
        return make_optimizer(optimizer, self.total_steps, self.objective.groups)

    @property
    def memory(self) -> dict:
        """The settings that save memory."""
        section = self.recipe.section
        return {"remat": section.remat, "microbatches": section.microbatches}

    def make_step(self, **memory):
        """Makes the training step, not yet compiled."""
        preprocessing, decay = self.work.preprocessing, self.recipe.section.ema_decay
        classes = self.feed.num_classes
        return make_train_step(self.objective, self.optimizer, preprocessing, classes, decay, **memory)

    @functools.cached_property
    def start(self):
        """Compiled function that makes the state at step 0."""
        seed, average = self.work.config.seed, bool(self.recipe.section.ema_decay)
        make = functools.partial(init_state, self.objective, self.optimizer, seed, ema=average)
        return jax.jit(make, out_shardings=devices.replicated(self.mesh))

    @functools.cached_property
    def abstract(self) -> dict:
        """Shapes, dtypes and shardings of the state."""
        return abstract(jax.eval_shape(self.start), devices.replicated(self.mesh))

    @functools.cached_property
    def measure(self):
        """Function that computes the test accuracy of a model."""
        return classification(self.net, self.work.preprocessing, self.mesh, stacked=False)

    @functools.cached_property
    def judge(self):
        """Function that judges a model by its features of test images."""
        return judge.make_judge(self.work, self.pretraining, self.mesh)

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

    def evaluate(self, state: dict) -> dict[str, float | None] | None:
        """Computes the columns of the row that need test images; None if a stop is requested."""
        accuracy = self.test_accuracy(state)
        if accuracy is None:
            return None
        judged = self.judge(evaluated(self.objective, state), preemption.requested)
        return None if judged is None else {"test_accuracy": accuracy, **judged}

    def record(self, step: int, state: dict, so_far: dict | None = None, **measured: float | None) -> PretrainRow:
        """Saves the checkpoint of a step, then writes its row and returns it.

        Args:
          so_far: `Epoch.begun()` if the step is within an epoch, which is then resumed from this checkpoint.
          measured: the other numbers of the row. Those that are missing are NaN, or None if the column may be None.
        """
        number = self.numbers[step]
        saved = snapshot(self.pretraining, number)
        missing = ("train_loss", "train_accuracy", "test_accuracy", "images_per_second", "seconds")
        row = PretrainRow(
            epoch=self.work.epoch(saved),
            source=self.pretraining.source,
            checkpoint=saved.name,
            model=self.pretraining.model,
            objective=self.recipe.section.objective,
            step=step,
            **{**dict.fromkeys(missing, math.nan), **measured},
        )
        metadata = {**_metadata(self.work, self.pretraining, row), **({"so_far": so_far} if so_far else {})}
        self.trajectory.save(number, *divide(self.objective, state), metadata)
        self.rows.append(row)
        where = f"/{self.pretraining.name}" if self.pretraining.name else ""
        for name, value in dataclasses.asdict(row).items():
            if isinstance(value, float) and math.isfinite(value):  # at epoch 0 there is no training loss yet
                self.board.add_scalar(f"pretrain{where}/{name}", value, number)
        return row

    def restore(self, trajectory: Trajectory, number: int) -> dict:
        """Reads the state that a trajectory stores under a number, which is an epoch or a step."""
        trees = trajectory.restore(number, *divide(self.objective, self.abstract))
        return join(self.objective, self.abstract, *trees)


def read_state(work: Workspace, saved: Saved) -> dict:
    """Reads the whole training state of a checkpoint (`training.state`), such as the text tower of CLIP.

    Raises:
      InputError: if the checkpoint is not there or cannot be read.
    """
    trajectory = work.trajectory_with(saved)
    training = _Training(work, saved.pretraining, trajectory, Rows(work.results, "pretrain"), board=None)
    state = abstract(jax.eval_shape(training.start), devices.replicated(work.mesh))
    return join(training.objective, state, *trajectory.restore(saved.number, *divide(training.objective, state)))


def _train(training: _Training, saved: list[int]) -> None:
    """Trains to the end, starting after the last checkpoint in `saved` or where SIGTERM stopped training."""
    config, pretraining = training.work.config, training.pretraining
    last = _last_step(training, saved)
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
            pauses=[step for step in training.numbers if step > last],
            begun=begun,
            advice=memory_advice(training.recipe.where, **training.memory),
        ):
            if epoch.diverged_at[0] is not None:
                _raise_divergence(training, epoch.diverged_at[0])
            tested = None if epoch.stopped else training.evaluate(epoch.state)
            if tested is None:
                _save_stopped(training, epoch)
                raise Preempted
            means = {name: float(value) for name, value in epoch.means.items()}
            row = training.record(
                epoch.step,
                epoch.state,
                epoch.begun() if epoch.step % training.feed.steps_per_epoch else None,
                train_loss=means["loss"],
                train_accuracy=means.get("accuracy", math.nan),
                seconds=epoch.seconds,
                images_per_second=epoch.images_per_second,
                **tested,
            )
            _log_row(row, training)
        training.trajectory.wait()


def _last_step(training: _Training, saved: list[int]) -> int:
    """Returns the step of the last checkpoint; -1 if there is none."""
    return training.work.step(Saved(training.pretraining, saved[-1])) if saved else -1


def _log_row(row: PretrainRow, training: _Training) -> None:
    last, unit = length(training.work.config)
    label = f"{training.pretraining.name}, " if training.pretraining.name else ""
    label += f"{unit} {getattr(row, unit):d}/{last}"
    label += f" (epoch {row.epoch:g})" if unit == "step" else ""
    numbers = [f"loss {row.train_loss:.4f}", *judge.words(row, training.objective.has_head)]
    log.info("%s: %s, %.0f images/s", label, ", ".join(numbers), row.images_per_second)
    judge.warn_of_collapse(row, training.rows.rows, label, training.recipe.where)


def _initial_state(training: _Training, saved: list[int]) -> tuple[dict, dict | None]:
    """Returns the state from which to train and, within an epoch, the metrics of that epoch so far (`Epoch.begun`)."""
    label, folder = _label(training.pretraining), training.work.folder(training.pretraining)
    step = _stopped_at(folder)
    if step > max(0, _last_step(training, saved)):
        log.info("Resuming pre-training on %s after step %d, where it was stopped.", label, step)
        with contextlib.closing(Trajectory(folder / STOPPED)) as stopped:
            return training.restore(stopped, step), stopped.metadata(step)["so_far"]
    if saved:
        log.info("Resuming pre-training on %s after %s %d.", label, length(training.work.config).unit, saved[-1])
        return training.restore(training.trajectory, saved[-1]), training.trajectory.metadata(saved[-1]).get("so_far")
    state = training.start()
    tested = training.evaluate(state)
    if tested is None:
        raise Preempted  # nothing is lost, because the same command repeats the same initialisation
    training.record(0, state, None, **tested)
    return state, None


def _save_stopped(training: _Training, epoch: Epoch) -> None:
    """Saves the state in a separate folder, because it is not one of the checkpoints that are compared."""
    with contextlib.closing(Trajectory(training.work.folder(training.pretraining) / STOPPED)) as stopped:
        stopped.save(epoch.step, *divide(training.objective, epoch.state), {"so_far": epoch.begun()})
    log.warning(
        "Stopping on request: pre-training on %s is saved at step %d of %d.",
        _label(training.pretraining),
        epoch.step,
        training.total_steps,
    )


def _raise_divergence(training: _Training, step: int) -> None:
    epoch, unit = step // training.feed.steps_per_epoch + 1, length(training.work.config).unit
    last_good = training.numbers[max(saved for saved in training.numbers if saved <= step)]
    raise InputError(
        f"The training loss is not finite at step {step} (epoch {epoch}). The last good checkpoint in "
        f"{training.trajectory.folder} is {unit} {last_good}. Try a lower "
        f"{training.recipe.where}.optimizer.learning_rate."
    )


def _saved(work: Workspace, pretraining: Pretraining, rows: Rows) -> list[int]:
    """Lists the numbers of the checkpoints on disk, and makes sure that each of them has a row.

    If the run was killed between writing a checkpoint and its row, or if checkpoints were copied from another study,
    the missing rows are rebuilt from the checkpoints.
    """
    with contextlib.closing(Trajectory(work.folder(pretraining) / "checkpoints", alone=True)) as trajectory:
        saved = trajectory.epochs()
        names = [snapshot(pretraining, number).name for number in saved]
        checkpoints = [row.checkpoint for row in rows.rows]
        if saved and [name for name in checkpoints if name.rpartition("/")[0] == pretraining.name] != names:
            others = [row for row in rows.rows if row.checkpoint.rpartition("/")[0] != pretraining.name]
            restored = [from_json_dict(PretrainRow, trajectory.metadata(number)["row"]) for number in saved]
            named = [dataclasses.replace(row, checkpoint=n) for row, n in zip(restored, names, strict=True)]
            rows.replace([*others, *named])
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
            **settings.net_arguments(work.config, work.model(pretraining)),
            "num_classes": work.source_net(pretraining).num_classes,
        },
        "preprocessing": work.preprocessing.to_json(),
        "source": pretraining.source,
        "source_accuracy": values["test_accuracy"],
        "has_head": work.objective(pretraining).has_head,
        "row": values,
    }
