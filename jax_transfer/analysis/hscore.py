"""H-score: the between-class share of the variance of whitened features (Bao et al., ICIP 2019).

    H = tr(cov(f)^+ cov(g)),

where f_i is the feature vector of sample i and g_i is the mean feature vector of its class. Let U be an orthonormal
basis of the column space of the centred features, and Y the one-hot labels with columns scaled to unit length. Then
H = |U'Y|^2, which is between 0 and min(d, C - 1). U'Y is computed from the R factor of a QR factorisation of
[centred features, Y], without forming a covariance.

Here and in TransRate, variation that can be explained by rounding the features to their dtype counts as zero. A matrix
of rounding errors has full rank, so a score that is invariant to scale would treat the errors as informative features.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, scored
from jax_transfer.numerics import positive

ROUNDING = 8  # entries of R and singular values below ROUNDING * eps * (scale of the matrix) are rounding errors


def h_score(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes the H-score tr(cov(f)^+ cov(g)), with f the features and g their class means.

    Bao et al., "An Information-Theoretic Approach to Transferability in Task Transfer Learning", ICIP 2019. Higher is
    better.

    Args:
      x: features. Shifting them or applying an invertible linear map does not change the score.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, between 0 and min(d, C - 1): 0 for constant features, NaN if a feature is not finite.
      Directions whose variance is explained by rounding x to its dtype are ignored.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0], [0.8], [0.1], [-0.1]])
      >>> informative, shuffled = h_score(x, jnp.array([0, 0, 1, 1]), 2), h_score(x, jnp.array([0, 1, 0, 1]), 2)
      >>> round(float(informative), 2), round(float(shuffled), 2)
      (0.95, 0.05)
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_h_score, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _h_score(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    xc, rounding = varying(x)
    norms = _column_norms(xc)
    with jax.default_matmul_precision("float32"):
        return _explained(*_triangle(xc / norms, y, num_classes), _largest_error(rounding, len(x)) / norms)


# Sequential: QR and SVD process a batch one matrix at a time anyway, and lax.cond then runs only one of the branches.
@jax.custom_batching.sequential_vmap
def _explained(r11: Float[Array, "k d"], r12: Float[Array, "k c"], rounding: Float[Array, "d"]) -> Float[Array, ""]:
    """Returns |U'Y|^2 over the directions of xc = Q R11 that exceed `rounding`; the columns of xc have unit length."""
    (k, d), tolerance = r11.shape, ROUNDING * jnp.finfo(r11.dtype).eps

    def by_direction() -> Float[Array, ""]:
        s, explained = _directions(r11, r12, rounding)
        return jnp.sum(jnp.where(s == 0, 0, explained))  # s == 0 is False for NaN, so NaN is kept

    if k < d:
        return by_direction()
    # s_1 <= sqrt(d) and s_d >= 1 / |R11^-1|. If these bounds prove full rank, every direction counts and Q is a basis.
    inverse = jax.scipy.linalg.solve_triangular(r11, jnp.eye(d, dtype=r11.dtype))
    has_full_rank = jnp.linalg.norm(inverse) * (jnp.max(rounding) + tolerance * d**0.5) < 1
    return jax.lax.cond(has_full_rank, lambda: jnp.sum(r12**2), by_direction)


def h_score_shrunk(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes the H-score with a Ledoit-Wolf covariance: tr(S_a^-1 (1 - a) cov(g)).

    S_a = (1 - a) S + a tr(S)/d I, where S = cov(f) has the divisor n and cov(g) has the divisor n - 1. The shrinkage a
    minimises the expected squared error of S_a (Ledoit and Wolf, 2004; `sklearn.covariance.LedoitWolf`). Ibrahim et
    al., "Newer is not always better: Rethinking transferability metrics", ECML 2022, equation 5. Higher is better.

    Args:
      x: features. Shifting, rotating or uniformly scaling them does not change the score.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype: 0 for constant features, NaN if a feature is not finite. Columns whose variance is
      explained by rounding x to its dtype count as constant, and so do directions of rounding errors that the shrinkage
      does not suppress. Otherwise rounding errors would count as features, since the score is invariant to scale.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0], [0.8], [0.1], [-0.1]])
      >>> round(float(h_score_shrunk(x, jnp.array([0, 0, 1, 1]), 2)), 2)
      1.27
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_h_score_shrunk, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _h_score_shrunk(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    (n, d), (xc, rounding) = x.shape, varying(x)
    largest = positive(jnp.max(jnp.abs(xc)))
    xc, rounding = xc / largest, _largest_error(rounding, n) / largest
    order = jnp.argsort(-jnp.linalg.norm(xc, axis=0))
    k = min(n, d)
    with jax.default_matmul_precision("float32"):
        r11, r12 = _triangle(xc[:, order], y, num_classes)
        # [k, k], with the same singular values and left singular vectors as r11
        small = jnp.linalg.qr(r11.T, mode="r").T if n < d else r11
        covariance = small.T @ small / n  # has the trace and the norm of S
        mean = jnp.trace(covariance) / d
        distance = jnp.sum((covariance - mean * jnp.eye(k)) ** 2) + (d - k) * mean**2  # |S - tr(S)/d I|^2
        error = (jnp.mean(jnp.sum(xc**2, axis=1) ** 2) - jnp.sum(covariance**2)) / n  # mean_i |x_i x_i' - S|^2 / n
        shrinkage = jnp.clip(error, 0, distance) / positive(distance)
        return n / max(n - 1, 1) * _shrunk_explained(r11, small, r12, rounding[order], shrinkage, n * shrinkage * mean)


@jax.custom_batching.sequential_vmap  # so that lax.cond runs only one of the branches
def _shrunk_explained(
    r11: Float[Array, "k d"],
    small: Float[Array, "k k"],
    r12: Float[Array, "k c"],
    rounding: Float[Array, "d"],
    shrinkage: Float[Array, ""],
    ridge: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns |U'Y|^2 with direction i weighted by (1 - a) s_i^2 / ((1 - a) s_i^2 + ridge), where a is the shrinkage.

    This is a ridge regression of Y on x. `small` has the same singular values and left singular vectors as r11.
    """
    k, tiny = len(small), jnp.finfo(r11.dtype).tiny

    def by_triangle() -> Float[Array, ""]:
        identity = jnp.sqrt(jnp.fmax(ridge, tiny)) * jnp.eye(k, dtype=r11.dtype)
        top = jnp.concatenate([jnp.sqrt(1 - shrinkage) * small, r12], axis=1)
        bottom = jnp.concatenate([identity, jnp.zeros_like(r12)], axis=1)
        return jnp.sum(jnp.linalg.qr(jnp.concatenate([top, bottom]), mode="r")[:k, k:] ** 2)

    def by_direction() -> Float[Array, ""]:
        s, explained = _directions(r11, r12, rounding)
        weight = (1 - shrinkage) * s**2 / jnp.fmax((1 - shrinkage) * s**2 + ridge, tiny)
        return jnp.sum(jnp.where(s == 0, 0, weight * explained))

    # Directions that are rounding errors have s^2 <= rounding^2 / 10, hence a weight below 0.001 in `by_triangle`.
    return jax.lax.cond(jnp.max(rounding) ** 2 * 100 > ridge, by_direction, by_triangle)


def _directions(
    r11: Float[Array, "k d"], r12: Float[Array, "k c"], rounding: Float[Array, "d"]
) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    """Returns s_i and |u_i'Y|^2 for each direction of x = Q R11, where R12 = Q'Y; rounding errors s_i become 0."""
    u, s, vt = jnp.linalg.svd(r11, full_matrices=False)
    noise = jnp.sqrt(vt**2 @ rounding**2) + ROUNDING * jnp.finfo(r11.dtype).eps * s[0]
    return jnp.where(s <= noise, 0, s), jnp.sum((u.T @ r12) ** 2, axis=1)


def centred(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Subtracts the column means twice, since the first mean is too inaccurate for columns far from 0.

    Example:
      >>> import jax.numpy as jnp
      >>> centred(jnp.array([[1.0, 5.0], [3.0, 5.0]])).tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    # The sum of a column above 1e30 may overflow. Scaling by a power of two causes no rounding.
    scale = jnp.where(jnp.max(jnp.abs(x), axis=0) > 1e30, 2.0**-64, 1).astype(x.dtype)
    x = x - jnp.mean(x * scale, axis=0) / scale
    return x - jnp.mean(x * scale, axis=0) / scale


def varying(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, "d"]]:
    """Returns the centred features and, for each column, the rounding error of x in its dtype: eps max|x|.

    A column whose standard deviation is at most twice its rounding error counts as constant: the column and its
    rounding error are set to 0.

    Example:
      >>> import jax.numpy as jnp
      >>> xc, rounding = varying(jnp.array([[1.0, 7.0], [3.0, 7.0]]))
      >>> xc.tolist(), [round(1e7 * error, 1) for error in rounding.tolist()]
      ([[-1.0, 0.0], [1.0, 0.0]], [3.6, 0.0])
    """
    xc = centred(x)
    rounding = jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0)
    is_rounding = _column_norms(xc, 0) <= 2 * rounding * len(x) ** 0.5
    return jnp.where(is_rounding, 0, xc), jnp.where(is_rounding, 0, rounding)


def _largest_error(rounding: Float[Array, "d"], n: int) -> Float[Array, "d"]:
    """Bounds the largest singular value of n rows of independent rounding errors, for the error size of each column."""
    return rounding * (n**0.5 + len(rounding) ** 0.5)


def _triangle(
    xc: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int
) -> tuple[Float[Array, "k d"], Float[Array, "k c"]]:
    """Returns R11 and R12 = Q'Y, where xc = Q R11 and Y holds the one-hot labels, scaled and centred; k = min(n, d).

    The columns of xc, and therefore of Q, are orthogonal to the vector of ones only up to rounding. Y is therefore
    centred as well; otherwise its mean would pick up these rounding errors.
    """
    d, k = xc.shape[1], min(xc.shape)
    one_hot = jax.nn.one_hot(y, num_classes, dtype=xc.dtype)
    lengths = jnp.sqrt(jnp.sum(one_hot, axis=0))
    unit = one_hot / jnp.fmax(lengths, 1)
    r = jnp.linalg.qr(jnp.concatenate([xc, unit - jnp.mean(unit, axis=0)], axis=1), mode="r")
    # Entries below the rounding error of their column are set to 0, so that linearly dependent columns stay dependent.
    is_significant = ~(jnp.abs(r[:k, :d]) <= ROUNDING * jnp.finfo(xc.dtype).eps * jnp.linalg.norm(xc, axis=0))
    return jnp.where(is_significant, r[:k, :d], 0), r[:k, d:]


def _column_norms(x: Float[Array, "n d"], of_zeros: float = 1) -> Float[Array, "d"]:
    """Computes the column norms without overflow or underflow; a column of zeros gets the norm `of_zeros`."""
    largest = positive(jnp.max(jnp.abs(x), axis=0))
    norms = largest * jnp.linalg.norm(x / largest, axis=0)
    return jnp.where(norms == 0, of_zeros, norms)
