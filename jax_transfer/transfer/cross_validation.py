"""Accuracy of a converged linear probe without a test set: every image is tested by a classifier that has not seen it."""

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
NORMAL_95 = 1.96  # standard deviations


def image_weights(y: Int[np.ndarray, " n"], metric: str) -> Float[np.ndarray, " n"]:
    """The weight of each image in a metric, which is the weighted share of images that are right.

    "accuracy" weighs all images the same, by 1; "mean_class_accuracy" all classes that occur.
    """
    count = np.bincount(y)
    return {"accuracy": np.ones(len(count)), "mean_class_accuracy": 1 / np.maximum(count, 1)}[metric][y]


def cross_validated(
    x: Float[Array, "n d"], y: Int[np.ndarray, " n"], num_classes: int, seed: int = 0, metric: str = "accuracy"
) -> Bool[np.ndarray, " n"]:
    """Which images a softmax regression on the others classifies correctly, in five stratified folds.

    Every image is tested once. A class's images are spread evenly over the folds, whose sizes differ by at most one; a
    class with a single image is tested by a classifier that has never seen it. The regularisation with the highest value
    of `metric` is taken among the four in L2: with so few, that is hardly optimistic. The same labels and seed give the same folds, so that
    two checkpoints can be compared image by image.

    Returns:
      For each image, in the order given, whether its prediction is right.

    Raises:
      InputError: for fewer than five images.
    """
    n = len(y)
    if n < FOLDS:
        raise InputError(f"The target has {n} images: at least {FOLDS} are needed.")
    order = np.lexsort((np.random.default_rng(seed).permutation(n), y))
    fold = np.empty(n, int)
    fold[order] = np.arange(n) % FOLDS  # neighbours, which are of one class, go to different folds
    train, in_train = _padded([np.flatnonzero(fold != i) for i in range(FOLDS)])
    test, in_test = _padded([np.flatnonzero(fold == i) for i in range(FOLDS)])
    with jax.default_matmul_precision("float32"):
        correct = np.asarray(_correct(jnp.asarray(x), jnp.asarray(y), train, in_train, test, num_classes))
    right = np.empty((n, len(L2)), bool)
    right[test[in_test]] = correct.transpose(0, 2, 1)[in_test]
    # Rounded, so that values that differ by rounding errors alone are equal: the first of equals is taken.
    return right[:, np.round(image_weights(y, metric) @ right, 9).argmax()]


def _padded(rows: list[Int[np.ndarray, " _"]]) -> tuple[Int[np.ndarray, "f m"], Bool[np.ndarray, "f m"]]:
    """Lists of indices as one array, the shorter ones padded with their first index, and where there is no padding."""
    size = max(map(len, rows))
    mask = np.arange(size) < np.array([[len(row)] for row in rows])
    return np.stack([np.pad(row, (0, size - len(row)), constant_values=row[0]) for row in rows]), mask


@functools.partial(jax.jit, static_argnames="num_classes")
def _correct(x, y, train, in_train, test, num_classes):
    """Whether each test image's prediction is right: [folds, values of L2, images of a fold]."""
    l2, key = jnp.asarray(L2, x.dtype), jax.random.key(0)

    def fold(rows):
        train, in_train, test = rows
        weights = converged(x, y, train, l2, key, num_classes, ProbeSettings(), mask=in_train)
        return (x[test] @ weights["w"] + weights["b"][:, None]).argmax(-1) == y[test]

    return jax.lax.map(fold, (train, in_train, test))


def gigaflops(n: int, d: int, num_classes: int, steps: int = 40) -> float:
    """About what `cross_validated` costs: two products of all images with all classes a step, for each fold and value."""
    return FOLDS * len(L2) * steps * 2 * 2 * 0.8 * n * d * num_classes / 1e9


def share_with_interval(right: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(share, low, high): the weighted share of images that are right, with Wilson's score interval, 95 %.

    The interval is that of Kish's effective number of images, sum(weights)^2 / sum(weights^2), which is n for equal weights.
    """
    total = float(weights.sum())
    p, z, n = float(weights @ right) / total, NORMAL_95, total**2 / float(np.sum(weights**2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """(difference of the weighted shares, low, high), 95 %, of two classifiers tested on the same images.

    Images that both have right, or both wrong, say nothing: the interval is narrower than those of the two shares.
    """
    difference = a.astype(np.float64) - b
    mean = float(weights @ difference) / float(weights.sum())
    half = NORMAL_95 * float(np.linalg.norm(weights * (difference - mean))) / float(weights.sum())
    return mean, mean - half, mean + half
