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
) -> Bool[np.ndarray, " m"]:
    """Which images a softmax regression on the others classifies correctly, in five stratified folds.

    The regularisation of highest accuracy is taken, of the four in L2: with so few, that is hardly optimistic. Up to four
    images are left out (m = n - n mod 5), so that the folds are of one size. The same labels and seed give the same folds,
    so that two checkpoints can be compared image by image.

    Raises:
      InputError: for fewer than five images.
    """
    order = np.lexsort((np.random.default_rng(seed).permutation(len(y)), y))
    size = len(y) // FOLDS
    if size == 0:
        raise InputError(f"The target has {len(y)} images: at least {FOLDS} are needed.")
    folds = order[: size * FOLDS].reshape(size, FOLDS).T  # neighbours, which are of one class, go to different folds
    train = np.stack([np.concatenate(np.delete(folds, i, axis=0)) for i in range(FOLDS)])
    with jax.default_matmul_precision("float32"):
        correct = np.asarray(_correct(jnp.asarray(x), jnp.asarray(y), train, folds, num_classes))
    return correct[:, correct.sum((0, 2)).argmax()].ravel()


@functools.partial(jax.jit, static_argnames="num_classes")
def _correct(x, y, train, test, num_classes):
    """[folds, values of L2, images of a fold]"""

    def fold(rows):
        train, test = rows
        weights = converged(x, y, train, jnp.asarray(L2, x.dtype), jax.random.key(0), num_classes, ProbeSettings())
        return (x[test] @ weights["w"] + weights["b"][:, None]).argmax(-1) == y[test]

    return jax.lax.map(fold, (train, test))


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
