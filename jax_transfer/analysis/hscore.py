"""H-score: the between-class share of the features' variance, in whitened features (Bao et al., ICIP 2019).

    H = tr(cov(f)^+ cov(g)),  f_i the features of sample i and g_i the mean feature of its class.

With U an orthonormal basis of the centred features and Y the one-hot labels, each column of unit length, it is
|U'Y|^2, between 0 and min(d, C - 1): U'Y follows from R of a QR of [centred features, Y]. No covariance is formed.

What rounding the features to their dtype explains counts as zero, here and in TransRate: a matrix of such errors has full
rank, and whatever divides by its size takes it for features as good as any.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, scored
from jax_transfer.numerics import positive

ZERO = 8  # singular values below ZERO eps s_1 are rounding errors of the decomposition


def h_score(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """tr(cov(f)^+ cov(g)). Higher is better; at most min(d, C - 1).

    Args:
      x: features. The score does not change under shifts and invertible linear maps of them.
      y: labels in [0, num_classes); a class without samples changes nothing.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, 0 for constant features, NaN for features that are not finite. Directions of the features
      whose variance is explained by rounding x to its dtype do not count.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels that are traced give NaN if they are out of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_h_score, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _h_score(x, y, num_classes):
    xc, rounding = varying(x)
    norms = _column_norms(xc)
    with jax.default_matmul_precision("float32"):
        return _explained(*_triangle(xc / norms, y, num_classes), _largest_error(rounding, len(x)) / norms)


@jax.custom_batching.sequential_vmap  # lax.cond stays a branch; QR and SVD run through a batch one by one anyway
def _explained(r11, r12, rounding):
    """|U'Y|^2 over the directions of xc = Q R11 that are more than rounding [d], columns of unit length."""
    (k, d), tolerance = r11.shape, ZERO * jnp.finfo(r11.dtype).eps

    def by_direction():
        s, explained = _directions(r11, r12, rounding)
        return jnp.sum(jnp.where(s == 0, 0, explained))  # keeps NaN

    if k < d:
        return by_direction()
    # s_1 <= sqrt(d), and s_d >= 1 / |R11^-1|: where that suffices, every direction counts and Q is a basis.
    inverse = jax.scipy.linalg.solve_triangular(r11, jnp.eye(d, dtype=r11.dtype))
    has_full_rank = jnp.linalg.norm(inverse) * (jnp.max(rounding) + tolerance * d**0.5) < 1
    return jax.lax.cond(has_full_rank, lambda: jnp.sum(r12**2), by_direction)


def h_score_shrunk(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """H-score with the covariance of Ledoit and Wolf: tr(S_a^-1 (1 - a) cov(g)). Higher is better.

    S_a = (1 - a) S + a tr(S)/d I, S = cov(f) with divisor n, cov(g) with n - 1, and a the shrinkage that minimises the
    expected squared error (Ledoit and Wolf, 2004; scikit-learn's `LedoitWolf`). From Ibrahim et al., "Newer is not
    always better: Rethinking transferability metrics" (ECML 2022), equation 5.

    Args:
      x: features. The score does not change under shifts, rotations and a common scale of them.
      y: labels in [0, num_classes); a class without samples changes nothing.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, 0 for constant features, NaN for features that are not finite. Columns whose variance is
      explained by rounding x to its dtype count as constant, and so do directions where the shrinkage does not outweigh
      the rounding: S_a is invariant to scale, so it would take the rounding errors of constant features for features.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels that are traced give NaN if they are out of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_h_score_shrunk, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _h_score_shrunk(x, y, num_classes):
    (n, d), (xc, rounding) = x.shape, varying(x)
    largest = positive(jnp.max(jnp.abs(xc)))
    xc, rounding = xc / largest, _largest_error(rounding, n) / largest
    order = jnp.argsort(-jnp.linalg.norm(xc, axis=0))
    k = min(n, d)
    with jax.default_matmul_precision("float32"):
        r11, r12 = _triangle(xc[:, order], y, num_classes)
        small = jnp.linalg.qr(r11.T, mode="r").T if n < d else r11  # [k, k], with the same U and s
        covariance = small.T @ small / n  # S; only its norms are taken of it
        mean = jnp.trace(covariance) / d
        distance = jnp.sum((covariance - mean * jnp.eye(k)) ** 2) + (d - k) * mean**2  # |S - tr(S)/d I|^2
        error = (jnp.mean(jnp.sum(xc**2, axis=1) ** 2) - jnp.sum(covariance**2)) / n  # mean_i |x_i x_i' - S|^2 / n
        shrinkage = jnp.clip(error, 0, distance) / positive(distance)
        return n / max(n - 1, 1) * _shrunk_explained(r11, small, r12, rounding[order], shrinkage, n * shrinkage * mean)


@jax.custom_batching.sequential_vmap  # lax.cond stays a branch
def _shrunk_explained(r11, small, r12, rounding, shrinkage, ridge):
    """|U'Y|^2 with direction i weighted by (1 - a) s_i^2 / ((1 - a) s_i^2 + ridge): ridge regression of Y on x."""
    k, tiny = len(small), jnp.finfo(r11.dtype).tiny

    def by_triangle():
        identity = jnp.sqrt(jnp.fmax(ridge, tiny)) * jnp.eye(k, dtype=r11.dtype)
        top = jnp.concatenate([jnp.sqrt(1 - shrinkage) * small, r12], axis=1)
        bottom = jnp.concatenate([identity, jnp.zeros_like(r12)], axis=1)
        return jnp.sum(jnp.linalg.qr(jnp.concatenate([top, bottom]), mode="r")[:k, k:] ** 2)

    def by_direction():
        s, explained = _directions(r11, r12, rounding)
        weight = (1 - shrinkage) * s**2 / jnp.fmax((1 - shrinkage) * s**2 + ridge, tiny)
        return jnp.sum(jnp.where(s == 0, 0, weight * explained))

    # Directions of rounding have s^2 of at most rounding^2 / 10: a weight below 0.001 there.
    return jax.lax.cond(jnp.max(rounding) ** 2 * 100 > ridge, by_direction, by_triangle)


def _directions(r11, r12, rounding):
    """(s, |u'Y|^2) [k] of the directions of x = Q R11: s is 0 for what rounding [d] explains, R12 = Q'Y."""
    u, s, vt = jnp.linalg.svd(r11, full_matrices=False)
    noise = jnp.sqrt(vt**2 @ rounding**2) + ZERO * jnp.finfo(r11.dtype).eps * s[0]
    return jnp.where(s <= noise, 0, s), jnp.sum((u.T @ r12) ** 2, axis=1)


def centred(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """x less its column means, twice: the first mean of columns far from 0 has lost the digits that matter here."""
    # The sum of a column above 1e30 may overflow; a power of two rounds nothing.
    scale = jnp.where(jnp.max(jnp.abs(x), axis=0) > 1e30, 2.0**-64, 1).astype(x.dtype)
    x = x - jnp.mean(x * scale, axis=0) / scale
    return x - jnp.mean(x * scale, axis=0) / scale


def varying(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, "d"]]:
    """The centred features, and by how much rounding x to its dtype may move a value of each column: eps max|x|.

    A column whose standard deviation is at most twice that is rounding, and becomes 0 with an error of 0.
    """
    xc = centred(x)
    rounding = jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0)
    is_rounding = _column_norms(xc, 0) <= 2 * rounding * len(x) ** 0.5
    return jnp.where(is_rounding, 0, xc), jnp.where(is_rounding, 0, rounding)


def _largest_error(rounding, n):
    """The largest singular value of n rows of rounding errors of one size: they have full rank."""
    return rounding * (n**0.5 + len(rounding) ** 0.5)


def _triangle(xc, y, num_classes):
    """R11 [k, d] and R12 = Q'Y [k, C] of xc = Q R11, k = min(n, d), Y the centred one-hot labels, columns of unit length.

    The columns of Q are orthogonal to 1 as those of xc, but up to rounding: Y, which is not, would count that.
    """
    d, k = xc.shape[1], min(xc.shape)
    one_hot = jax.nn.one_hot(y, num_classes, dtype=xc.dtype)
    lengths = jnp.sqrt(jnp.sum(one_hot, axis=0))
    unit = one_hot / jnp.fmax(lengths, 1)
    r = jnp.linalg.qr(jnp.concatenate([xc, unit - jnp.mean(unit, axis=0)], axis=1), mode="r")
    # An entry below the rounding of its column is zero: a column that depends on those before it stays so.
    more_than_rounding = ~(jnp.abs(r[:k, :d]) <= ZERO * jnp.finfo(xc.dtype).eps * jnp.linalg.norm(xc, axis=0))
    return jnp.where(more_than_rounding, r[:k, :d], 0), r[:k, d:]


def _column_norms(x, of_zeros=1):
    """[d], without overflow or underflow of the squares; of_zeros for a column of zeros."""
    largest = positive(jnp.max(jnp.abs(x), axis=0))
    norms = largest * jnp.linalg.norm(x / largest, axis=0)
    return jnp.where(norms == 0, of_zeros, norms)
