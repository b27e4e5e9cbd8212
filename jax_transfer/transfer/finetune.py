"""Fine-tuning (FT): from each checkpoint a new head, then the same training loop as pre-training.

The checkpoints of a group train side by side, one a device of the `sweep` axis, in one compiled program
that is reused for every group. The models can be tested within the schedule too: that is how early stopping ranks them.
"""

import dataclasses
import math
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
from jax.sharding import Mesh

from jax_transfer import devices, logs, trees
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.batches import Feed, steps_per_epoch
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Few, OneOf, Steps, check_itself
from jax_transfer.models.net import Net, with_new_head
from jax_transfer.records import InputError
from jax_transfer.training import steps as training_steps
from jax_transfer.training.loop import first_bad_step, fit
from jax_transfer.training.objectives import supervised
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer

# Ranking by early stopping ("Ranking Neural Checkpoints", section 3.1): the epochs after which fine-tuning on a part of
# the training images is stopped, in the middle of its schedule; the score is the accuracy on the rest of the images.
FINETUNE_SCORES = {"finetune_1": 1, "finetune_5": 5}


Augmentation = Annotated[str, OneOf(ChainMap(AUGMENTATIONS, MIXINGS), "augmentation")]


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The fields of `config.finetune`."""

    epochs: Count = 100
    # In place of epochs, if set.
    steps: Steps | None = None
    batch_size: Count = 128
    # As in config.pretrain.augment.
    augment: tuple[Augmentation, ...] = ()
    num_seeds: Few = 1
    # Those of the evaluated epochs that are fine-tuned, as in config.trajectory.epochs; unset: all.
    checkpoints: str | None = None
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.01)  # noqa: RUF009  frozen

    def __post_init__(self):
        check_itself(self)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """One checkpoint, fine-tuned for some epochs: where it stood in the list given, its test accuracies and its model.

    seconds, gflops: of the work up to here; the tests are in the seconds only.
    diverged_at: the first step whose loss was not finite, None if there was none; the accuracies are then NaN.
    """

    index: int
    epoch: int
    accuracy: float
    mean_class_accuracy: float
    seconds: float
    gflops: float
    model: dict
    diverged_at: int | None


def total_steps(settings: FinetuneSettings, num_train: int, what: str) -> int:
    return settings.steps or settings.epochs * steps_per_epoch(num_train, settings.batch_size, what)


def early_epochs(scores: Sequence[str]) -> list[int]:
    """The epochs after which the scores among FINETUNE_SCORES stop, in ascending order."""
    return sorted(FINETUNE_SCORES[score] for score in scores if score in FINETUNE_SCORES)


def finetune(
    names: list[str],
    load: Callable[[int], dict],
    net: Net,
    train: Feed,
    test: Feed,
    preprocessing: Preprocessing,
    settings: FinetuneSettings,
    mesh: Mesh,
    seed: int,
    eval_batch_size: int,
    epochs: Sequence[int] = (),
) -> Iterator[Finetuned]:
    """Fine-tunes each checkpoint on the target and tests it; yields results group by group, and in a group by epoch.

    Args:
      names: of the checkpoints, for messages.
      load: index -> {"params", "stats"} of that checkpoint, the head included (it is replaced).
      net: with the target's number of classes.
      mesh: its `sweep` axis says how many checkpoints train side by side.
      epochs: after each of these, in ascending order, the models are tested, and training stops after the last. The
        learning rate follows the schedule of the settings, whose length does not depend on them. Empty: the models are
        tested once, at the end of the schedule.

    Raises:
      InputError: if the schedule is shorter than the last of `epochs`.
    """
    rows = mesh.shape["sweep"]
    what = f"{train.source.name}"
    count = total_steps(settings, len(train.source), what)
    steps_an_epoch = steps_per_epoch(len(train.source), settings.batch_size, what)
    stops = {epoch: epoch * steps_an_epoch for epoch in epochs} or {-(-count // steps_an_epoch): count}
    if max(stops.values()) > count:
        raise InputError(
            f"Fine-tuning on {what} ends after {count / steps_an_epoch:.3g} epochs and cannot be tested after "
            f"{max(stops)}: give it more epochs or steps."
        )
    optimizer = make_optimizer(settings.optimizer, count)
    view = training_steps.training_view(settings.augment, preprocessing)
    step = training_steps.make_train_step(net, supervised, optimizer, view)
    run = training_steps.many_steps_of_many(step, train.fetch, mesh)
    evaluate = training_steps.make_evaluation_of_many(net, preprocessing, mesh)
    step_gflops = training_steps.train_step_gigaflops(step, net, optimizer, preprocessing, settings.batch_size)

    @jax.jit
    def start(model):
        params = with_new_head(model["params"], net, jax.random.fold_in(jax.random.key(seed), 0x4EAD))
        return training_steps.init_state(params, model["stats"], optimizer, seed)

    for first in range(0, len(names), rows):
        group = list(range(first, min(first + rows, len(names))))
        begun = time.perf_counter()
        filled = group + [group[-1]] * (rows - len(group))  # the last group repeats a checkpoint to fill the devices
        states = [jax.device_get(start(load(index))) for index in filled]
        state = devices.split(trees.stack(states), mesh, "sweep")
        diverged_at: dict[int, int] = {}

        def diverged(index, step, diverged_at=diverged_at):
            if index not in diverged_at:
                diverged_at[index] = step
                logs.log.warning(
                    "Fine-tuning %s on %s diverged at step %d: it counts as failed. A lower "
                    "config.finetune.optimizer.learning_rate may help.",
                    names[index],
                    what,
                    step,
                )

        def check(first_step, metrics, group=group, diverged=diverged):
            for row, index in enumerate(group):
                bad = first_bad_step(first_step, metrics["loss"][row])
                if bad is not None:
                    diverged(index, bad)

        spent = time.perf_counter() - begun  # not counting what is done with the results
        label = f"finetune {names[group[0]]}" + (f" to {names[group[-1]]}" if len(group) > 1 else "") + f" on {what}"
        for epoch, stop in stops.items():
            begun = time.perf_counter()
            state = fit(
                state,
                run,
                train,
                seed=seed,
                batch_size=settings.batch_size,
                total_steps=stop,
                what=label,
                on_metrics=check,
                on_epoch=lambda *_: None,
                max_steps=devices.max_steps_per_call(lambda: step_gflops),
            )
            model = {name: state[name] for name in ("params", "stats")}
            zeros = devices.split(training_steps.zero_counts((rows, net.num_classes)), mesh, "sweep")
            counts = training_steps.count_correct(evaluate, model, test, eval_batch_size, zeros)
            spent += time.perf_counter() - begun
            for row, index in enumerate(group):
                own = {name: value[row] for name, value in counts.items()}
                if own["not_finite"].any():  # broken by the last step, whose loss was still finite
                    diverged(index, stop)
                accuracy, mean_class = training_steps.accuracies(own)
                if index in diverged_at:
                    accuracy = mean_class = math.nan
                yield Finetuned(
                    index,
                    epoch,
                    accuracy,
                    mean_class,
                    spent / len(group),
                    stop * step_gflops,
                    jax.tree.map(lambda x, row=row: x[row], model),
                    diverged_at.get(index),
                )
