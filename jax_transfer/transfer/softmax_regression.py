"""Softmax regression on fixed features: by Adam on batches, or to the minimum of the regularised loss by L-BFGS."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.fields import Count, Few, Listed, NotNegative, Positive, Rule, Steps, check_itself
from jax_transfer.numerics import positive


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The fields of `config.probe`."""

    # Keys of jax_transfer.transfer.probe.PROTOCOLS: "probe" is the papers' FE, "probe_converged" L-BFGS.
    methods: Annotated[tuple[str, ...], Listed(filled=True, unique=True)] = ("probe",)
    epochs: Count = 100
    # In place of epochs, if set: the whole number of epochs nearest to so many steps. The papers give iterations for
    # some data sets.
    steps: Steps | None = None
    batch_size: Count = 128
    # Adam's. Several: the best on a validation split is used.
    learning_rates: Annotated[tuple[Positive, ...], Listed(filled=True)] = (0.01,)
    # Strength of probe_converged's penalty: l2/2 |w|^2 is added to the mean cross-entropy. Several: chosen likewise.
    l2: Annotated[tuple[NotNegative, ...], Listed(filled=True)] = (1e-4,)
    validation_fraction: Annotated[float, Rule(lambda x: 0 < x < 1, "lie in (0, 1)")] = 0.2
    num_seeds: Few = 1

    def __post_init__(self):
        check_itself(self)


def cross_entropy(weights, x: Float[Array, "n d"], y: Int[Array, " n"]):
    """Mean softmax cross-entropy of the linear classifier {"w": [d, c], "b": [c]}."""
    logits = x @ weights["w"] + weights["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def gaussian_start(key, d: int, num_classes: int):
    return {"w": 0.01 * jax.random.normal(key, (d, num_classes)), "b": jnp.zeros(num_classes)}


def epochs_and_steps(settings: ProbeSettings, n: int) -> tuple[int, int, int]:
    """(epochs, steps an epoch, batch size) for n examples; a set smaller than a batch is one batch."""
    batch = min(settings.batch_size, n)
    steps = n // batch
    return (max(1, round(settings.steps / steps)) if settings.steps else settings.epochs), steps, batch


def minibatch(x, y, indices, learning_rate, key, num_classes: int, settings: ProbeSettings, start=None):
    """Adam on batches drawn without replacement in each epoch, from the rows `indices` of x.

    `start`: the weights to start from, {"w": [d, c], "b": [c]}; small random ones if None.
    """
    epochs, steps, batch = epochs_and_steps(settings, len(indices))
    adam = optax.scale_by_adam()
    key_start, key_order = jax.random.split(key)
    weights = gaussian_start(key_start, x.shape[1], num_classes) if start is None else start

    def step(carry, rows):
        weights, moments = carry
        update, moments = adam.update(jax.grad(cross_entropy)(weights, x[rows], y[rows]), moments)
        return (jax.tree.map(lambda w, u: w - learning_rate * u, weights, update), moments), None

    def epoch(carry, i):
        order = jax.random.permutation(jax.random.fold_in(key_order, i), indices)
        return jax.lax.scan(step, carry, order[: steps * batch].reshape(steps, batch))

    return jax.lax.scan(epoch, (weights, adam.init(weights)), jnp.arange(epochs))[0][0]


def zero_start(d: int, occurs: Bool[Array, " c"]):
    """Weights of zero, and for a class that does not occur a bias that makes its probability and its gradient exactly 0."""
    return {"w": jnp.zeros((d, len(occurs))), "b": jnp.where(occurs, 0.0, -1e9)}


def standardised(
    x: Float[Array, "n d"], share: Float[Array, " n"] | None = None
) -> tuple[Float[Array, "n d"], Float[Array, "d"], Float[Array, ""]]:
    """((x - mean) / scale, mean, scale): one scale, the largest standard deviation of a feature (or 1), for all features.

    share: the weight of each row in the mean and the deviations, with sum 1; None for equal weights.
    """
    mean = x.mean(0) if share is None else share @ x
    largest = positive(jnp.abs(x - mean).max())  # first to at most 1: squares overflow
    rest = (x - mean) / largest
    deviations = rest.std(0) if share is None else jnp.sqrt(share @ (rest - share @ rest) ** 2)
    scale = positive(deviations.max()) * largest
    return (x - mean) / scale, mean, scale


def converged(
    x, y, indices, l2, key, num_classes: int, settings: ProbeSettings, tolerance=1e-6, max_steps=1000, mask=None
):
    """The minimiser of mean cross-entropy + l2/2 ||w||^2 (the bias is free), for one l2 or several.

    Features are centred and divided by one common scale first, which makes the problem better
    conditioned and `l2` mean the same for features of any size. The largest l2 is solved first, each
    other one from the solution before it; under vmap checkpoint after checkpoint, so that each stops
    when it has converged. There is no chance in it: `key` and `settings` are not used.

    Args:
      x: [n, d]; y: [n]; indices: the rows to fit. A class without rows is never predicted.
      l2: a positive number, or several [v].
      tolerance: how far above the minimum the objective may be, as a part of it; float32 may stop before.
      max_steps: for each l2.
      mask: bool, as long as `indices`: False for padding, which has no influence. None: no padding.

    Returns:
      {"w": [d, c], "b": [c]}, with a leading axis [v] for several l2.
    """
    l2 = jnp.asarray(l2, x.dtype)

    mask = jnp.ones(len(indices), bool) if mask is None else mask

    @jax.custom_batching.sequential_vmap
    def fit(x, y, indices, l2, mask):
        share = mask / jnp.sum(mask, dtype=x.dtype)
        x, mean, scale = standardised(x[indices], share)
        occurs = jnp.zeros(num_classes, bool).at[y[indices]].max(mask)
        descending = jnp.argsort(-l2)

        def next_l2(weights, l2):
            weights = _minimum(x, y[indices], share, l2, weights, tolerance, max_steps)
            return weights, weights

        _, weights = jax.lax.scan(next_l2, zero_start(x.shape[1], occurs), l2[descending])
        weights = jax.tree.map(lambda leaf: leaf[jnp.argsort(descending)], weights)
        w = weights["w"] / scale
        return {"w": w, "b": weights["b"] - mean @ w}

    weights = fit(x, y, indices, l2.ravel(), mask)
    return jax.tree.map(lambda leaf: leaf.reshape(*l2.shape, *leaf.shape[1:]), weights)


def _minimum(x, y, share, l2, weights, tolerance, max_steps):
    """L-BFGS (optax's directions) with a line search on the logits. Row i counts by share[i]; the shares sum to 1.

    Along a direction the logits are affine in the step, so a step costs two products with x, one for the
    logits' direction and one for the gradient, however many steps the search tries. The classes come
    first, in weights [c, d + 1] (the bias is last) as in logits [c, n]: these are the fast products.
    """
    x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)
    transposed = x.T
    decay = l2 * jnp.ones(x.shape[1], x.dtype).at[-1].set(0)
    weights = jnp.concatenate([weights["w"].T, weights["b"][:, None]], axis=1)
    is_label = jnp.arange(len(weights))[:, None] == y
    lbfgs = optax.scale_by_lbfgs()

    def unfinished(state):
        # A function of curvature at least h lies at most |gradient|^2 / 2h above its minimum: l2 in w, about 1/c in b.
        far = jnp.sum(state["gradient"] ** 2) > 2 * jnp.minimum(l2, 1 / len(is_label)) * tolerance * state["value"]
        return far & (state["steps"] < max_steps) & (state["steps"] - state["last_progress"] < PATIENCE)

    def step(state):
        weights, logits, gradient = state["weights"], state["logits"], state["gradient"]
        direction, memory = lbfgs.update(gradient, state["memory"], weights)
        logits_direction = -direction @ transposed

        def at(t):
            loss, residual = _cross_entropy_of_logits(logits + t * logits_direction, is_label, share)
            moved = weights - t * direction
            slope = jnp.vdot(residual, logits_direction) - jnp.vdot(decay * moved, direction)
            return loss + 0.5 * jnp.vdot(decay * moved, moved), slope, residual

        t, value, residual = _wolfe_step(at, -jnp.vdot(gradient, direction))
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

    logits = weights @ transposed
    loss, residual = _cross_entropy_of_logits(logits, is_label, share)
    value = loss + 0.5 * jnp.vdot(decay * weights, weights)
    state = {"weights": weights, "logits": logits, "value": value, "gradient": residual @ x + decay * weights}
    state |= {"memory": lbfgs.init(weights), "steps": 0, "lowest": value, "last_progress": 0}
    weights = jax.lax.while_loop(unfinished, step, state)["weights"]
    return {"w": weights[:, :-1].T, "b": weights[:, -1]}


PATIENCE = 20  # steps of L-BFGS without a smaller objective: float32 comes no nearer to the minimum


def _cross_entropy_of_logits(logits: Float[Array, "c n"], is_label: Bool[Array, "c n"], share: Float[Array, " n"]):
    """Mean cross-entropy, sample i weighted by share[i], and its gradient [c, n].

    As softplus(logsumexp of the other logits - the label's): 1 - p of the label would have no digits where p is near 1.
    """
    others = jnp.where(is_label, -1e30, logits)
    largest = others.max(0)
    exponentials = jnp.exp(others - largest)
    total = exponentials.sum(0)
    margin = largest + jnp.log(total) - jnp.sum(jnp.where(is_label, logits, 0), axis=0)
    wrong = jax.nn.sigmoid(margin)
    residual = jnp.where(is_label, -wrong, exponentials * (wrong / total))
    return share @ jax.nn.softplus(margin), residual * share


def _wolfe_step(at, slope_0, flatter=0.5, max_trials=20):
    """(t, value, residual) where the slope of a convex function is at most half of that at 0, as Wolfe's condition asks.

    at(t) -> (value, slope, residual). Tries t = 1 first, then the zero of the secant of the slope, kept in the bracket.
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
        value, slope, residual = at(t)
        return {"t": t, "value": value, "slope": slope, "residual": residual, "low": low, "high": high,
                "slopes": (slope_low, slope_high), "count": trial["count"] + 1}  # fmt: skip

    one = jnp.ones_like(slope_0)
    value, slope, residual = at(one)
    trial = {"t": one, "value": value, "slope": slope, "residual": residual, "low": 0 * one, "high": jnp.inf * one,
             "slopes": (slope_0, 0 * one), "count": 0}  # fmt: skip
    trial = jax.lax.while_loop(unfinished, next_trial, trial)
    return trial["t"], trial["value"], trial["residual"]
