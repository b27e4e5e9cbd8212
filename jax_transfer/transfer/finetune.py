"""Fine-tuning (FT): each checkpoint gets a new head and is trained with the same loop as in pre-training.

The candidates (combinations of checkpoint, seed and learning rate) are trained in groups, with one candidate per device
of the `sweep` axis. One compiled program is reused for all groups. The models can also be tested before the end of the
schedule, as the scores that stop early require.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jax_transfer import devices, logs, trees
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.batches import Feed, Joined, steps_per_epoch
from jax_transfer.data.crops import CROPS
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Few, Listed, NotNegative, OneOf, Positive, Steps, check_itself
from jax_transfer.models.net import Net, with_new_head, without_projection
from jax_transfer.records import InputError
from jax_transfer.training.evaluation import Measure, classification
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import REUSE, Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import evaluated, init_state
from jax_transfer.training.steps import make_train_step, many_steps_of_many, memory_advice, train_step_gigaflops
from jax_transfer.transfer.softmax_regression import CHOICES

# Ranking by early stopping ("Ranking Neural Checkpoints", section 3.1): fine-tuning on part of the training images
# stops after this many epochs, before the end of the schedule. The score is the accuracy on the remaining training
# images.
FINETUNE_SCORES = {"finetune_1": 1, "finetune_5": 5}

RATES = ("learning_rate", "weight_decay")  # optimizer settings that a candidate may change

Augmentation = Annotated[str, OneOf(ChainMap(CROPS, AUGMENTATIONS, MIXINGS), "augmentation")]
Augmentations = Annotated[tuple[Augmentation, ...], Listed(first=CROPS)]


@dataclasses.dataclass(frozen=True)
class Reuse:
    """An entry of `config.finetune.reuse`: a way of fine-tuning with source images or source labels.

    Unset fields have the values of `config.finetune`.
    """

    objective: Annotated[str, OneOf(REUSE, "objective of fine-tuning")]
    # A key of config.select.selections, for an objective that trains on source images.
    selection: str | None = None
    # Number of source images in a step; unset: as many as target images.
    batch_size: Count | None = None
    # Weights of the loss that is added to that of plain fine-tuning, which become part of the grid of settings; unset:
    # 2.3 for cotuning, and 1 for the others.
    source_weights: Annotated[tuple[Positive, ...], Listed(filled=True, unique=True)] | None = None
    learning_rates: Annotated[tuple[Positive, ...], Listed(filled=True, unique=True)] | None = None
    weight_decays: Annotated[tuple[NotNegative, ...], Listed(filled=True, unique=True)] | None = None
    # joint: whether the head for the source has all of its classes, or only the selected ones.
    only_selected_classes: bool = False

    def __str__(self) -> str:
        """Names it in messages."""
        return f"{self.objective} with {self.selection}" if self.selection else self.objective


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The fields of `config.finetune`."""

    epochs: Count = 100
    # Number of training steps; if set, it is used instead of `epochs`.
    steps: Steps | None = None
    batch_size: Count = 128
    # As in config.pretrain.remat.
    remat: bool = False
    # As in config.pretrain.microbatches.
    microbatches: Few = 1
    # As in config.pretrain.augment.
    augment: Augmentations = ()
    # Standard deviation of the new heads' kernels.
    head_std: Positive = 0.01
    num_seeds: Few = 1
    # Epochs (or steps) whose checkpoints are fine-tuned, out of the evaluated ones, in the format of
    # config.trajectory.epochs (or .steps); unset: all evaluated ones.
    checkpoints: str | None = None
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.01)  # noqa: RUF009  frozen
    # A grid of settings, all of which are tried with the first seed. Unset: the value of the optimizer alone; a single
    # value replaces that of the optimizer. Scores that stop early never use what was chosen from a grid, but the
    # optimizer's values.
    learning_rates: Annotated[tuple[Positive, ...], Listed(filled=True, unique=True)] | None = None
    weight_decays: Annotated[tuple[NotNegative, ...], Listed(filled=True, unique=True)] | None = None
    # How a point of the grid is chosen. validation: by its accuracy on a stratified fifth of the training images, after
    # training on the others; the chosen one is trained again on all training images and tested once. test: the best
    # accuracy on the test images, which is optimistic ("Ranking Neural Checkpoints" defines its ground truth G so).
    choose: Annotated[str, OneOf(dict.fromkeys(CHOICES), "choice")] = "validation"
    # Ways of fine-tuning with pre-training data, which are compared with plain fine-tuning:
    # ({"objective": "joint", "selection": "uot", "source_weights": (0.1, 1.0)}, {"objective": "cotuning"}, ...).
    reuse: tuple[Reuse, ...] = ()

    def __post_init__(self):
        check_itself(self)


def grid(settings: FinetuneSettings, source_weights: Sequence[float] | None = None) -> list[dict[str, float]]:
    """Returns the points of the grid of settings, the last setting varying fastest; a single one if there is no grid.

    Args:
      source_weights: weights of the source for an objective of `objectives.REUSE`, a third setting of every point; None
        for an objective without one.

    >>> grid(FinetuneSettings(learning_rates=(0.1, 0.01), weight_decays=(0.0,)))
    [{'learning_rate': 0.1, 'weight_decay': 0.0}, {'learning_rate': 0.01, 'weight_decay': 0.0}]
    >>> [point["source_weight"] for point in grid(FinetuneSettings(), source_weights=(0.1, 0.3))]
    [0.1, 0.3]
    """
    values = {
        "learning_rate": settings.learning_rates or (settings.optimizer.learning_rate,),
        "weight_decay": settings.weight_decays or (settings.optimizer.weight_decay,),
        **({} if source_weights is None else {"source_weight": source_weights}),
    }
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


class Candidate(NamedTuple):
    """One fine-tuning run.

    Attributes:
      checkpoint: name of the checkpoint to start from.
      seed: seed of the head, the batches and the augmentation.
      changes: settings that override the config: "learning_rate", "weight_decay" or a setting of the objective.
        All candidates must change the same settings. The values are inputs of the compiled program.
      arrays: name -> array, or tree of arrays, of the objective, such as the relationship of classes of `cotuning`.
        Those of all candidates must have the same names, shapes and dtypes. They are inputs of the compiled program,
        too.
    """

    checkpoint: str
    seed: int
    changes: Mapping[str, float] = {}
    arrays: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A candidate after fine-tuning for some epochs.

    Attributes:
      index: index of the candidate in the list passed to `finetune`.
      epoch: number of epochs trained.
      metrics: metrics measured by `evaluate` on the test images; all NaN if the training diverged.
      seconds: time spent so far, including the tests, divided by the number of candidates in the group.
      gflops: floating point operations / 1e9 of the training so far, excluding the tests and what `settings.remat`
        computes again.
      model: {"params", "stats"}.
      diverged_at: the first step with a loss that is not finite, or None.
    """

    index: int
    epoch: int
    metrics: dict[str, float]
    seconds: float
    gflops: float
    model: dict | None
    diverged_at: int | None


def total_steps(settings: FinetuneSettings, num_train: int, what: str) -> int:
    """Returns the number of training steps for `num_train` images.

    Args:
      settings: `steps` is used if set, otherwise `epochs` and `batch_size`.
      num_train: number of training images.
      what: name of the data set, used in messages.

    Raises:
      InputError: if there are not enough images for one batch.

    Example:
      >>> total_steps(FinetuneSettings(epochs=10, batch_size=32), num_train=100, what="pets")
      30
    """
    return settings.steps or settings.epochs * steps_per_epoch(num_train, settings.batch_size, what)


def early_epochs(scores: Sequence[str]) -> list[int]:
    """Returns the epochs at which the early-stopping scores stop, in ascending order; ignores other scores.

    Example:
      >>> early_epochs(["finetune_5", "logme", "finetune_1"])
      [1, 5]
    """
    return sorted(FINETUNE_SCORES[score] for score in scores if score in FINETUNE_SCORES)


def random_head(key: Key[Array, ""], params: dict, net: Net, std: float = 0.01) -> dict:
    """Replaces the classification head with a random one for the classes of `net`; see `net.with_new_head`.

    Example:
      >>> import types
      >>> net = types.SimpleNamespace(num_classes=2, feature_dim=3, classifier=("fc",))
      >>> random_head(jax.random.key(0), {"conv": {}}, net)["fc"]["kernel"].shape
      (3, 2)
    """
    return with_new_head(params, net, key, std)


def kept_head(key: Key[Array, ""], params: dict, net: Net) -> dict:
    """Keeps the head of the checkpoint. Used for LP-FT, where the head holds the weights of a linear probe.

    Example:
      >>> kept_head(None, {"fc": {}}, None)
      {'fc': {}}
    """
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
    head: Callable[[jax.Array, dict, Net], dict] | None = None,
    evaluate: Callable[[Net, Preprocessing, Mesh], Measure] = classification,
    epochs: Sequence[int] = (),
    eval_batch_size: int = 512,
) -> Iterator[Finetuned]:
    """Fine-tunes checkpoints on a target, tests the models and yields the results, ordered by group and epoch.

    One program is compiled for all checkpoints, seeds and learning rates. Candidates with the same seed see the same
    batches and are trained in parallel.

    Args:
      checkpoints: name -> the checkpoint to start from, with or without a classification head. Only the weights of
        the checkpoint are used, without a projection, which no objective of a target trains.
      candidates: the fine-tuning runs to perform.
      net: the architecture of all checkpoints, with as many classes as the target has.
      make_objective: returns the objective. It is called with the candidate's changes that are not in RATES and with
        its arrays, as keyword arguments.
      feed: training images, and those of the other feeds that the objective reads; the first feed is the target.
      test: test images.
      preprocessing: preprocessing of all images.
      settings: schedule, batch size and optimizer.
      mesh: the size of its `sweep` axis is the number of candidates trained in parallel.
      head: head(key, params, net) -> params with the initial head, such as `kept_head`; by default `random_head` with
        the standard deviation in the settings.
      evaluate: compiles the function that measures the metrics; see `evaluation.classification`.
      epochs: epochs after which the models are tested, in ascending order; training stops after the last of them. The
        learning rate still follows the whole schedule. Empty: the models are tested once, at the end of the schedule.
      eval_batch_size: batch size of the tests.

    Raises:
      InputError: if the schedule ends before the last of `epochs`.
      ValueError: if the candidates do not all change the same settings, or have different arrays.

    Example:
      >>> import types
      >>> import numpy as np
      >>> from jax_transfer.data import batches
      >>> from jax_transfer.data.sources import from_arrays
      >>> from jax_transfer.models.net import Output
      >>> from jax_transfer.training.objectives import OBJECTIVES
      >>> def apply(params, stats, images):
      ...     features = images.mean((1, 2))
      ...     return Output(features @ params["fc"]["kernel"] + params["fc"]["bias"], features)
      >>> net = Net(
      ...     "linear", num_classes=2, feature_dim=3, min_image_size=1, classifier=("fc",),
      ...     init=lambda key: ({"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}, {}),
      ...     apply=apply, apply_train=lambda params, stats, images, key: (apply(params, stats, images), stats),
      ... )
      >>> labels = np.arange(8, dtype=np.int32) % 2
      >>> images = np.full((8, 4, 4, 3), 200 * labels[:, None, None, None], np.uint8)
      >>> mesh, preprocessing = devices.make_mesh(), Preprocessing(image_size=4)
      >>> source = from_arrays(images, labels, name="toy", split="train")
      >>> feed = batches.make_feed(source, preprocessing, mesh, resident_gigabytes=1.0, num_threads=1)
      >>> results = finetune(
      ...     {"a": types.SimpleNamespace(model={"params": {}, "stats": {}})}, [Candidate("a", seed=0)], net,
      ...     lambda: OBJECTIVES["supervised"](net, ()), batches.joined({"train": (feed, 4)}), feed, preprocessing,
      ...     FinetuneSettings(epochs=5, batch_size=4), mesh,
      ... )
      >>> [(result.epoch, result.metrics["accuracy"]) for result in results]
      [(5, 1.0)]
    """
    what = next(iter(feed.feeds.values())).source.name
    length = settings.steps or settings.epochs * feed.steps_per_epoch
    stops = {epoch: epoch * feed.steps_per_epoch for epoch in epochs} or {-(-length // feed.steps_per_epoch): length}
    if max(stops.values()) > length:
        raise InputError(
            f"Fine-tuning on {what} ends after {length / feed.steps_per_epoch:.3g} epochs and cannot be tested after "
            f"{max(stops)}: use more epochs or steps."
        )
    if not candidates:
        return
    first = candidates[0]
    if different := [c for c in candidates if set(c.changes) != set(first.changes)]:
        changes = [sorted(candidate.changes) for candidate in (first, different[0])]
        raise ValueError(f"candidates must change the same settings: {changes[0]} and {changes[1]} differ.")
    if differences := [text for c in candidates if (text := trees.difference(first.arrays, c.arrays))]:
        raise ValueError(f"candidates must have arrays of the same names, shapes and dtypes:\n{differences[0]}")
    make_head = functools.partial(random_head, std=settings.head_std) if head is None else head

    def make_objective_and_optimizer(changes, arrays):
        rates = {name: value for name, value in changes.items() if name in RATES}
        others = {name: value for name, value in changes.items() if name not in rates}
        objective = make_objective(**others, **arrays)
        return objective, make_optimizer(settings.optimizer, length, objective.groups, **rates)

    @jax.jit
    def start(model, seed, changes, arrays):
        weights = without_projection(model["params"])
        params = make_head(jax.random.fold_in(jax.random.key(seed), 0x4EAD), weights, net)
        made = make_objective_and_optimizer(changes, arrays)
        state = init_state(*made, seed, {"params": params, "stats": model["stats"]})
        return {**state, "changes": changes, "arrays": arrays}

    def make_step(**memory):
        def step(state, batches):
            objective, optimizer = make_objective_and_optimizer(state["changes"], state["arrays"])
            return make_train_step(objective, optimizer, preprocessing, feed.num_classes, **memory)(state, batches)

        return step

    memory = {"remat": settings.remat, "microbatches": settings.microbatches}
    run, measure = many_steps_of_many(make_step(**memory), feed.fetch, mesh), evaluate(net, preprocessing, mesh)
    objective = make_objective_and_optimizer(first.changes, first.arrays)[0]
    model = dict(zip(("params", "stats"), jax.eval_shape(net.init, jax.random.key(0)), strict=True))
    abstract = jax.eval_shape(start, model, 0, *_inputs(first))
    step_gflops = train_step_gigaflops(make_step(), abstract, feed.sizes, objective.views, preprocessing)
    max_steps = devices.max_steps_per_call(lambda: step_gflops)
    options = {"max_steps": max_steps, "advice": memory_advice("config.finetune", **memory)}

    for group in _groups(candidates, mesh.shape["sweep"]):
        start_time, own = time.perf_counter(), [candidates[index] for index in group]
        filled = own + own[-1:] * (mesh.shape["sweep"] - len(own))  # repeats the last candidate to fill all devices
        states = [jax.device_get(start(checkpoints[c.checkpoint].model, c.seed, *_inputs(c))) for c in filled]
        state = devices.split(trees.stack(states), mesh, "sweep")
        label, seed = f"finetune {_names(own)} on {what}", own[0].seed
        diverged_at: list[int | None] = [None] * len(own)
        seconds = time.perf_counter() - start_time  # excludes the time that the caller spends on each result
        for epoch, stop in stops.items():
            start_time, previous = time.perf_counter(), list(diverged_at)
            for trained in train(state, run, feed, seed=seed, total_steps=stop, what=label, **options):
                state = trained.state
                diverged_at = [_first(*steps) for steps in zip(diverged_at, trained.diverged_at, strict=False)]
            model = evaluated(objective, state)
            measured = measure(model, test, eval_batch_size)
            assert measured is not None  # it is None only for a measurement that was stopped, and this one cannot be
            metrics = measured[: len(own)]
            # If the metrics are NaN although the last loss was finite, the last step diverged.
            diverged_at = [_first(d, stop if _any_nan(m) else None) for d, m in zip(diverged_at, metrics, strict=True)]
            seconds += time.perf_counter() - start_time
            for row, index in enumerate(group):
                diverged = diverged_at[row]
                if diverged is not None and previous[row] is None:
                    logs.log.warning(
                        "Fine-tuning %s on %s diverged at step %d and is recorded as failed: try a lower "
                        "config.finetune.optimizer.learning_rate.",
                        own[row].checkpoint,
                        what,
                        diverged,
                    )
                yield Finetuned(
                    index,
                    epoch,
                    metrics[row] if diverged is None else dict.fromkeys(metrics[row], math.nan),
                    seconds / len(own),
                    stop * step_gflops,
                    jax.tree.map(lambda x, row=row: x[row], model),
                    diverged,
                )


def _inputs(candidate: Candidate) -> tuple[dict[str, jax.Array], dict]:
    """Returns the changes and the arrays of a candidate as inputs of a compiled program."""
    return {name: jnp.float32(value) for name, value in candidate.changes.items()}, dict(candidate.arrays)


def _names(candidates: Sequence[Candidate]) -> str:
    """Returns the names of a group's first and last checkpoint, for the progress bar."""
    first, last = candidates[0].checkpoint, candidates[-1].checkpoint
    return first if first == last else f"{first} to {last}"


def _first(*steps: int | None) -> int | None:
    """Returns the first step that is not None."""
    return next((step for step in steps if step is not None), None)


def _any_nan(metrics: Mapping[str, float]) -> bool:
    return any(map(math.isnan, metrics.values()))


def _groups(candidates: Sequence[Candidate], size: int) -> Iterator[list[int]]:
    """Yields groups of candidate indices: at most `size` candidates, all with the same seed."""
    order = sorted(range(len(candidates)), key=lambda index: candidates[index].seed)
    for _, same_seed in itertools.groupby(order, key=lambda index: candidates[index].seed):
        indices = list(same_seed)
        yield from (indices[first : first + size] for first in range(0, len(indices), size))
