"""Optimizers and learning-rate schedules, by optax. Epochs become steps here."""

import dataclasses
from typing import Annotated

import jax
import optax

from jax_transfer.choose import choose
from jax_transfer.fields import NotNegative, OneOf, Part, Positive, Probability, UpTo, check_itself


def constant(settings, steps):
    return optax.constant_schedule(settings.learning_rate)


def cosine(settings, steps):
    least = settings.min_learning_rate / settings.learning_rate
    return optax.cosine_decay_schedule(settings.learning_rate, max(steps, 1), alpha=least)


def step_decay(settings, steps):
    boundaries = {round(fraction * steps): settings.decay_factor for fraction in settings.milestones}
    return optax.piecewise_constant_schedule(settings.learning_rate, boundaries)


SCHEDULES = {"constant": constant, "cosine": cosine, "step": step_decay}


def sgd(settings, schedule, mask):
    """Momentum with L2 added to the gradient, as in torch."""
    momentum = settings.momentum or None
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask), optax.sgd(schedule, momentum, settings.nesterov)
    )


def adam(settings, schedule, mask):
    """Adam with L2 added to the gradient, as in torch."""
    return optax.chain(optax.add_decayed_weights(settings.weight_decay, mask), optax.adam(schedule))


def adamw(settings, schedule, mask):
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=mask)


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


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, for a training of `steps` steps."""
    warmup = round(settings.warmup * steps)
    after = choose(SCHEDULES, settings.schedule, "learning-rate schedule")(settings, steps - warmup)
    if not warmup:
        return after
    growing = optax.linear_schedule(settings.warmup_learning_rate, settings.learning_rate, warmup)
    return optax.join_schedules([growing, after], [warmup])


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """The gradient transformation for a training of `steps` steps.

    Raises:
      InputError: if the optimizer or the schedule does not exist.
    """
    make = choose(OPTIMIZERS, settings.name, "optimizer")
    mask = None if settings.decay_norm_and_bias else _decayed
    return make(settings, make_schedule(settings, steps), mask)


def _decayed(params):
    """The parameters that timm decays: no vectors and scalars, and no embeddings of a transformer."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in EMBEDDINGS, params)
