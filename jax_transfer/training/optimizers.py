"""Optimizers and learning-rate schedules, by optax. Epochs become steps here."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import optax

from jax_transfer.choose import choose
from jax_transfer.fields import NotNegative, OneOf, Part, Positive, Probability, UpTo, check_itself


def constant(settings, rate, steps):
    return optax.constant_schedule(rate)


def cosine(settings, rate, steps):
    return optax.cosine_decay_schedule(rate, max(steps, 1), alpha=settings.min_learning_rate / rate)


def step_decay(settings, rate, steps):
    boundaries = {round(fraction * steps): settings.decay_factor for fraction in settings.milestones}
    return optax.piecewise_constant_schedule(rate, boundaries)


SCHEDULES = {"constant": constant, "cosine": cosine, "step": step_decay}


def sgd(settings, schedule, weight_decay, mask):
    """Momentum with L2 added to the gradient, as in torch."""
    momentum = settings.momentum or None
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(schedule, momentum, settings.nesterov))


def adam(settings, schedule, weight_decay, mask):
    """Adam with L2 added to the gradient, as in torch."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.adam(schedule))


def adamw(settings, schedule, weight_decay, mask):
    return optax.adamw(schedule, weight_decay=weight_decay, mask=mask)


EMBEDDINGS = ("cls_token", "pos_embed")

OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw}


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The fields of `config.*.optimizer`."""

    name: Annotated[str, OneOf(OPTIMIZERS, "optimizer")] = "sgd"
    learning_rate: Positive = 0.1
    # The learning rate of the heads over that of the backbone.
    head_learning_rate_factor: NotNegative = 1.0
    momentum: Probability = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    # torch decays BatchNorm, biases and embeddings too; large-batch recipes do not.
    decay_norm_and_bias: bool = True
    schedule: Annotated[str, OneOf(SCHEDULES, "schedule")] = "constant"
    # Fractions of training after which the step schedule decays.
    milestones: tuple[Part, ...] = ()
    decay_factor: NotNegative = 0.1
    # Where the cosine schedule ends.
    min_learning_rate: Annotated[float, UpTo("learning_rate")] = 0.0
    # Fraction of training with a linearly growing rate, and where it begins.
    warmup: Part = 0.0
    warmup_learning_rate: Annotated[float, UpTo("learning_rate")] = 0.0

    def __post_init__(self):
        check_itself(self)


def make_schedule(settings: OptimizerSettings, steps: int, learning_rate=None) -> optax.Schedule:
    """The learning rate as a function of the step, for a training of `steps` steps.

    learning_rate: in place of that of the settings; it may be traced.
    """
    rate = settings.learning_rate if learning_rate is None else learning_rate
    warmup = round(settings.warmup * steps)
    after = choose(SCHEDULES, settings.schedule, "learning-rate schedule")(settings, rate, steps - warmup)
    if not warmup:
        return after
    growing = optax.linear_schedule(settings.warmup_learning_rate, rate, warmup)
    return optax.join_schedules([growing, after], [warmup])


def make_optimizer(
    settings: OptimizerSettings,
    steps: int,
    groups: Callable[[Any], Any] | None = None,
    learning_rate=None,
    weight_decay=None,
) -> optax.GradientTransformation:
    """The gradient transformation for a training of `steps` steps.

    Args:
      groups: labels each parameter "backbone" or "head" (`Objective.groups`); None: all are the backbone's.
      learning_rate, weight_decay: in place of those of the settings. They may be traced, so that one compiled program
        serves for all values; the state that `init` makes does not depend on them.

    Raises:
      InputError: if the optimizer or the schedule does not exist.
    """
    make = choose(OPTIMIZERS, settings.name, "optimizer")
    mask = None if settings.decay_norm_and_bias else _decayed
    decay = settings.weight_decay if weight_decay is None else weight_decay
    optimizer = make(settings, make_schedule(settings, steps, learning_rate), decay, mask)
    if groups is None or settings.head_learning_rate_factor == 1:
        return optimizer
    factors = {"backbone": 1.0, "head": settings.head_learning_rate_factor}

    def scale(updates, params):
        return jax.tree.map(lambda update, group: factors[group] * update, updates, groups(params))

    # The updates are proportional to the learning rate, weight decay included.
    return optax.chain(optimizer, optax.stateless(scale))


def _decayed(params):
    """The parameters that timm decays: no vectors and scalars, and no embeddings of a transformer."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in EMBEDDINGS, params)
