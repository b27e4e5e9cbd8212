"""Linear probes (FE): softmax regression on frozen features, for all checkpoints and seeds at once.

Two protocols: `minibatch` is the papers' (Adam, given epochs and batch), `converged` is the minimum of the
regularised loss, found by L-BFGS. Either way every combination of checkpoint, seed and candidate value
(learning rate or regularisation) is a lane of one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jax_transfer import devices


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The fields of `config.probe`."""

    methods: tuple[str, ...] = ("probe",)
    epochs: int = 100
    steps: int | None = None  # in place of epochs: the whole number of epochs nearest to so many steps
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (0.01,)
    l2: tuple[float, ...] = (1e-4,)
    validation_fraction: float = 0.2
    num_seeds: int = 1


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Test accuracies [k, seeds] and per-class means [k, seeds]; `chosen` [k, seeds] is the candidate used.

    `gflops` is the work of fitting one checkpoint with one seed, the choice among candidates included.
    """

    accuracy: np.ndarray
    mean_class_accuracy: np.ndarray
    chosen: np.ndarray
    gflops: float


def cross_entropy(weights, x: Float[Array, "n d"], y: Int[Array, " n"]):
    """Mean softmax cross-entropy of the linear classifier {"w": [d, c], "b": [c]}."""
    logits = x @ weights["w"] + weights["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _gaussian_start(key, d: int, num_classes: int):
    return {"w": 0.01 * jax.random.normal(key, (d, num_classes)), "b": jnp.zeros(num_classes)}


def _epochs(settings: ProbeSettings, n: int) -> tuple[int, int, int]:
    """(epochs, steps an epoch, batch size) for n examples; a set smaller than a batch is one batch."""
    batch = min(settings.batch_size, n)
    steps = n // batch
    return (max(1, round(settings.steps / steps)) if settings.steps else settings.epochs), steps, batch


def minibatch(x, y, indices, learning_rate, key, num_classes: int, settings: ProbeSettings):
    """Adam on batches drawn without replacement in each epoch, from the rows `indices` of x."""
    epochs, steps, batch = _epochs(settings, len(indices))
    adam = optax.scale_by_adam()
    key_start, key_order = jax.random.split(key)
    weights = _gaussian_start(key_start, x.shape[1], num_classes)

    def step(carry, rows):
        weights, moments = carry
        update, moments = adam.update(jax.grad(cross_entropy)(weights, x[rows], y[rows]), moments)
        return (jax.tree.map(lambda w, u: w - learning_rate * u, weights, update), moments), None

    def epoch(carry, i):
        order = jax.random.permutation(jax.random.fold_in(key_order, i), indices)
        return jax.lax.scan(step, carry, order[: steps * batch].reshape(steps, batch))

    return jax.lax.scan(epoch, (weights, adam.init(weights)), jnp.arange(epochs))[0][0]


def converged(x, y, indices, l2, key, num_classes: int, settings: ProbeSettings, tolerance=1e-5, max_steps=500):
    """The minimiser of mean cross-entropy + l2/2 ||w||^2 (the bias is free), by L-BFGS.

    Features are centred and divided by one common scale first, which makes the problem better
    conditioned and `l2` mean the same for features of any size.
    """
    x, y = x[indices], y[indices]
    mean, scale = x.mean(0), x.std(0).max() + 1e-12
    x = (x - mean) / scale
    solver = optax.lbfgs()

    def loss(weights):
        return cross_entropy(weights, x, y) + 0.5 * l2 * jnp.sum(weights["w"] ** 2)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        weights, state = carry
        value, gradient = value_and_grad(weights, state=state)
        update, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, update), state

    def unfinished(carry):
        _, state = carry
        count = optax.tree.get(state, "count")
        norm = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (count == 0) | ((count < max_steps) & (norm > tolerance))

    weights = _gaussian_start(key, x.shape[1], num_classes)
    weights, _ = jax.lax.while_loop(unfinished, step, (weights, solver.init(weights)))
    w = weights["w"] / scale
    return {"w": w, "b": weights["b"] - mean @ w}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How weights are fitted, and which setting holds the candidates among which validation chooses."""

    fit: Callable
    candidates: str


PROTOCOLS = {"probe": Protocol(minibatch, "learning_rates"), "probe_converged": Protocol(converged, "l2")}


def probe(protocol: Protocol, train, test, num_classes: int, settings: ProbeSettings, seed: int) -> ProbeResult:
    """Fits and tests a linear classifier for each checkpoint and seed.

    Several candidates are compared on a validation split of the training rows, each checkpoint and seed
    for itself; the best one (the first of equals) is then fitted on all training rows. The test rows
    take no part in the choice.

    Args:
      train: (x [k, n, d], y [n]); test: (x [k, m, d], y [m]).
    """
    candidates = np.asarray(getattr(settings, protocol.candidates), np.float32)
    (x, y), (x_test, y_test) = train, test
    keys = jax.random.split(jax.random.key(seed), settings.num_seeds)
    rows, held_out = _validation_split(len(y), settings.validation_fraction, seed)
    every = np.arange(len(y))
    fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings)
    lanes = len(x), settings.num_seeds
    if len(candidates) > 1:
        counts = _fit_and_count(
            fit,
            x,
            y,
            rows,
            np.broadcast_to(candidates, (*lanes, len(candidates))),
            keys,
            x[:, held_out],
            y[held_out],
            num_classes,
        )
        chosen = candidates[np.asarray(counts["correct"].sum(-1)).argmax(-1)]
    else:
        chosen = np.full(lanes, candidates[0])
    counts = _fit_and_count(fit, x, y, every, chosen[..., None], keys, x_test, y_test, num_classes)
    correct, count = (np.asarray(counts[name], np.float64)[:, :, 0] for name in ("correct", "count"))
    seen = count[0, 0] > 0
    return ProbeResult(
        accuracy=correct.sum(-1) / count.sum(-1),
        mean_class_accuracy=(correct[..., seen] / count[..., seen]).mean(-1),
        chosen=chosen,
        gflops=_gigaflops(protocol, x.shape[2], num_classes, settings, len(rows), len(every), len(candidates)),
    )


@functools.partial(jax.jit, static_argnums=(0, 8))
def _fit_and_count_jit(fit, x, y, indices, values, keys, x_test, y_test, num_classes):
    def lane(x, value, key, x_test):
        weights = fit(x, y, indices, value, key)
        predicted = (x_test @ weights["w"] + weights["b"]).argmax(-1)
        classes = jnp.eye(num_classes, dtype=jnp.int32)[y_test]
        return {"correct": (classes * (predicted == y_test)[:, None]).sum(0), "count": classes.sum(0)}

    per_value = jax.vmap(lane, (None, 0, None, None))
    per_seed = jax.vmap(per_value, (None, 0, 0, None))
    return jax.vmap(per_seed, (0, 0, None, 0))(x, values, keys, x_test)


def _fit_and_count(fit, *args):
    """Per-class correct and total counts [k, seeds, values, c] of the fitted classifiers on the test rows."""
    with jax.default_matmul_precision("float32"):
        return jax.device_get(_fit_and_count_jit(_Static(fit), *args))


class _Static:
    """Makes equal partial applications equal, so that the compiled program is found again."""

    def __init__(self, partial: functools.partial):
        self.partial = partial
        self.identity = (partial.func, tuple(sorted(partial.keywords.items(), key=lambda item: item[0])))

    def __call__(self, *args):
        return self.partial(*args)

    def __hash__(self):
        return hash(self.identity)

    def __eq__(self, other):
        return isinstance(other, _Static) and self.identity == other.identity


def _validation_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, rows to validate on): a random split of n rows."""
    order = np.random.default_rng(seed).permutation(n)
    size = min(n - 1, max(1, round(fraction * n)))
    return np.sort(order[size:]), np.sort(order[:size])


def _gigaflops(protocol, d, num_classes, settings, n_fit, n_all, num_candidates) -> float:
    """The work of the gradient steps; NaN where their number is not known beforehand."""
    if protocol.fit is not minibatch:
        return float("nan")
    epochs, steps, batch = _epochs(settings, n_all)
    start = _gaussian_start(jax.random.key(0), d, num_classes)
    one = devices.gigaflops(jax.grad(cross_entropy), start, jnp.zeros((batch, d)), jnp.zeros(batch, jnp.int32))
    total = epochs * steps
    if num_candidates > 1:
        epochs, steps, _ = _epochs(settings, n_fit)
        total += num_candidates * epochs * steps
    return one * total
