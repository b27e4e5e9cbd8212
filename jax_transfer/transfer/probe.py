"""Linear probes (FE): softmax regression on frozen features, for all checkpoints and seeds at once.

Two protocols: `minibatch` is the papers' (Adam, given epochs and batch), `converged` is the minimum of the
regularised loss, found by L-BFGS. Either is one compiled program for every combination of checkpoint, seed and
candidate value (learning rate or regularisation): `minibatch` steps all of them at once, `converged`, which has
one result for all seeds, goes from checkpoint to checkpoint and from candidate to candidate.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jax_transfer import devices, flops
from jax_transfer.transfer.softmax_regression import (
    ProbeSettings,
    converged,
    cross_entropy,
    epochs_and_steps,
    gaussian_start,
    minibatch,
)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Test accuracies [k, seeds] and per-class means [k, seeds]; `chosen` [k, seeds] is the candidate used.

    `gflops` is the work of fitting one checkpoint (the first) with one seed, the choice among candidates included.
    `weights`: the tested classifiers {"w": [k, seeds, d, c], "b": [k, seeds, c]}, None unless asked for.
    """

    accuracy: np.ndarray
    mean_class_accuracy: np.ndarray
    chosen: np.ndarray
    gflops: float
    weights: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How weights are fitted, and which setting holds the candidates among which validation chooses.

    `exact`: the fit is a minimum, the same for all seeds, and takes all candidates in one call.
    """

    fit: Callable
    candidates: str
    exact: bool = False


PROTOCOLS = {
    "probe": Protocol(minibatch, "learning_rates"),
    "probe_converged": Protocol(converged, "l2", exact=True),
}


def probe(
    protocol: Protocol, train, test, num_classes: int, settings: ProbeSettings, seed: int, keep_weights: bool = False
) -> ProbeResult:
    """Fits and tests a linear classifier for each checkpoint and seed.

    Several candidates are compared on a validation split of the training rows, each checkpoint and seed
    for itself; the best one (the first of equals) is then fitted on all training rows. The test rows
    take no part in the choice.

    Args:
      train: (x [k, n, d], y [n]); test: (x [k, m, d], y [m]).
      keep_weights: return the classifiers too, for fine-tuning to start from.
    """
    candidates = np.asarray(getattr(settings, protocol.candidates), np.float32)
    (x, y), (x_test, y_test) = train, test
    keys = jax.random.split(jax.random.key(seed), 1 if protocol.exact else settings.num_seeds)
    rows, held_out = _validation_split(len(y), settings.validation_fraction, seed)
    every = np.arange(len(y))
    fit = functools.partial(_fit_and_count, protocol, num_classes, settings, x, y, keys)
    lanes = len(x), len(keys)
    if len(candidates) > 1:
        counts, _ = fit(rows, np.broadcast_to(candidates, (*lanes, len(candidates))), x[:, held_out], y[held_out])
        chosen = candidates[np.asarray(counts["correct"].sum(-1)).argmax(-1)]
    else:
        chosen = np.full(lanes, candidates[0])
    counts, weights = fit(every, chosen[..., None], x_test, y_test)
    correct, count = (np.asarray(counts[name], np.float64)[:, :, 0] for name in ("correct", "count"))

    def all_seeds(values):
        return np.broadcast_to(values, (len(x), settings.num_seeds, *values.shape[2:]))

    return ProbeResult(
        accuracy=all_seeds(correct.sum(-1) / count.sum(-1)),
        mean_class_accuracy=all_seeds(mean_class_accuracy(correct, count)),
        chosen=all_seeds(chosen),
        gflops=_gigaflops(protocol, num_classes, settings, x[0], y, rows, candidates, chosen[0, :1]),
        weights={name: all_seeds(np.asarray(leaf)[:, :, 0]) for name, leaf in weights.items()}
        if keep_weights
        else None,
    )


def mean_class_accuracy(correct: Float[np.ndarray, "k s c"], count: Float[np.ndarray, "k s c"]):
    """Mean of the accuracies of the classes that occur: [k, s] from per-class counts, the same bits for any k."""
    seen = count[0, 0] > 0
    # Contiguous, or the order of the sum, and with it the last bit, would depend on how many checkpoints there are.
    return np.ascontiguousarray(correct[..., seen] / count[..., seen]).mean(-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_and_count_jit(protocol, num_classes, settings, x, y, keys, indices, values, x_test, y_test):
    fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings)
    classes = jnp.eye(num_classes, dtype=jnp.int32)[y_test]

    def lane(x, key, values, x_test):
        fit_each = fit if protocol.exact else jax.vmap(fit, (None, None, None, 0, None))
        weights = fit_each(x, y, indices, values, key)
        predicted = (x_test @ weights["w"] + weights["b"][:, None]).argmax(-1)
        correct = (predicted == y_test).astype(jnp.int32) @ classes
        return {"correct": correct, "count": jnp.broadcast_to(classes.sum(0), correct.shape)}, weights

    per_seed = jax.vmap(lane, (None, 0, 0, None))
    return jax.vmap(per_seed, (0, None, 0, 0))(x, keys, values, x_test)


def _fit_and_count(*args):
    """Per-class correct and total counts [k, seeds, values, c] of the fitted classifiers on the test rows, and these
    classifiers [k, seeds, values, ...], which stay on the device."""
    with jax.default_matmul_precision("float32"):
        counts, weights = _fit_and_count_jit(*args)
    return jax.device_get(counts), weights


def _validation_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, rows to validate on): a random split of n rows."""
    order = np.random.default_rng(seed).permutation(n)
    size = min(n - 1, max(1, round(fraction * n)))
    return np.sort(order[size:]), np.sort(order[:size])


def _gigaflops(protocol: Protocol, num_classes, settings, x, y, rows, candidates, chosen) -> float:
    """The work of choosing among the candidates on `rows` and of fitting all rows, for one checkpoint and seed."""
    every, key = np.arange(len(y)), jax.random.key(0)
    total = _fit_gigaflops(protocol, num_classes, settings, x, y, every, key, chosen)
    if len(candidates) > 1:
        total += _fit_gigaflops(protocol, num_classes, settings, x, y, rows, key, candidates)
    return total


def _fit_gigaflops(protocol, num_classes, settings, x, y, indices, key, values) -> float:
    fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings)
    if protocol.exact:  # how many steps it takes, the data decide
        with jax.default_matmul_precision("float32"):
            return flops.gigaflops(fit, x, y, indices, values, key)
    epochs, steps, batch = epochs_and_steps(settings, len(indices))
    weights = gaussian_start(key, x.shape[1], num_classes)
    one = devices.gigaflops(jax.grad(cross_entropy), weights, x[:batch], y[:batch])
    return one * epochs * steps * len(values)
