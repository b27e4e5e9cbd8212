"""Accuracy of a converged linear probe without a test set: every image is tested by a classifier that has not seen it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.records import InputError
from jax_transfer.transfer.probe import ProbeSettings, converged

FOLDS = 5
L2 = (1e-1, 1e-2, 1e-3, 1e-4)
NORMAL_95 = 1.96  # standard deviations


def cross_validated(
    x: Float[Array, "n d"], y: Int[np.ndarray, " n"], num_classes: int, seed: int = 0
) -> Bool[np.ndarray, " n"]:
    """Which images a softmax regression on the others classifies correctly, in five stratified folds.

    Every image is tested once. A class's images are spread evenly over the folds, whose sizes differ by at most one; a
    class with a single image is tested by a classifier that has never seen it. The regularisation of highest accuracy is
    taken, of the four in L2: with so few, that is hardly optimistic. The same labels and seed give the same folds, so that
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
    best = correct.sum((0, 2), where=in_test[:, None]).argmax()
    right = np.empty(n, bool)
    right[test[in_test]] = correct[:, best][in_test]
    return right


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


def wilson(correct: int, total: int) -> tuple[float, float, float]:
    """(share, low, high): Wilson's score interval of a binomial share, 95 %."""
    p, z = correct / total, NORMAL_95
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return p, centre - half, centre + half


def paired_difference(a: Bool[np.ndarray, " m"], b: Bool[np.ndarray, " m"]) -> tuple[float, float, float]:
    """(difference of the accuracies, low, high), 95 %, of two classifiers tested on the same images.

    Images that both have right, or both wrong, say nothing: the interval is narrower than those of the two accuracies.
    """
    difference = a.astype(np.float64) - b
    half = NORMAL_95 * float(difference.std()) / math.sqrt(len(difference))
    mean = float(difference.mean())
    return mean, mean - half, mean + half
