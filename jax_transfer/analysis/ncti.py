"""NCTI: how far features are from neural collapse on the target (Wang et al., ICCV 2023).

Wang et al., "How Far Pre-trained Models Are from Neural Collapse on the Target Dataset Informs their Transferability",
judges a checkpoint by three properties of collapsed features, each a score here. They are combined over a list of
checkpoints, because each is first scaled to the range that it has in the list:

    ncti_variability  -log sum_c |P_c|_*       P_c [n_c, C]: posteriors of the samples of class c
    ncti_geometry     |F|_*                    F [n, C - 1]: discriminant features
    ncti_nearest      mean_i P(y_i | x_i)
    ncti              the sum of the three, scaled over the list

|.|_* is the nuclear norm, the sum of the singular values. P and F come from linear discriminant analysis of the first
64 principal components: with the class means m_c and the pooled within-class covariance W (divisor n),

    P(c | x) ~ n_c exp(-(x - m_c)' W^-1 (x - m_c) / 2),     F = (X - mean) W^-1/2 V,

where the columns of V span the whitened class means W^-1/2 (m_c - mean). W is shrunk to (1 - a) W + a tr(W) / 64 I.
This follows the authors' code, which the paper's numbers come from: the paper has no logarithm in ncti_variability, and
the shrinkage is a = exp(-v), where v is the sum of the variances of the first 32 principal components, and none below
1e-10. So the scores depend on the scale of the features. In two points the authors' code is not followed:

- Its PCA may be randomised, and fails with fewer than 64 features or samples. Here it is exact, with min(64, n, d)
  components, of which those are left out that may be rounding errors.
- With shrinkage, its discriminant directions are those of a shrunk between-class covariance, which are undetermined if
  a is almost 1. Here they always span the class means, as they do in both without shrinkage.

Directions in which no class varies, of which there are many if n - C < 64, are left out, as in its method without
shrinkage.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jax_transfer.analysis.agreement import paired
from jax_transfer.analysis.arguments import as_count, as_features, as_labels, scored
from jax_transfer.analysis.classwise import by_class
from jax_transfer.analysis.hscore import ROUNDING, varying
from jax_transfer.numerics import positive

NUM_COMPONENTS = 64  # of the PCA
NUM_VARIANCES = 32  # of the principal components whose variances decide on the shrinkage
LEAST_SHRINKAGE = 1e-10  # a smaller shrinkage counts as 0


def ncti_variability(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes the within-class variability collapse of NCTI, -log sum_c |P_c|_*.

    See the module docstring for the formula and its source. Higher is better, but only as a part of `ncti`: the
    posteriors of a class vary least if they all are one class, but also if the features tell nothing, so this part
    alone prefers constant features. The other two parts make up for it.

    Args:
      x: features. Shifting or rotating them does not change the score, but scaling them does.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, at least -log sum_c n_c; NaN if a feature is not finite.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0], [0.9], [0.1], [-0.1]]), jnp.array([0, 0, 1, 1])
      >>> round(float(ncti_variability(x, y, 2)), 2)
      -1.04
    """
    return _scored(_variability, x, y, num_classes)


def ncti_geometry(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes the simplex encoded label interpolation (SELI) geometry of NCTI, the nuclear norm |F|_*.

    The rank of the discriminant features, in a continuous form: it is large if the classes are far apart in as many
    directions as possible, relative to their spread. See the module docstring for the formula and its source. Higher
    is better.

    Args:
      x: features. Shifting or rotating them does not change the score, but scaling them does.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype: 0 for constant features or a single class, NaN if a feature is not finite.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y, shuffled = jnp.array([[1.0], [0.9], [0.1], [-0.1]]), jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
      >>> round(float(ncti_geometry(x, y, 2)), 2), round(float(ncti_geometry(x, shuffled, 2)), 2)
      (12.18, 2.02)
    """
    return _scored(_geometry, x, y, num_classes)


def ncti_nearest(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes the optimality of the nearest-centre classifier of NCTI, mean_i P(y_i | x_i).

    The classifier is fitted to the samples that it is tested on. See the module docstring for the formula and its
    source. Higher is better.

    Args:
      x: features. Shifting or rotating them does not change the score, but scaling them does.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype in [0, 1]; NaN if a feature is not finite.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y, shuffled = jnp.array([[1.0], [0.9], [0.1], [-0.1]]), jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
      >>> round(float(ncti_nearest(x, y, 2)), 2), round(float(ncti_nearest(x, shuffled, 2)), 2)
      (1.0, 0.51)
    """
    return _scored(_nearest, x, y, num_classes)


def ncti(variability: ArrayLike, geometry: ArrayLike, nearest: ArrayLike) -> Float[np.ndarray, "k"]:
    """Combines the three parts of NCTI over a list of k checkpoints: the sum of the parts, each scaled to a range of 1.

        (v - max v) / (max v - min v) + (g - min g) / (max g - min g) + (q - min q) / (max q - min q)

    The equal weights and the range [-1, 2] are those of the authors' code (see the module docstring). A value compares
    checkpoints of the same list only: another list gives another value. Higher is better.

    Args:
      variability, geometry, nearest: `ncti_variability`, `ncti_geometry` and `ncti_nearest` of each checkpoint, [k].

    Returns:
      Values [k]. A part that is the same for all checkpoints counts 0. All are NaN if any part of any checkpoint is not
      a finite number, because the list is scaled as a whole.

    Raises:
      InputError: if the arguments are not three lists of numbers of the same length.

    Example:
      >>> ncti([-2.0, -3.0, -4.0], [30.0, 50.0, 10.0], [0.5, 0.9, 0.1]).tolist()
      [1.0, 1.5, -1.0]
    """
    variability, geometry = paired(variability, geometry, ("variability", "geometry"))
    variability, nearest = paired(variability, nearest, ("variability", "nearest"))
    parts = np.stack([variability, geometry, nearest])
    if not np.isfinite(parts).all():
        return np.full(parts.shape[1], np.nan)
    if not parts.size:
        return np.zeros(0)
    low, high = parts.min(axis=1, keepdims=True), parts.max(axis=1, keepdims=True)
    from_zero = (parts - low) / np.where(high > low, high - low, 1)
    return from_zero.sum(axis=0) - (high > low)[0]


def _scored(part, x, y, num_classes: int) -> Float[Array, ""]:
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(part, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _variability(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    total = _sum_of_nuclear_norms(_posteriors(x, y, num_classes), y, jnp.arange(num_classes))
    return jnp.where(jnp.isfinite(x).all(), -jnp.log(total), jnp.nan)


@functools.partial(jax.jit, static_argnames="num_classes")
def _nearest(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    own = jnp.take_along_axis(_posteriors(x, y, num_classes), y[:, None], axis=1)
    return jnp.where(jnp.isfinite(x).all(), jnp.mean(own), jnp.nan)


@functools.partial(jax.jit, static_argnames="num_classes")
def _geometry(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    with jax.default_matmul_precision("float32"):
        whitened = _whitened(x, y, num_classes)
        share = whitened.counts / len(x)
        s, directions = _right_singular(jnp.sqrt(share)[:, None] * whitened.means)
        # The means of C classes around their mean span at most C - 1 directions.
        is_used = (s > _tolerance(s)) & (jnp.arange(len(s)) < jnp.sum(share > 0) - 1)
        features = whitened.features @ jnp.where(is_used[:, None], directions, 0).T
        value = jnp.sum(_right_singular(features)[0])
    return jnp.where(jnp.isfinite(x).all(), value, jnp.nan)


@jax.custom_batching.sequential_vmap  # so that each class runs with one block size
def _sum_of_nuclear_norms(p: Float[Array, "n c"], y: Int[Array, "n"], classes: Int[Array, "c"]) -> Float[Array, ""]:
    def nuclear_norm(rows: Float[Array, "m c"], count: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.sum(_right_singular(rows)[0])

    with jax.default_matmul_precision("float32"):
        return jnp.sum(by_class(nuclear_norm, p, y, classes)[0])


def _posteriors(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, "n c"]:
    """Returns the posteriors of the classes; 0 for a class without samples."""
    with jax.default_matmul_precision("float32"):
        whitened = _whitened(x, y, num_classes)
        logits = whitened.features @ whitened.means.T - jnp.sum(whitened.means**2, axis=1) / 2
    return jax.nn.softmax(logits + jnp.log(whitened.counts), axis=1)


class _Whitened(NamedTuple):
    """Features and class means around the mean of all samples, with unit covariance within the classes, if shrunk."""

    features: Float[Array, "n m"]
    means: Float[Array, "c m"]
    counts: Float[Array, "c"]


def _whitened(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> _Whitened:
    z, variances = _principal_components(x)
    one_hot = jax.nn.one_hot(y, num_classes, dtype=x.dtype)
    counts = jnp.sum(one_hot, axis=0)
    means = one_hot.T @ z / positive(counts)[:, None]
    s, directions = _right_singular(z - means[y])
    # If nothing but rounding errors varies within the classes, they are taken to vary by as much in all directions.
    rounding = ROUNDING * jnp.finfo(x.dtype).eps * jnp.linalg.norm(z)
    s = jnp.where(s[0] > rounding, s, rounding) / len(z) ** 0.5
    shrinkage = jnp.exp(-jnp.sum(variances[:NUM_VARIANCES]))
    shrinkage = jnp.where(shrinkage > LEAST_SHRINKAGE, shrinkage, 0)
    variance = (1 - shrinkage) * s**2 + shrinkage * jnp.mean(s**2)
    directions = jnp.where(s > _tolerance(s), jax.lax.rsqrt(positive(variance)), 0)[:, None] * directions
    return _Whitened(z @ directions.T, means @ directions.T, counts)


def _principal_components(x: Float[Array, "n d"]) -> tuple[Float[Array, "n m"], Float[Array, "m"]]:
    """Returns the first m = min(64, n, d) principal components, up to a common factor, and their variances.

    Components that may be rounding errors of the features are 0.
    """
    (n, d), (xc, rounding) = x.shape, varying(x)
    scale = positive(jnp.max(jnp.abs(xc)))
    xc, rounding = xc / scale, rounding / scale * (n**0.5 + d**0.5)
    s, directions = _right_singular(xc)
    noise = jnp.sqrt(directions**2 @ rounding**2)
    m = min(NUM_COMPONENTS, len(s))
    s = jnp.where((s <= noise) | (s <= _tolerance(s)), 0, s)[:m]
    variances = s**2 / max(n - 1, 1) * scale * scale  # in this order, 0 does not become NaN
    return jnp.where(s == 0, 0, xc @ directions[:m].T), variances


def _right_singular(x: Float[Array, "n d"]) -> tuple[Float[Array, "k"], Float[Array, "k d"]]:
    """Returns the singular values and the right singular vectors, as rows; k = min(n, d)."""
    _, s, vt = jnp.linalg.svd(jnp.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x, full_matrices=False)
    return s, vt


def _tolerance(s: Float[Array, "k"]) -> Float[Array, ""]:
    """Returns the largest singular value that may be a rounding error; s is in descending order."""
    return ROUNDING * jnp.finfo(s.dtype).eps * s[0]
