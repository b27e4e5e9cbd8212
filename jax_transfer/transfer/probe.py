"""Linear probes (FE): softmax regression on frozen features, for all checkpoints and seeds at once.

There are two protocols: `minibatch` follows the papers (Adam with a given number of epochs and batch size), and
`converged` minimises the regularised loss with L-BFGS. Each compiles one program for all combinations of checkpoint,
seed and candidate value (learning rate or regularisation). `minibatch` trains all combinations in parallel. `converged`
has the same result for all seeds and processes the checkpoints and candidate values one by one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_transfer import devices, flops
from jax_transfer.transfer.softmax_regression import (
    ProbeSettings,
    Weights,
    converged,
    cross_entropy,
    epochs_and_steps,
    gaussian_start,
    minibatch,
)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Result of probing k checkpoints with several seeds.

    Attributes:
      accuracy: test accuracies [k, seeds], in [0, 1].
      mean_class_accuracy: test accuracies averaged over the classes that occur [k, seeds], in [0, 1].
      chosen: the candidate values used [k, seeds].
      gflops: floating point operations / 1e9 of fitting the first checkpoint with one seed, including the choice among
        candidate values.
      weights: the tested classifiers {"w": [k, seeds, d, c], "b": [k, seeds, c]}, or None if `keep_weights` was False.
    """

    accuracy: np.ndarray
    mean_class_accuracy: np.ndarray
    chosen: np.ndarray
    gflops: float
    weights: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to fit a linear classifier.

    Attributes:
      fit: `minibatch`, `converged` or a function with the same signature.
      candidates: name of the setting that lists the candidate values; one of them is chosen on a validation split.
      exact: whether `fit` finds the minimum of the loss. The result is then the same for all seeds, and one call fits
        all candidate values.
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

    If there are several candidate values, they are compared on a validation split of the training rows, separately for
    each checkpoint and seed. A classifier with the best value (the first one in case of a tie) is then fitted to all
    training rows. The test rows are not used for this choice.

    Args:
      protocol: a value of PROTOCOLS.
      train: features [k, n, d] of the k checkpoints and labels [n].
      test: features [k, m, d] and labels [m].
      num_classes: C, the number of classes.
      settings: epochs, batch size, candidate values and number of seeds.
      seed: seed of the validation split, the initial weights and the batches.
      keep_weights: whether to return the classifiers as well, for example as a start for fine-tuning.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[[1.0], [0.9], [-1.0], [-0.9]]]), jnp.array([0, 0, 1, 1])
      >>> result = probe(PROTOCOLS["probe_converged"], (x, y), (x, y), 2, ProbeSettings(num_seeds=2), seed=0)
      >>> result.accuracy.tolist()
      [[1.0, 1.0]]
    """
    candidates = np.asarray(getattr(settings, protocol.candidates), np.float32)
    (x, y), (x_test, y_test) = train, test
    keys = jax.random.split(jax.random.key(seed), 1 if protocol.exact else settings.num_seeds)
    rows, held_out = _validation_split(len(y), settings.validation_fraction, seed)
    all_rows = np.arange(len(y))
    fit = functools.partial(_fit_and_count, protocol, num_classes, settings, x, y, keys)
    shape = len(x), len(keys)
    if len(candidates) > 1:
        counts, _ = fit(rows, np.broadcast_to(candidates, (*shape, len(candidates))), x[:, held_out], y[held_out])
        chosen = candidates[np.asarray(counts["correct"].sum(-1)).argmax(-1)]
    else:
        chosen = np.full(shape, candidates[0])
    counts, weights = fit(all_rows, chosen[..., None], x_test, y_test)
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


def mean_class_accuracy(
    correct: Float[np.ndarray, "k s c"], count: Float[np.ndarray, "k s c"]
) -> Float[np.ndarray, "k s"]:
    """Computes the mean accuracy over the classes that occur; the result is bitwise the same for any k.

    Args:
      correct: number of correctly classified images of each class.
      count: number of images of each class.

    Example:
      >>> import numpy as np
      >>> mean_class_accuracy(np.array([[[8.0, 1.0, 0.0]]]), np.array([[[8.0, 2.0, 0.0]]])).tolist()
      [[0.75]]
    """
    occurs = count[0, 0] > 0
    # Contiguous, since otherwise the order of summation, and so the last bit of the result, would depend on k.
    return np.ascontiguousarray(correct[..., occurs] / count[..., occurs]).mean(-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_and_count_jit(
    protocol: Protocol,
    num_classes: int,
    settings: ProbeSettings,
    x: Float[Array, "k n d"],
    y: Int[Array, " n"],
    keys: Key[Array, " s"],
    indices: Int[Array, " i"],
    values: Float[Array, "k s v"],
    x_test: Float[Array, "k m d"],
    y_test: Int[Array, " m"],
) -> tuple[dict[str, Int[Array, "k s v c"]], Weights]:
    fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings)
    classes = jnp.eye(num_classes, dtype=jnp.int32)[y_test]

    def fit_and_count(x, key, values, x_test):
        """Fits all candidate values of one checkpoint and seed."""
        fit_each = fit if protocol.exact else jax.vmap(fit, (None, None, None, 0, None))
        weights = fit_each(x, y, indices, values, key)
        predicted = (x_test @ weights["w"] + weights["b"][:, None]).argmax(-1)
        correct = (predicted == y_test).astype(jnp.int32) @ classes
        return {"correct": correct, "count": jnp.broadcast_to(classes.sum(0), correct.shape)}, weights

    per_seed = jax.vmap(fit_and_count, (None, 0, 0, None))
    return jax.vmap(per_seed, (0, None, 0, 0))(x, keys, values, x_test)


def _fit_and_count(*args):
    """Fits classifiers and counts, for each class, the correctly classified test rows and all test rows.

    Returns:
      ({"correct", "count"} [k, seeds, values, c], classifiers [k, seeds, values, ...]); the classifiers stay on the
      device.
    """
    with jax.default_matmul_precision("float32"):
        counts, weights = _fit_and_count_jit(*args)
    return jax.device_get(counts), weights


def _validation_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits n rows at random; returns (rows to fit on, rows to validate on)."""
    order = np.random.default_rng(seed).permutation(n)
    size = min(n - 1, max(1, round(fraction * n)))
    return np.sort(order[size:]), np.sort(order[:size])


def _gigaflops(
    protocol: Protocol,
    num_classes: int,
    settings: ProbeSettings,
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    rows: Int[np.ndarray, " i"],
    candidates: Float[np.ndarray, " v"],
    chosen: Float[np.ndarray, " 1"],
) -> float:
    """Counts the operations for one checkpoint and seed: choosing a candidate value on `rows` and fitting all rows."""
    all_rows, key = np.arange(len(y)), jax.random.key(0)
    total = _fit_gigaflops(protocol, num_classes, settings, x, y, all_rows, key, chosen)
    if len(candidates) > 1:
        total += _fit_gigaflops(protocol, num_classes, settings, x, y, rows, key, candidates)
    return total


def _fit_gigaflops(
    protocol: Protocol,
    num_classes: int,
    settings: ProbeSettings,
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    indices: Int[np.ndarray, " i"],
    key: Key[Array, ""],
    values: Float[np.ndarray, " v"],
) -> float:
    """Counts the operations of fitting classifiers with each of the candidate `values` to the rows `indices`."""
    fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings)
    if protocol.exact:  # the number of steps depends on the data
        with jax.default_matmul_precision("float32"):
            return flops.gigaflops(fit, x, y, indices, values, key)
    epochs, steps, batch = epochs_and_steps(settings, len(indices))
    weights = gaussian_start(key, x.shape[1], num_classes)
    one = devices.gigaflops(jax.grad(cross_entropy), weights, x[:batch], y[:batch])
    return one * epochs * steps * len(values)
