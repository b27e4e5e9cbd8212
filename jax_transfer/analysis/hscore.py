"""H-score: the between-class share of the features' variance, in whitened features (Bao et al., ICIP 2019).

    H = tr(cov(f)^+ cov(g)),  f_i the features of sample i and g_i the mean feature of its class.

With U an orthonormal basis of the centred features and Y the one-hot labels, each column of unit length, it is
|U'Y|^2, between 0 and min(d, C - 1): U'Y follows from R of a QR of [centred features, Y]. No covariance is formed.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ZERO = 8  # singular values below ZERO eps s_1 are rounding errors of the decomposition


@functools.partial(jax.jit, static_argnames="num_classes")
def h_score(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """tr(cov(f)^+ cov(g)). Higher is better; at most min(d, C - 1).

    Args:
      x: features. The score does not change under shifts and invertible linear maps of them.
      y: labels in [0, num_classes); a class without samples changes nothing.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, 0 for constant features, NaN for features that are not finite. Directions of the features
      whose variance is explained by rounding x to its dtype do not count.
    """
    xc, eps = centred(x), jnp.finfo(x.dtype).eps
    norms = _column_norms(xc)
    rounding = eps * jnp.max(jnp.abs(x), axis=0) * x.shape[0] ** 0.5 / norms  # in x, of a column of unit length
    is_rounding = rounding > 0.5
    xc, rounding = jnp.where(is_rounding, 0, xc / norms), jnp.where(is_rounding, 0, rounding)
    with jax.default_matmul_precision("float32"):
        return _explained(*_triangle(xc, y, num_classes), rounding)


@jax.custom_batching.sequential_vmap  # lax.cond stays a branch; QR and SVD run through a batch one by one anyway
def _explained(r11, r12, rounding):
    """|U'Y|^2 over the directions of xc = Q R11 that are more than rounding [d], columns of unit length."""
    (k, d), tolerance = r11.shape, ZERO * jnp.finfo(r11.dtype).eps

    def by_direction():
        u, s, vt = jnp.linalg.svd(r11, full_matrices=False)
        noise = jnp.sqrt(vt**2 @ rounding**2) + tolerance * s[0]
        return jnp.sum(jnp.where(s <= noise, 0, jnp.sum((u.T @ r12) ** 2, axis=1)))  # keeps NaN

    if k < d:
        return by_direction()
    # s_1 <= sqrt(d), and s_d >= 1 / |R11^-1|: where that suffices, every direction counts and Q is a basis.
    inverse = jax.scipy.linalg.solve_triangular(r11, jnp.eye(d, dtype=r11.dtype))
    has_full_rank = jnp.linalg.norm(inverse) * (jnp.max(rounding) + tolerance * d**0.5) < 1
    return jax.lax.cond(has_full_rank, lambda: jnp.sum(r12**2), by_direction)


@functools.partial(jax.jit, static_argnames="num_classes")
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
      A scalar of x's dtype, 0 for constant features, NaN for features that are not finite.
    """
    (n, d), xc = x.shape, centred(x)
    largest = jnp.max(jnp.abs(xc))
    xc = xc / jnp.where(largest == 0, 1, largest)
    k, tiny = min(n, d), jnp.finfo(x.dtype).tiny
    with jax.default_matmul_precision("float32"):
        r11, r12 = _triangle(xc[:, jnp.argsort(-jnp.linalg.norm(xc, axis=0))], y, num_classes)
        if n < d:
            r11 = jnp.linalg.qr(r11.T, mode="r").T  # [k, k], with the same U and s
        covariance = r11.T @ r11 / n  # S; only its norms are taken of it
        mean = jnp.trace(covariance) / d
        distance = jnp.sum((covariance - mean * jnp.eye(k)) ** 2) + (d - k) * mean**2  # |S - tr(S)/d I|^2
        error = (jnp.mean(jnp.sum(xc**2, axis=1) ** 2) - jnp.sum(covariance**2)) / n  # mean_i |x_i x_i' - S|^2 / n
        shrinkage = jnp.clip(error, 0, distance) / jnp.where(distance == 0, 1, distance)
        # |U'Y|^2 with direction i weighted by (1 - a) s_i^2 / ((1 - a) s_i^2 + n a tr(S)/d): ridge regression of Y.
        ridge = jnp.sqrt(jnp.fmax(n * shrinkage * mean, tiny)) * jnp.eye(k, dtype=x.dtype)
        top = jnp.concatenate([jnp.sqrt(1 - shrinkage) * r11, r12], axis=1)
        bottom = jnp.concatenate([ridge, jnp.zeros_like(r12)], axis=1)
        weighted = jnp.linalg.qr(jnp.concatenate([top, bottom]), mode="r")[:k, k:]
    return n / (n - 1) * jnp.sum(weighted**2)


def centred(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """x less its column means, twice: the first mean of columns far from 0 has lost the digits that matter here."""
    x = x - jnp.mean(x, axis=0)
    return x - jnp.mean(x, axis=0)


def _triangle(xc, y, num_classes):
    """R11 [k, d] and R12 = Q'Y [k, C] of xc = Q R11, k = min(n, d), Y the one-hot labels, columns of unit length."""
    d, k = xc.shape[1], min(xc.shape)
    one_hot = jax.nn.one_hot(y, num_classes, dtype=xc.dtype)
    lengths = jnp.sqrt(jnp.sum(one_hot, axis=0))
    r = jnp.linalg.qr(jnp.concatenate([xc, one_hot / jnp.fmax(lengths, 1)], axis=1), mode="r")
    # An entry below the rounding of its column is zero: a column that depends on those before it stays so.
    more_than_rounding = ~(jnp.abs(r[:k, :d]) <= ZERO * jnp.finfo(xc.dtype).eps * jnp.linalg.norm(xc, axis=0))
    return jnp.where(more_than_rounding, r[:k, :d], 0), r[:k, d:]


def _column_norms(x):
    """[d], without overflow or underflow of the squares; 1 for a column of zeros."""
    largest = jnp.max(jnp.abs(x), axis=0)
    largest = jnp.where(largest == 0, 1, largest)
    norms = largest * jnp.linalg.norm(x / largest, axis=0)
    return jnp.where(norms == 0, 1, norms)
