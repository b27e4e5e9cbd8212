"""Linear probes (FE): softmax regression on frozen features, for all checkpoints and seeds at once.

There are two protocols: `minibatch` follows the papers (Adam with a given number of epochs and batch size), and
`converged` minimises the regularised loss with L-BFGS. Each compiles one program for all combinations of checkpoint,
seed and point of the grid of settings (learning rates and weight decays, or regularisations). `minibatch` trains all
combinations in parallel. `converged` has the same result for all seeds and processes the checkpoints and grid points
one by one.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from jax_transfer import devices, flops
from jax_transfer.data.subsets import stratified_split
from jax_transfer.records import InputError
from jax_transfer.transfer.softmax_regression import (
    ProbeSettings,
    Weights,
    converged,
    cross_entropy,
    epochs_and_steps,
    gaussian_start,
    minibatch,
)

Point = dict[str, float]  # a point of a grid: argument of `Protocol.fit` -> its value
Values = dict[str, Float[np.ndarray, "*shape"]]  # argument of `Protocol.fit` -> its values at several points


@dataclasses.dataclass(frozen=True)
class GridResult:
    """Accuracies of all points of a grid of settings, on the images by which the best one was chosen.

    Attributes:
      accuracy, mean_class_accuracy: accuracies [k, seeds, points], in [0, 1].
      num_train, num_test: number of images to which the classifiers were fitted, and on which they were tested.
      gflops: floating point operations / 1e9 of fitting the first checkpoint with one seed, averaged over the points.
    """

    accuracy: np.ndarray
    mean_class_accuracy: np.ndarray
    num_train: int
    num_test: int
    gflops: float


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Result of probing k checkpoints with several seeds.

    Attributes:
      accuracy: test accuracies [k, seeds], in [0, 1].
      mean_class_accuracy: test accuracies averaged over the classes that occur [k, seeds], in [0, 1].
      points: the points of the grid, such as ({"learning_rate": 0.01, "weight_decay": 0.0},).
      chosen: positions in `points` of the settings used [k, seeds].
      gflops: floating point operations / 1e9 of fitting the first checkpoint with one seed and the chosen settings.
      grid: accuracies of all points; None if there is only one.
      weights: the tested classifiers {"w": [k, seeds, d, c], "b": [k, seeds, c]}, or None if `keep_weights` was False.
    """

    accuracy: np.ndarray
    mean_class_accuracy: np.ndarray
    points: tuple[Point, ...]
    chosen: np.ndarray
    gflops: float
    grid: GridResult | None = None
    weights: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to fit a linear classifier.

    Attributes:
      fit: `minibatch`, `converged` or a function with the same signature.
      grid: (argument of `fit`, setting that lists its values) pairs; the grid is the product of these lists.
      exact: whether `fit` finds the minimum of the loss. The result is then the same for all seeds, and one call fits
        all points of the grid.
    """

    fit: Callable
    grid: tuple[tuple[str, str], ...]
    exact: bool = False


PROTOCOLS = {
    "probe": Protocol(minibatch, (("learning_rate", "learning_rates"), ("weight_decay", "weight_decays"))),
    "probe_converged": Protocol(converged, (("l2", "l2"),), exact=True),
}


def grid_points(protocol: Protocol, settings: ProbeSettings) -> tuple[Point, ...]:
    """Returns all points of a protocol's grid; the first argument varies slowest.

    Example:
      >>> [point["l2"] for point in grid_points(PROTOCOLS["probe_converged"], ProbeSettings(l2=(0.1, 0.01)))]
      [0.1, 0.01]
    """
    names = [name for name, _ in protocol.grid]
    lists = [getattr(settings, field) for _, field in protocol.grid]
    return tuple(dict(zip(names, values, strict=True)) for values in itertools.product(*lists))


def validation_rows(
    y: Int[Array | np.ndarray, " n"], settings: ProbeSettings
) -> tuple[Int[np.ndarray, " f"], Int[np.ndarray, " h"]]:
    """Splits the training rows by class into rows to fit and rows that are held out to choose among grid points.

    With the default `validation_fraction`, these are the images on which fine-tuning chooses too.

    Raises:
      InputError: if no class has two rows, so that none can be held out.

    Example:
      >>> import numpy as np
      >>> [len(rows) for rows in validation_rows(np.repeat([0, 1], [10, 5]), ProbeSettings())]
      [12, 3]
    """
    fitted, held_out = stratified_split(np.asarray(y), settings.validation_fraction)
    if not len(held_out):
        raise InputError(
            "No class has two training images, so none can be held out to choose among several settings of a probe: "
            "give each setting a single value, or add images."
        )
    return fitted, held_out


def probe(
    protocol: Protocol, train, test, num_classes: int, settings: ProbeSettings, seed: int, keep_weights: bool = False
) -> ProbeResult:
    """Fits and tests a linear classifier for each checkpoint and seed.

    If the grid of settings has several points, the one with the highest accuracy is chosen separately for each
    checkpoint and seed (the first one in case of a tie), see `ProbeSettings.choose`: either on held-out training rows,
    after which a classifier with the chosen settings is fitted to all training rows and tested; or on the test rows.

    Args:
      protocol: a value of PROTOCOLS.
      train: features [k, n, d] of the k checkpoints and labels [n].
      test: features [k, m, d] and labels [m].
      num_classes: C, the number of classes.
      settings: epochs, batch size, schedule, grid and number of seeds.
      seed: seed of the initial weights and the batches.
      keep_weights: whether to return the classifiers as well, for example as a start for fine-tuning.

    Raises:
      InputError: if there is no training row to hold out.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[[1.0], [0.9], [-1.0], [-0.9]]]), jnp.array([0, 0, 1, 1])
      >>> result = probe(PROTOCOLS["probe_converged"], (x, y), (x, y), 2, ProbeSettings(num_seeds=2), seed=0)
      >>> result.accuracy.tolist()
      [[1.0, 1.0]]
    """
    points = grid_points(protocol, settings)
    (x, y), (x_test, y_test) = train, test
    keys = jax.random.split(jax.random.key(seed), 1 if protocol.exact else settings.num_seeds)
    fit = functools.partial(_fit_and_test, protocol, num_classes, settings, x, y, keys)
    count = functools.partial(_fit_gigaflops, protocol, num_classes, settings, x[0], y)
    all_rows, shape = np.arange(len(y)), (len(x), len(keys))
    everywhere = np.broadcast_to(np.arange(len(points)), (*shape, len(points)))
    if len(points) > 1 and settings.choose == "validation":
        rows, held_out = validation_rows(y, settings)
        swept = fit(rows, _values(points, everywhere), x[:, held_out], np.asarray(y)[held_out])
        chosen = swept.correct.sum(-1).argmax(-1)
        tested = fit(all_rows, _values(points, chosen[..., None]), x_test, y_test)
        place = np.zeros_like(chosen)  # of the result among the classifiers in `tested`
        gflops = count(all_rows, _values(points, chosen[0, :1]))
        gflops_of_grid = count(rows, _values(points, everywhere[0, 0])) / len(points)
    else:
        rows = all_rows
        swept = tested = fit(all_rows, _values(points, everywhere), x_test, y_test)
        place = chosen = tested.correct.sum(-1).argmax(-1)
        gflops = gflops_of_grid = count(all_rows, _values(points, everywhere[0, 0])) / len(points)

    def all_seeds(values):
        return np.broadcast_to(values, (len(x), settings.num_seeds, *values.shape[2:]))

    def result(values: Shaped[np.ndarray, "k s v *_"]) -> Shaped[np.ndarray, "k seeds *_"]:
        """Selects the tested classifier with the chosen settings, for all seeds."""
        return all_seeds(values[np.arange(shape[0])[:, None], np.arange(shape[1]), place])

    return ProbeResult(
        accuracy=result(accuracy(tested.correct, tested.count)),
        mean_class_accuracy=result(mean_class_accuracy(tested.correct, tested.count)),
        points=points,
        chosen=all_seeds(chosen),
        gflops=gflops,
        grid=GridResult(
            accuracy=all_seeds(accuracy(swept.correct, swept.count)),
            mean_class_accuracy=all_seeds(mean_class_accuracy(swept.correct, swept.count)),
            num_train=len(rows),
            num_test=int(swept.count.sum()),
            gflops=gflops_of_grid,
        )
        if len(points) > 1
        else None,
        weights={name: result(np.asarray(leaf)) for name, leaf in tested.weights.items()} if keep_weights else None,
    )


def _values(points: tuple[Point, ...], positions: Int[np.ndarray, "*shape"]) -> Values:
    """Returns the values of the arguments at some points of the grid.

    A weight decay that is 0 at all points is left out: adding it would cost time and change the rounding.
    """
    names = [name for name in points[0] if name != "weight_decay" or any(point[name] for point in points)]
    return {name: np.asarray([point[name] for point in points], np.float32)[positions] for name in names}


def accuracy(correct: Float[np.ndarray, "*_ c"], count: Float[np.ndarray, " c"]) -> Float[np.ndarray, "*_"]:
    """Computes the fraction of correctly classified images; the arguments are those of `mean_class_accuracy`.

    Example:
      >>> import numpy as np
      >>> accuracy(np.array([[8.0, 1.0, 0.0]]), np.array([8.0, 2.0, 0.0])).tolist()
      [0.9]
    """
    return correct.sum(-1) / count.sum()


def mean_class_accuracy(correct: Float[np.ndarray, "*_ c"], count: Float[np.ndarray, " c"]) -> Float[np.ndarray, "*_"]:
    """Computes the mean accuracy over the classes that occur; each result is bitwise the same in any stack.

    Args:
      correct: number of correctly classified images of each class.
      count: number of images of each class.

    Example:
      >>> import numpy as np
      >>> mean_class_accuracy(np.array([[8.0, 1.0, 0.0]]), np.array([8.0, 2.0, 0.0])).tolist()
      [0.75]
    """
    occurs = count > 0
    # Contiguous, since otherwise the order of summation, and so the last bit of the result, would depend on the stack.
    return np.ascontiguousarray(correct[..., occurs] / count[occurs]).mean(-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_and_count_jit(
    protocol: Protocol,
    num_classes: int,
    settings: ProbeSettings,
    x: Float[Array, "k n d"],
    y: Int[Array, " n"],
    keys: Key[Array, " s"],
    indices: Int[Array, " i"],
    values: dict[str, Float[Array, "k s v"]],
    x_test: Float[Array, "k m d"],
    y_test: Int[Array, " m"],
) -> tuple[Int[Array, "k s v c"], Weights]:
    classes = jnp.eye(num_classes, dtype=jnp.int32)[y_test]

    def fit_and_count(x, key, values, x_test):
        """Fits the classifiers at all grid points of one checkpoint and seed."""

        def fit(values):
            return protocol.fit(x, y, indices, key=key, num_classes=num_classes, settings=settings, **values)

        weights = fit(values) if protocol.exact else jax.vmap(fit)(values)
        predicted = (x_test @ weights["w"] + weights["b"][:, None]).argmax(-1)
        return (predicted == y_test).astype(jnp.int32) @ classes, weights

    per_seed = jax.vmap(fit_and_count, (None, 0, 0, None))
    return jax.vmap(per_seed, (0, None, 0, 0))(x, keys, values, x_test)


class _Tested(NamedTuple):
    """Tested classifiers.

    Attributes:
      correct: number of correctly classified test rows of each class.
      count: number of test rows of each class.
      weights: classifiers [k, seeds, values, ...], on the device.
    """

    correct: Float[np.ndarray, "k s v c"]
    count: Float[np.ndarray, " c"]
    weights: Weights


def _fit_and_test(protocol: Protocol, num_classes: int, settings: ProbeSettings, *arrays) -> _Tested:
    """Fits classifiers and tests them; the arrays are those of `_fit_and_count_jit`."""
    with jax.default_matmul_precision("float32"):
        correct, weights = _fit_and_count_jit(protocol, num_classes, settings, *arrays)
    count = np.bincount(np.asarray(arrays[-1]), minlength=num_classes)
    return _Tested(np.asarray(correct, np.float64), count.astype(np.float64), weights)


def _fit_gigaflops(
    protocol: Protocol,
    num_classes: int,
    settings: ProbeSettings,
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    indices: Int[np.ndarray, " i"],
    values: Values,
) -> float:
    """Counts the operations of fitting classifiers with each of the `values` to the rows `indices`."""
    key, num_values = jax.random.key(0), len(next(iter(values.values())))
    if protocol.exact:  # the number of steps depends on the data
        fit = functools.partial(protocol.fit, num_classes=num_classes, settings=settings, key=key)
        with jax.default_matmul_precision("float32"):
            return flops.gigaflops(lambda x, y, values: fit(x, y, indices, **values), x, y, values)
    epochs, steps, batch = epochs_and_steps(settings, len(indices))
    weights = gaussian_start(key, x.shape[1], num_classes)
    one = devices.gigaflops(jax.grad(cross_entropy), weights, x[:batch], y[:batch])
    return one * epochs * steps * num_values
