"""Softmax regression on fixed features, fitted with Adam on batches or with L-BFGS to the minimum of the loss."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jax_transfer.fields import Count, Few, Listed, NotNegative, OneOf, Part, Positive, Rule, Steps, UpTo, check_itself
from jax_transfer.numerics import positive
from jax_transfer.training.optimizers import SCHEDULES, OptimizerSettings, make_optimizer

Weights = dict[str, Array]  # a linear classifier: {"w": [d, c], "b": [c]}


CHOICES = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The fields of `config.probe`."""

    # Keys of jax_transfer.transfer.probe.PROTOCOLS: "probe" is FE as in the papers; "probe_converged" uses L-BFGS. And
    # "zero_shot", the head that CLIP makes from the names of the classes, without training.
    methods: Annotated[tuple[str, ...], Listed(filled=True, unique=True)] = ("probe",)
    epochs: Count = 100
    # Number of training steps, since the papers state iterations for some data sets. If set, it is used instead of
    # `epochs`, rounded to the nearest whole number of epochs.
    steps: Steps | None = None
    batch_size: Count = 128
    # Adam's learning rates and weight decays. If there are several, all pairs are compared, and the best one is used
    # (see `choose`). The weight decay is added to the gradient, that of the biases too, as in torch.
    learning_rates: Annotated[tuple[Positive, ...], Listed(filled=True, unique=True)] = (0.01,)
    weight_decays: Annotated[tuple[NotNegative, ...], Listed(filled=True, unique=True)] = (0.0,)
    # Schedule of Adam's learning rate: "constant", "cosine" or "step".
    schedule: Annotated[str, OneOf(SCHEDULES, "schedule")] = "constant"
    # Fractions of training after which the step schedule multiplies the learning rate by `decay_factor`.
    milestones: tuple[Part, ...] = ()
    decay_factor: NotNegative = 0.1
    # Final learning rate of the cosine schedule.
    min_learning_rate: Annotated[float, UpTo("learning_rates")] = 0.0
    # Penalties of "probe_converged": l2/2 |w|^2 is added to the mean cross-entropy. If there are several, the best one
    # is used (see `choose`).
    l2: Annotated[tuple[NotNegative, ...], Listed(filled=True, unique=True)] = (1e-4,)
    # How the best of several settings is chosen, for each checkpoint and seed. "validation": by the accuracy on images
    # of the training split that are held out; a classifier with this setting is then fitted to all training images and
    # tested. "test": every setting is fitted to all training images, and the best accuracy on the test images is the
    # result. This is too optimistic, but some papers report it.
    choose: Annotated[str, OneOf(dict.fromkeys(CHOICES), "choice")] = "validation"
    # Fraction of the training images of each class that "validation" holds out.
    validation_fraction: Annotated[float, Rule(lambda x: 0 < x < 1, "lie in (0, 1)")] = 0.2
    num_seeds: Few = 1

    def __post_init__(self):
        check_itself(self)


def cross_entropy(weights: Weights, x: Float[Array, "n d"], y: Int[Array, " n"]) -> Float[Array, ""]:
    """Computes the mean softmax cross-entropy of the linear classifier {"w": [d, c], "b": [c]}, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
      >>> round(float(cross_entropy(weights, jnp.ones((4, 3)), jnp.array([0, 1, 0, 1]))), 2)
      0.69
    """
    logits = x @ weights["w"] + weights["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def gaussian_start(key: Key[Array, ""], d: int, num_classes: int) -> Weights:
    """Draws initial weights with a standard deviation of 0.01; the biases are 0.

    Example:
      >>> import jax
      >>> gaussian_start(jax.random.key(0), d=3, num_classes=2)["w"].shape
      (3, 2)
    """
    return {"w": 0.01 * jax.random.normal(key, (d, num_classes)), "b": jnp.zeros(num_classes)}


def epochs_and_steps(settings: ProbeSettings, n: int) -> tuple[int, int, int]:
    """Returns (epochs, steps per epoch, batch size) for n examples; fewer examples than a batch form one batch.

    Example:
      >>> epochs_and_steps(ProbeSettings(epochs=100, batch_size=128), n=1000)
      (100, 7, 128)
    """
    batch = min(settings.batch_size, n)
    steps = n // batch
    return (max(1, round(settings.steps / steps)) if settings.steps else settings.epochs), steps, batch


def minibatch(
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    indices: Int[Array, " m"],
    learning_rate: float,
    key: Key[Array, ""],
    num_classes: int,
    settings: ProbeSettings,
    start: Weights | None = None,
    weight_decay: float = 0.0,
) -> Weights:
    """Fits a softmax regression with Adam on batches that are drawn without replacement in each epoch.

    Args:
      x: features.
      y: labels in [0, num_classes).
      indices: rows of x to fit.
      learning_rate: learning rate of Adam, with which the schedule starts.
      key: random key of the batches and of the initial weights.
      num_classes: C, static.
      settings: `epochs`, `steps`, `batch_size` and the schedule are used.
      start: initial weights; None: `gaussian_start`.
      weight_decay: multiple of the weights and biases that is added to their gradients.

    Returns:
      {"w": [d, c], "b": [c]}.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0], [0.9], [-1.0], [-0.9]]), jnp.array([0, 0, 1, 1])
      >>> weights = minibatch(x, y, jnp.arange(4), 0.1, jax.random.key(0), 2, ProbeSettings(epochs=20))
      >>> jnp.argmax(x @ weights["w"] + weights["b"], axis=-1).tolist()
      [0, 0, 1, 1]
    """
    epochs, steps, batch = epochs_and_steps(settings, len(indices))
    optimizer = make_optimizer(_adam(settings), epochs * steps, None, learning_rate, weight_decay)
    key_start, key_order = jax.random.split(key)
    weights = gaussian_start(key_start, x.shape[1], num_classes) if start is None else start

    def step(carry, rows):
        weights, state = carry
        update, state = optimizer.update(jax.grad(cross_entropy)(weights, x[rows], y[rows]), state, weights)
        return (jax.tree.map(jnp.add, weights, update), state), None

    def epoch(carry, i):
        order = jax.random.permutation(jax.random.fold_in(key_order, i), indices)
        return jax.lax.scan(step, carry, order[: steps * batch].reshape(steps, batch))

    return jax.lax.scan(epoch, (weights, optimizer.init(weights)), jnp.arange(epochs))[0][0]


def _adam(settings: ProbeSettings) -> OptimizerSettings:
    """Returns Adam with the schedule of the settings, and with one of their learning rates."""
    return OptimizerSettings(
        name="adam",
        learning_rate=settings.learning_rates[0],
        schedule=settings.schedule,
        milestones=settings.milestones,
        decay_factor=settings.decay_factor,
        min_learning_rate=settings.min_learning_rate,
    )


def zero_start(d: int, occurs: Bool[Array, " c"]) -> Weights:
    """Returns zero weights; the bias of a missing class is so low that its probability and gradient are exactly 0.

    Example:
      >>> import jax.numpy as jnp
      >>> zero_start(3, jnp.array([True, False]))["b"].tolist()
      [0.0, -1000000000.0]
    """
    return {"w": jnp.zeros((d, len(occurs))), "b": jnp.where(occurs, 0.0, -1e9)}


def standardised(
    x: Float[Array, "n d"], share: Float[Array, " n"] | None = None
) -> tuple[Float[Array, "n d"], Float[Array, "d"], Float[Array, ""]]:
    """Centres features and divides them by one common scale: the largest standard deviation (1 if that is 0).

    Args:
      x: features.
      share: weight of each row in the mean and the standard deviations; the weights sum to 1. None: equal weights.

    Returns:
      ((x - mean) / scale, mean, scale).

    Example:
      >>> import jax.numpy as jnp
      >>> z, mean, scale = standardised(jnp.array([[0.0, 5.0], [4.0, 7.0]]))
      >>> z.tolist(), mean.tolist(), float(scale)
      ([[-1.0, -0.5], [1.0, 0.5]], [2.0, 6.0], 2.0)
    """
    mean = x.mean(0) if share is None else share @ x
    largest = positive(jnp.abs(x - mean).max())  # scaled first, since the squares of large values overflow
    scaled = (x - mean) / largest
    deviations = scaled.std(0) if share is None else jnp.sqrt(share @ (scaled - share @ scaled) ** 2)
    scale = positive(deviations.max()) * largest
    return (x - mean) / scale, mean, scale


def converged(
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    indices: Int[Array, " m"],
    l2: float | Float[Array, "*v"],
    key: Key[Array, ""],
    num_classes: int,
    settings: ProbeSettings,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    mask: Bool[Array, " m"] | None = None,
) -> Weights:
    """Minimises mean cross-entropy + l2/2 ||w||^2 with L-BFGS for one or several l2; the bias is not penalised.

    The features are first centred and divided by one common scale, which improves the conditioning and gives `l2` the
    same meaning for features of any size. The values of l2 are solved in descending order, and each solution is the
    start for the next. Under vmap, the checkpoints are processed one by one, so that each stops when it has converged.
    The result is deterministic: `key` and `settings` exist only to match the signature of `minibatch`, and are ignored.

    Args:
      x: features.
      y: labels in [0, num_classes).
      indices: rows of x to fit. A class without rows is never predicted.
      l2: one positive number or several [v].
      key: ignored.
      num_classes: C, static.
      settings: ignored.
      tolerance: stops when the objective is within this relative distance of its minimum. Rounding in float32 may stop
        the iteration earlier.
      max_steps: maximum number of steps for each l2.
      mask: False for entries of `indices` that are padding and have no influence. None: no padding.

    Returns:
      {"w": [d, c], "b": [c]}, with a leading axis [v] if l2 has several values.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0], [0.9], [-1.0], [-0.9]]), jnp.array([0, 0, 1, 1])
      >>> weights = converged(x, y, jnp.arange(4), 1e-2, jax.random.key(0), 2, ProbeSettings())
      >>> jnp.argmax(x @ weights["w"] + weights["b"], axis=-1).tolist()
      [0, 0, 1, 1]
    """
    l2 = jnp.asarray(l2, x.dtype)

    mask = jnp.ones(len(indices), bool) if mask is None else mask

    @jax.custom_batching.sequential_vmap
    def fit(x, y, indices, l2, mask):
        share = mask / jnp.sum(mask, dtype=x.dtype)
        x, mean, scale = standardised(x[indices], share)
        occurs = jnp.zeros(num_classes, bool).at[y[indices]].max(mask)
        descending = jnp.argsort(-l2)

        def next_l2(weights: Weights, l2: Float[Array, ""]) -> tuple[Weights, Weights]:
            weights = _minimum(x, y[indices], share, l2, weights, tolerance, max_steps)
            return weights, weights

        _, weights = jax.lax.scan(next_l2, zero_start(x.shape[1], occurs), l2[descending])
        weights = jax.tree.map(lambda leaf: leaf[jnp.argsort(descending)], weights)
        w = weights["w"] / scale
        return {"w": w, "b": weights["b"] - mean @ w}

    weights = fit(x, y, indices, l2.ravel(), mask)
    return jax.tree.map(lambda leaf: leaf.reshape(*l2.shape, *leaf.shape[1:]), weights)


def _minimum(
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    share: Float[Array, " n"],
    l2: Float[Array, ""],
    weights: Weights,
    tolerance: float,
    max_steps: int,
) -> Weights:
    """Runs L-BFGS (optax's directions) with a line search on the logits; row i has the weight share[i].

    The entries of share sum to 1. The logits are affine in the step size, so a step costs two products with x (one for
    the direction of the logits and one for the gradient), however many step sizes the search tries. Classes are the
    leading axis of the weights [c, d + 1] (the bias is the last column) and of the logits [c, n], since products in
    this layout are faster.
    """
    x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)
    transposed = x.T
    decay = l2 * jnp.ones(x.shape[1], x.dtype).at[-1].set(0)
    start = jnp.concatenate([weights["w"].T, weights["b"][:, None]], axis=1)
    is_label = jnp.arange(len(start))[:, None] == y
    lbfgs = optax.scale_by_lbfgs()

    def unfinished(state):
        # A function whose curvature is at least h is at most |gradient|^2 / 2h above its minimum. Here the curvature is
        # at least l2 in w, and about 1/c in b.
        is_far = jnp.sum(state["gradient"] ** 2) > 2 * jnp.minimum(l2, 1 / len(is_label)) * tolerance * state["value"]
        return is_far & (state["steps"] < max_steps) & (state["steps"] - state["last_progress"] < PATIENCE)

    def step(state):
        weights, logits, gradient = state["weights"], state["logits"], state["gradient"]
        # optax declares the update as an arbitrary tree; here it is an array with the shape of the gradient.
        direction: Float[Array, "c m"]
        direction, memory = lbfgs.update(  # pyright: ignore[reportAssignmentType]
            gradient, state["memory"], weights
        )
        logits_direction = -direction @ transposed

        def evaluate(
            t: Float[Array, ""],
        ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "c n"]]:
            """Returns the objective at step size t, its slope in t, and the gradient with respect to the logits."""
            loss, residual = _cross_entropy_of_logits(logits + t * logits_direction, is_label, share)
            trial = weights - t * direction
            slope = jnp.vdot(residual, logits_direction) - jnp.vdot(decay * trial, direction)
            return loss + 0.5 * jnp.vdot(decay * trial, trial), slope, residual

        t, value, residual = _wolfe_step(evaluate, -jnp.vdot(gradient, direction))
        weights = weights - t * direction
        progress = value < state["lowest"] * (1 - 1e-7)
        return {
            "weights": weights,
            "logits": logits + t * logits_direction,
            "value": value,
            "gradient": residual @ x + decay * weights,
            "memory": memory,
            "steps": state["steps"] + 1,
            "lowest": jnp.where(progress, value, state["lowest"]),
            "last_progress": jnp.where(progress, state["steps"] + 1, state["last_progress"]),
        }

    logits = start @ transposed
    loss, residual = _cross_entropy_of_logits(logits, is_label, share)
    value = loss + 0.5 * jnp.vdot(decay * start, start)
    gradient = residual @ x + decay * start
    state: dict[str, Any] = {"weights": start, "logits": logits, "value": value, "gradient": gradient}
    state |= {"memory": lbfgs.init(start), "steps": 0, "lowest": value, "last_progress": 0}
    minimum = jax.lax.while_loop(unfinished, step, state)["weights"]
    return {"w": minimum[:, :-1].T, "b": minimum[:, -1]}


PATIENCE = 20  # L-BFGS stops after this many steps without a lower objective: float32 will come no closer


def _cross_entropy_of_logits(
    logits: Float[Array, "c n"], is_label: Bool[Array, "c n"], share: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, "c n"]]:
    """Returns the mean cross-entropy, with sample i weighted by share[i], and its gradient.

    It is computed as softplus(logsumexp(other logits) - logit of the label). With p the probability of the label, 1 - p
    would lose all accuracy for p near 1.
    """
    others = jnp.where(is_label, -1e30, logits)
    largest = others.max(0)
    exponentials = jnp.exp(others - largest)
    total = exponentials.sum(0)
    margin = largest + jnp.log(total) - jnp.sum(jnp.where(is_label, logits, 0), axis=0)
    wrong = jax.nn.sigmoid(margin)
    residual = jnp.where(is_label, -wrong, exponentials * (wrong / total))
    return share @ jax.nn.softplus(margin), residual * share


def _wolfe_step(
    evaluate: Callable, slope_0: Float[Array, ""], flatter: float = 0.5, max_trials: int = 20
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "c n"]]:
    """Finds a step size t that satisfies Wolfe's condition on a convex function: |slope(t)| <= flatter |slope(0)|.

    It first tries t = 1 and then repeatedly the zero of the secant through the slopes, clipped to the inside of the
    bracket.

    Args:
      evaluate: evaluate(t) -> (value, slope, residual).
      slope_0: slope at t = 0, negative.
      flatter: maximum ratio of |slope(t)| to |slope(0)|.
      max_trials: maximum number of step sizes to try after t = 1.

    Returns:
      (t, value, residual).
    """

    def unfinished(trial):
        return (jnp.abs(trial["slope"]) > flatter * jnp.abs(slope_0)) & (trial["count"] < max_trials)

    def next_trial(trial):
        t, slope, low, high, (slope_low, slope_high) = (trial[k] for k in ("t", "slope", "low", "high", "slopes"))
        below = slope < 0
        low, slope_low = jnp.where(below, t, low), jnp.where(below, slope, slope_low)
        high, slope_high = jnp.where(below, high, t), jnp.where(below, slope_high, slope)
        inside = low + (high - low) * jnp.clip(slope_low / (slope_low - slope_high), 0.1, 0.9)
        beyond = t * jnp.clip(slope_0 / jnp.minimum(slope_0 - slope, -1e-30), 1.5, 5.0)
        t = jnp.where(jnp.isinf(high), beyond, inside)
        value, slope, residual = evaluate(t)
        return {"t": t, "value": value, "slope": slope, "residual": residual, "low": low, "high": high,
                "slopes": (slope_low, slope_high), "count": trial["count"] + 1}  # fmt: skip

    one = jnp.ones_like(slope_0)
    value, slope, residual = evaluate(one)
    trial = {"t": one, "value": value, "slope": slope, "residual": residual, "low": 0 * one, "high": jnp.inf * one,
             "slopes": (slope_0, 0 * one), "count": 0}  # fmt: skip
    trial = jax.lax.while_loop(unfinished, next_trial, trial)
    return trial["t"], trial["value"], trial["residual"]
