"""Optimizers and learning-rate schedules from optax, in units of steps."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import optax

from jax_transfer.choose import choose
from jax_transfer.fields import NotNegative, OneOf, Part, Positive, Probability, Rule, UpTo, check_itself


def constant(settings: "OptimizerSettings", rate: float, steps: int) -> optax.Schedule:
    """Returns the constant learning rate `rate`.

    Example:
      >>> constant(OptimizerSettings(), 0.1, 100)(50)
      0.1
    """
    return optax.constant_schedule(rate)


def cosine(settings: "OptimizerSettings", rate: float, steps: int) -> optax.Schedule:
    """Decays the learning rate from `rate` to settings.min_learning_rate by half a cosine.

    Example:
      >>> schedule = cosine(OptimizerSettings(), 0.1, 100)
      >>> [round(float(schedule(step)), 2) for step in (0, 50, 100)]
      [0.1, 0.05, 0.0]
    """
    return optax.cosine_decay_schedule(rate, max(steps, 1), alpha=settings.min_learning_rate / rate)


def step_decay(settings: "OptimizerSettings", rate: float, steps: int) -> optax.Schedule:
    """Multiplies the learning rate by settings.decay_factor at each of settings.milestones.

    Example:
      >>> schedule = step_decay(OptimizerSettings(milestones=(0.5,)), 0.1, 100)
      >>> [round(float(schedule(step)), 2) for step in (0, 51)]
      [0.1, 0.01]
    """
    boundaries = {round(fraction * steps): settings.decay_factor for fraction in settings.milestones}
    return optax.piecewise_constant_schedule(rate, boundaries)


SCHEDULES = {"constant": constant, "cosine": cosine, "step": step_decay}


def sgd(
    settings: "OptimizerSettings", schedule: optax.Schedule, weight_decay: float, mask
) -> optax.GradientTransformation:
    """Makes SGD with momentum, where the weight decay is added to the gradient, as in torch.

    Args:
      settings: momentum and nesterov are used.
      schedule: the learning rate.
      weight_decay: strength of the L2 penalty.
      mask: parameters -> tree of booleans, True where the weight decay applies, or None if it applies everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = sgd(OptimizerSettings(), optax.constant_schedule(0.1), 0.0, None)
      >>> updates, _ = optimizer.update(jnp.ones(()), optimizer.init(jnp.zeros(())), jnp.zeros(()))
      >>> round(float(updates), 2)
      -0.1
    """
    momentum = settings.momentum or None
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(schedule, momentum, settings.nesterov))


def adam(
    settings: "OptimizerSettings", schedule: optax.Schedule, weight_decay: float, mask
) -> optax.GradientTransformation:
    """Makes Adam, where the weight decay is added to the gradient, as in torch; the arguments are those of `sgd`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = adam(OptimizerSettings(), optax.constant_schedule(0.1), 0.0, None)
      >>> updates, _ = optimizer.update(jnp.full((), 5.0), optimizer.init(jnp.zeros(())), jnp.zeros(()))
      >>> round(float(updates), 2)
      -0.1
    """
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.adam(schedule, settings.b1, settings.b2))


def adamw(
    settings: "OptimizerSettings", schedule: optax.Schedule, weight_decay: float, mask
) -> optax.GradientTransformation:
    """Makes AdamW, whose weight decay is independent of the gradient; the arguments are those of `sgd`.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = adamw(OptimizerSettings(), optax.constant_schedule(0.1), 0.5, None)
      >>> updates, _ = optimizer.update(jnp.zeros(()), optimizer.init(jnp.ones(())), jnp.ones(()))
      >>> round(float(updates), 2)
      -0.05
    """
    return optax.adamw(schedule, settings.b1, settings.b2, weight_decay=weight_decay, mask=mask)


def amsgrad(
    settings: "OptimizerSettings", schedule: optax.Schedule, weight_decay: float, mask
) -> optax.GradientTransformation:
    """Makes Adam with AMSGrad, whose step is divided by the largest average of squares so far; see `sgd` for arguments.

    Reddi et al., "On the Convergence of Adam and Beyond", ICLR 2018. Like optax, and unlike torch, it takes the largest
    of the averages after their bias is corrected. The weight decay is added to the gradient, as in torch.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = amsgrad(OptimizerSettings(), optax.constant_schedule(0.1), 0.0, None)
      >>> updates, _ = optimizer.update(jnp.full((), 5.0), optimizer.init(jnp.zeros(())), jnp.zeros(()))
      >>> round(float(updates), 2)
      -0.1
    """
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.amsgrad(schedule, settings.b1, settings.b2))


EMBEDDINGS = ("cls_token", "pos_embed")  # parameters of a transformer that timm never decays

OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "amsgrad": amsgrad}
DECAY = Rule(lambda x: 0 <= x < 1, "lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The fields of `config.*.optimizer`."""

    name: Annotated[str, OneOf(OPTIMIZERS, "optimizer")] = "sgd"
    learning_rate: Positive = 0.1
    # The learning rate of the heads divided by the learning rate of the backbone.
    head_learning_rate_factor: NotNegative = 1.0
    momentum: Probability = 0.9
    nesterov: bool = False
    # Adam, AdamW and AMSGrad: decay rates of the averages of the gradient and of its square, the betas of torch.
    b1: Annotated[float, DECAY] = 0.9
    b2: Annotated[float, DECAY] = 0.999
    # Largest length of the gradient of all parameters together, to which a longer one is scaled; unset: any length.
    clip_norm: Positive | None = None
    weight_decay: NotNegative = 0.0
    # Whether BatchNorm parameters, biases and embeddings are decayed too, as in torch; large-batch recipes exclude
    # them.
    decay_norm_and_bias: bool = True
    schedule: Annotated[str, OneOf(SCHEDULES, "schedule")] = "constant"
    # Fractions of training after which the step schedule decays.
    milestones: tuple[Part, ...] = ()
    decay_factor: NotNegative = 0.1
    # Final learning rate of the cosine schedule.
    min_learning_rate: Annotated[float, UpTo("learning_rate")] = 0.0
    # Fraction of training during which the learning rate grows linearly, and the learning rate at which it starts.
    warmup: Part = 0.0
    warmup_learning_rate: Annotated[float, UpTo("learning_rate")] = 0.0

    def __post_init__(self):
        check_itself(self)


def make_schedule(settings: OptimizerSettings, steps: int, learning_rate=None) -> optax.Schedule:
    """Makes the learning rate as a function of the step, including the warmup.

    Args:
      settings: schedule, learning rate and warmup.
      steps: number of training steps.
      learning_rate: replaces settings.learning_rate; may be traced.

    Raises:
      InputError: if the schedule is unknown.

    Example:
      >>> schedule = make_schedule(OptimizerSettings(learning_rate=0.4, warmup=0.5, schedule="cosine"), steps=8)
      >>> [round(float(schedule(step)), 2) for step in (0, 2, 4, 6, 8)]
      [0.0, 0.2, 0.4, 0.2, 0.0]
    """
    rate = settings.learning_rate if learning_rate is None else learning_rate
    warmup = round(settings.warmup * steps)
    schedule = choose(SCHEDULES, settings.schedule, "learning-rate schedule")(settings, rate, steps - warmup)
    if not warmup:
        return schedule
    growing = optax.linear_schedule(settings.warmup_learning_rate, rate, warmup)
    return optax.join_schedules([growing, schedule], [warmup])


def make_optimizer(
    settings: OptimizerSettings,
    steps: int,
    groups: Callable[[Any], Any] | None = None,
    learning_rate=None,
    weight_decay=None,
) -> optax.GradientTransformation:
    """Makes the optimizer for `steps` training steps.

    Args:
      settings: optimizer, schedule and weight decay.
      steps: number of training steps.
      groups: labels each parameter "backbone" or "head" (`Objective.groups`); if None, all belong to the backbone.
      learning_rate, weight_decay: replace the values in the settings. They may be traced, so that one compiled program
        is used for all values; the state returned by `init` does not depend on them.

    Raises:
      InputError: if the optimizer or the schedule is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = make_optimizer(OptimizerSettings(learning_rate=0.1), steps=100)
      >>> updates, _ = optimizer.update(jnp.ones(()), optimizer.init(jnp.zeros(())), jnp.zeros(()))
      >>> round(float(updates), 2)
      -0.1
    """
    make = choose(OPTIMIZERS, settings.name, "optimizer")
    mask = None if settings.decay_norm_and_bias else _decayed
    decay = settings.weight_decay if weight_decay is None else weight_decay
    optimizer = make(settings, make_schedule(settings, steps, learning_rate), decay, mask)
    if settings.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    if groups is None or settings.head_learning_rate_factor == 1:
        return optimizer
    factors = {"backbone": 1.0, "head": settings.head_learning_rate_factor}

    def scale(updates, params):
        return jax.tree.map(lambda update, group: factors[group] * update, updates, groups(params))

    # Scaling the updates scales the learning rate, since the updates, including weight decay, are proportional to it.
    return optax.chain(optimizer, optax.stateless(scale))


def _decayed(params):
    """Selects the parameters that timm decays: all but vectors, scalars and the embeddings of a transformer."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in EMBEDDINGS, params)
