"""Cross-validated accuracy of a converged linear probe: the probe that classifies an image was not trained on it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.records import InputError
from jax_transfer.transfer.softmax_regression import ProbeSettings, converged

FOLDS = 5
L2 = (1e-1, 1e-2, 1e-3, 1e-4)
NORMAL_95 = 1.96  # half the width of a 95 % normal interval, in standard deviations


def image_weights(y: Int[Array | np.ndarray, " n"], metric: str) -> Float[np.ndarray, " n"]:
    """Returns the weight of each image in a metric; the metric is the weighted fraction of correctly classified images.

    Args:
      y: labels, whole numbers from 0.
      metric: "accuracy" gives every image the weight 1; "mean_class_accuracy" gives every class that occurs a total
        weight of 1.

    Raises:
      KeyError: if the metric is unknown.

    Example:
      >>> import numpy as np
      >>> image_weights(np.array([0, 0, 1]), "mean_class_accuracy").tolist()
      [0.5, 0.5, 1.0]
    """
    count = np.bincount(y)
    return {"accuracy": np.ones(len(count)), "mean_class_accuracy": 1 / np.maximum(count, 1)}[metric][y]


def cross_validated(
    x: Float[Array | np.ndarray, "n d"],
    y: Int[Array | np.ndarray, " n"],
    num_classes: int,
    seed: int = 0,
    metric: str = "accuracy",
) -> Bool[np.ndarray, " n"]:
    """Cross-validates a softmax regression in five stratified folds and returns which images it classifies correctly.

    Every image is tested once, by a classifier fitted to the other four folds. The images of each class are spread
    evenly over the folds, whose sizes differ by at most one. If a class has a single image, that image is tested by a
    classifier that has not seen the class. The result uses the value of L2 with the highest `metric`; since there are
    only four values to choose from, this biases the result upwards only slightly. The folds depend only on the labels
    and the seed, so that checkpoints can be compared image by image.

    Args:
      x: features.
      y: labels in [0, num_classes).
      num_classes: C, static.
      seed: seed of the folds.
      metric: "accuracy" or "mean_class_accuracy"; see `image_weights`.

    Returns:
      Whether each image is classified correctly, in the order of x.

    Raises:
      InputError: if there are fewer than five images.

    Example:
      >>> import numpy as np
      >>> y = np.arange(10) % 2
      >>> float(cross_validated(y[:, None] + np.linspace(0, 0.1, 10, dtype=np.float32)[:, None], y, 2).mean())
      1.0
    """
    n = len(y)
    if n < FOLDS:
        raise InputError(f"The target has {n} images: expected at least {FOLDS}, one for each fold.")
    order = np.lexsort((np.random.default_rng(seed).permutation(n), y))
    fold = np.empty(n, int)
    fold[order] = np.arange(n) % FOLDS  # neighbours in this order are mostly of the same class
    train, in_train = _padded([np.flatnonzero(fold != i) for i in range(FOLDS)])
    test, in_test = _padded([np.flatnonzero(fold == i) for i in range(FOLDS)])
    with jax.default_matmul_precision("float32"):
        correct = np.asarray(_correct(jnp.asarray(x), jnp.asarray(y), train, in_train, test, num_classes))
    is_correct = np.empty((n, len(L2)), bool)
    is_correct[test[in_test]] = correct.transpose(0, 2, 1)[in_test]
    # Rounded, so that rounding errors do not break ties: argmax returns the first of equal values.
    return is_correct[:, np.round(image_weights(y, metric) @ is_correct, 9).argmax()]


def _padded(rows: list[Int[np.ndarray, " _"]]) -> tuple[Int[np.ndarray, "f m"], Bool[np.ndarray, "f m"]]:
    """Pads index lists to equal length with their first index; returns them and a mask that is False for padding."""
    size = max(map(len, rows))
    mask = np.arange(size) < np.array([[len(row)] for row in rows])
    return np.stack([np.pad(row, (0, size - len(row)), constant_values=row[0]) for row in rows]), mask


@functools.partial(jax.jit, static_argnames="num_classes")
def _correct(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    train: Int[Array, "f m"],
    in_train: Bool[Array, "f m"],
    test: Int[Array, "f t"],
    num_classes: int,
) -> Bool[Array, "f v t"]:
    """Returns whether each test image is classified correctly, for each fold and each of the v values of L2."""
    l2, key = jnp.asarray(L2, x.dtype), jax.random.key(0)

    def fold_correct(
        fold: tuple[Int[Array, "m"], Bool[Array, "m"], Int[Array, "t"]],
    ) -> Bool[Array, "v t"]:
        train, in_train, test = fold
        weights = converged(x, y, train, l2, key, num_classes, ProbeSettings(), mask=in_train)
        return (x[test] @ weights["w"] + weights["b"][:, None]).argmax(-1) == y[test]

    return jax.lax.map(fold_correct, (train, in_train, test))


def gigaflops(n: int, d: int, num_classes: int, steps: int = 40) -> float:
    """Estimates the floating point operations / 1e9 of `cross_validated`.

    In each fold and for each value of L2, a step of L-BFGS takes two matrix products of size n x d x num_classes, where
    n counts the training images of the fold.

    Args:
      n: number of images.
      d: number of features.
      num_classes: number of classes.
      steps: number of steps of L-BFGS in each fit.

    Example:
      >>> round(gigaflops(1000, 512, 10), 2)
      13.11
    """
    return FOLDS * len(L2) * steps * 2 * 2 * 0.8 * n * d * num_classes / 1e9


def share_with_interval(right: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Computes the weighted fraction of correctly classified images and its 95 % Wilson score interval.

    The interval uses Kish's effective sample size, sum(weights)^2 / sum(weights^2), which is n for equal weights. In
    general, this size is not a whole number, so `scipy.stats.binomtest` cannot compute the interval. Wilson, "Probable
    Inference, the Law of Succession, and Statistical Inference", JASA 1927; Kish, "Survey Sampling", 1965.

    Args:
      right: whether each image is classified correctly.
      weights: weight of each image; see `image_weights`.

    Returns:
      (fraction, low, high), each in [0, 1].

    Example:
      >>> import numpy as np
      >>> [round(value, 2) for value in share_with_interval(np.arange(10) < 8, np.ones(10))]
      [0.8, 0.49, 0.94]
    """
    total = float(weights.sum())
    p, z, n = float(weights @ right) / total, NORMAL_95, total**2 / float(np.sum(weights**2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """Computes the difference of two classifiers' weighted fractions of correct images, and its 95 % interval.

    The interval uses a normal approximation to the mean of the paired differences. It is usually narrower than the
    intervals of the two fractions, since images that both classify correctly, or both incorrectly, cancel.

    Args:
      a, b: whether each classifier is correct on each image.
      weights: weight of each image; see `image_weights`.

    Returns:
      (weighted fraction correct of a minus that of b, low, high).

    Example:
      >>> import numpy as np
      >>> a, b = np.array([True] * 9 + [False]), np.array([True] * 8 + [False] * 2)
      >>> [round(value, 2) for value in paired_difference(a, b, np.ones(10))]
      [0.1, -0.09, 0.29]
    """
    difference = a.astype(np.float64) - b
    mean = float(weights @ difference) / float(weights.sum())
    half = NORMAL_95 * float(np.linalg.norm(weights * (difference - mean))) / float(weights.sum())
    return mean, mean - half, mean + half
