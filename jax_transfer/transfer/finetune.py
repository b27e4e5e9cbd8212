"""Fine-tuning (FT): from each checkpoint a new head, then the same training loop as pre-training.

The candidates (checkpoints, seeds, learning rates) of a group train side by side, one a device of the `sweep` axis, in one
compiled program that is reused for every group. The models can be tested within the schedule too: that is how early
stopping ranks them.
"""

import dataclasses
import itertools
import math
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_transfer import devices, logs, trees
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.batches import Feed, Joined, steps_per_epoch
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Few, OneOf, Steps, check_itself
from jax_transfer.models.net import Net, with_new_head
from jax_transfer.records import InputError
from jax_transfer.training.evaluation import Measure, classification
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import evaluated, init_state
from jax_transfer.training.steps import make_train_step, many_steps_of_many, train_step_gigaflops

# Ranking by early stopping ("Ranking Neural Checkpoints", section 3.1): the epochs after which fine-tuning on a part of
# the training images is stopped, in the middle of its schedule; the score is the accuracy on the rest of the images.
FINETUNE_SCORES = {"finetune_1": 1, "finetune_5": 5}

RATES = ("learning_rate", "weight_decay")  # what a candidate may change of the optimizer


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


class Candidate(NamedTuple):
    """One training to make.

    checkpoint: the name of the one to start from. changes: what differs from the settings and has a value in every
    candidate: "learning_rate", "weight_decay", or a setting of the objective. The values are inputs of the compiled program.
    """

    checkpoint: str
    seed: int
    changes: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """One candidate, fine-tuned for some epochs: where it stood in the list given, what was measured, and its model.

    metrics: what `evaluate` measures on the test images. seconds, gflops: of the work up to here; the tests are in the
    seconds only. diverged_at: the first step whose loss was not finite, None if there was none; the metrics are then NaN.
    """

    index: int
    epoch: int
    metrics: dict[str, float]
    seconds: float
    gflops: float
    model: dict | None
    diverged_at: int | None


def total_steps(settings: FinetuneSettings, num_train: int, what: str) -> int:
    return settings.steps or settings.epochs * steps_per_epoch(num_train, settings.batch_size, what)


def early_epochs(scores: Sequence[str]) -> list[int]:
    """The epochs after which the scores among FINETUNE_SCORES stop, in ascending order."""
    return sorted(FINETUNE_SCORES[score] for score in scores if score in FINETUNE_SCORES)


def random_head(key, params: dict, net: Net) -> dict:
    """Gives a net a new classification head: see `net.with_new_head`."""
    return with_new_head(params, net, key)


def kept_head(key, params: dict, net: Net) -> dict:
    """Leaves the head as it was loaded: for LP-FT, whose checkpoints come with the weights of a probe."""
    return params


def finetune(
    checkpoints: Mapping[str, Checkpoint],
    candidates: Sequence[Candidate],
    net: Net,
    make_objective: Callable[..., Objective],
    feed: Joined,
    test: Feed,
    preprocessing: Preprocessing,
    settings: FinetuneSettings,
    mesh: Mesh,
    *,
    head: Callable[[jax.Array, dict, Net], dict] = random_head,
    evaluate: Callable[[Net, Preprocessing, Mesh], Measure] = classification,
    epochs: Sequence[int] = (),
    eval_batch_size: int = 512,
) -> Iterator[Finetuned]:
    """Fine-tunes from checkpoints on a target and tests the models; yields results group by group, and in a group by epoch.

    One program is compiled for all checkpoints, seeds and rates. The candidates of one seed, which see the same batches,
    train side by side.

    Args:
      checkpoints: name -> the checkpoint to start from, with any head or none; only its weights are used.
      net: the architecture of all of them, with the target's number of classes.
      make_objective: called with those of a candidate's changes that are no rates, as keyword arguments.
      mesh: its `sweep` axis says how many candidates train side by side.
      head: head(key, params, net) -> params with the head to start from: `random_head`, `kept_head` or another.
      evaluate: compiles what is measured, as `evaluation.classification` does.
      epochs: after each of these, in ascending order, the models are tested, and training stops after the last. The
        learning rate follows the whole schedule nevertheless. Empty: they are tested once, at its end.

    Raises:
      InputError: if the schedule is shorter than the last of `epochs`.
      ValueError: if the candidates do not all change the same settings.
    """
    what = next(iter(feed.feeds.values())).source.name
    length = settings.steps or settings.epochs * feed.steps_per_epoch
    stops = {epoch: epoch * feed.steps_per_epoch for epoch in epochs} or {-(-length // feed.steps_per_epoch): length}
    if max(stops.values()) > length:
        raise InputError(
            f"Fine-tuning on {what} ends after {length / feed.steps_per_epoch:.3g} epochs and cannot be tested after "
            f"{max(stops)}: give it more epochs or steps."
        )
    if not candidates:
        return
    if different := [c for c in candidates if set(c.changes) != set(candidates[0].changes)]:
        raise ValueError(f"candidates must change the same settings: {candidates[0]} and {different[0]} do not")

    def made(changes):
        rates = {name: value for name, value in changes.items() if name in RATES}
        objective = make_objective(**{name: value for name, value in changes.items() if name not in rates})
        return objective, make_optimizer(settings.optimizer, length, objective.groups, **rates)

    @jax.jit
    def start(model, seed, changes):
        params = head(jax.random.fold_in(jax.random.key(seed), 0x4EAD), model["params"], net)
        state = init_state(*made(changes), seed, {"params": params, "stats": model["stats"]})
        return {**state, "changes": changes}

    def step(state, batches):
        return make_train_step(*made(state["changes"]), preprocessing, feed.num_classes)(state, batches)

    run, measure = many_steps_of_many(step, feed.fetch, mesh), evaluate(net, preprocessing, mesh)
    objective = made(candidates[0].changes)[0]
    model = dict(zip(("params", "stats"), jax.eval_shape(net.init, jax.random.key(0)), strict=True))
    abstract = jax.eval_shape(start, model, 0, _arrays(candidates[0].changes))
    step_gflops = train_step_gigaflops(step, abstract, feed.sizes, preprocessing)
    max_steps = devices.max_steps_per_call(lambda: step_gflops)

    for group in _groups(candidates, mesh.shape["sweep"]):
        begun, own = time.perf_counter(), [candidates[index] for index in group]
        filled = own + own[-1:] * (mesh.shape["sweep"] - len(own))  # the last group repeats one to fill the devices
        states = [jax.device_get(start(checkpoints[c.checkpoint].model, c.seed, _arrays(c.changes))) for c in filled]
        state = devices.split(trees.stack(states), mesh, "sweep")
        label, seed = f"finetune {_names(own)} on {what}", own[0].seed
        diverged_at: list[int | None] = [None] * len(own)
        spent = time.perf_counter() - begun  # not counting what is done with the results
        for epoch, stop in stops.items():
            begun, before = time.perf_counter(), list(diverged_at)
            for trained in train(state, run, feed, seed=seed, total_steps=stop, what=label, max_steps=max_steps):
                state = trained.state
                diverged_at = [_first(*steps) for steps in zip(diverged_at, trained.diverged_at, strict=False)]
            model = evaluated(objective, state)
            metrics = measure(model, test, eval_batch_size)[: len(own)]
            # Not finite though the last loss was: the last step broke the model.
            diverged_at = [_first(d, stop if _any_nan(m) else None) for d, m in zip(diverged_at, metrics, strict=True)]
            spent += time.perf_counter() - begun
            for row, index in enumerate(group):
                diverged = diverged_at[row]
                if diverged is not None and before[row] is None:
                    logs.log.warning(
                        "Fine-tuning %s on %s diverged at step %d: it counts as failed. A lower "
                        "config.finetune.optimizer.learning_rate may help.",
                        own[row].checkpoint,
                        what,
                        diverged,
                    )
                yield Finetuned(
                    index,
                    epoch,
                    metrics[row] if diverged is None else dict.fromkeys(metrics[row], math.nan),
                    spent / len(own),
                    stop * step_gflops,
                    jax.tree.map(lambda x, row=row: x[row], model),
                    diverged,
                )


def _arrays(changes: Mapping[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in changes.items()}


def _names(candidates: Sequence[Candidate]) -> str:
    first, last = candidates[0].checkpoint, candidates[-1].checkpoint
    return first if first == last else f"{first} to {last}"


def _first(*steps: int | None) -> int | None:
    return next((step for step in steps if step is not None), None)


def _any_nan(metrics: Mapping[str, float]) -> bool:
    return any(map(math.isnan, metrics.values()))


def _groups(candidates: Sequence[Candidate], size: int) -> Iterator[list[int]]:
    """Indices of candidates of one seed, at most `size` together."""
    order = sorted(range(len(candidates)), key=lambda index: candidates[index].seed)
    for _, same in itertools.groupby(order, key=lambda index: candidates[index].seed):
        indices = list(same)
        yield from (indices[first : first + size] for first in range(0, len(indices), size))
