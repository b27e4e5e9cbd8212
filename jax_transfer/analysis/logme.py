"""LogME: the maximised evidence of a Bayesian linear model on the features (You et al., ICML 2021).

For one class with 0/1 targets y [n], features x = U diag(s) V' [n, d], prior precision a and noise precision b, the
log evidence (equation 2 of the paper) depends on x only through s and z = U'y. With t = a / b, and b at its optimum
n / Q(t), it is a function of one variable,

    L(t) = -1/2 sum_i log(1 + s_i^2 / t) - n/2 log(Q(t) / n) - n/2 (1 + log 2 pi),
    Q(t) = r0 + sum_i z_i^2 t / (t + s_i^2),      r0 = |y - U z|^2.

The fixed points of the paper's iteration in (a, b) are the points where L'(t) = 0. The iteration is slow where the best
t is large, and ends at the maximum next to its start, which depends on the unit of the features; features of several
scales have several maxima. So log t is searched instead: L' on a grid, then bisection at the highest maxima.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

GRID = np.arange(-70.0, 36.0, 0.5)  # log(t / s_1^2); L varies on the scale of 1 in log t, as a logistic function does
NUM_MAXIMA = 3  # local maxima of a class that are refined
BISECTIONS = 12  # of a grid cell: to 1e-4 in log t, where L is flat to 1e-8
ZERO = 8  # an entry of R below ZERO eps times its column's norm is rounding
TINY = 1000  # singular values below TINY eps s_1 have lost relative accuracy in a divide-and-conquer SVD


def logme(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Mean over the classes that occur of the maximised log evidence per sample, in nats. Higher is better.

    Args:
      x: features, not centred; there is no bias term. The score does not change with their unit.
      y: labels in [0, num_classes); a class without samples does not count.
      num_classes: C, static under jit.

    Returns:
      A scalar of x's dtype, NaN for features that are not finite. For each class it is the global maximum over a / b in
      (0, inf]; inf (no feature helps) stands for the limit, the evidence of pure noise of power n_c / n. Where fewer
      than n directions fit a class exactly the evidence is unbounded: there the residual counts as rounding error
      (ZERO eps relative to the labels), which gives a large finite score that depends on the dtype.
    """
    one_hot = jax.nn.one_hot(y, num_classes, dtype=x.dtype)
    with jax.default_matmul_precision("float32"):
        evidence = _max_evidence(x, one_hot)
    occurs = jnp.any(one_hot > 0, axis=0)
    return jnp.sum(jnp.where(occurs, evidence, 0)) / jnp.sum(occurs) / x.shape[0]


@jax.custom_batching.sequential_vmap  # QR and SVD run through a batch one by one anyway, and lax.cond stays a branch
def _max_evidence(x, one_hot):
    """max over t of L(t) for each class, [C]; for a class without samples any number."""
    n, eps = x.shape[0], jnp.finfo(x.dtype).eps
    r11, r12, r0, rank = _triangle(x, one_hot)
    counts = jnp.sum(one_hot, axis=0)
    power = _positive(counts)  # |y|^2
    r0 = jnp.maximum(r0, (ZERO * eps) ** 2 * power)

    u, s, _ = jnp.linalg.svd(r11, full_matrices=False)
    s = s / _positive(s[0])
    s = jnp.where(s > ZERO * eps, s, 0)
    fast = _search(s, u.T @ r12, r0, power, n)

    # Tiny singular values matter only if L can be higher where t is as tiny; there Q >= r0 and the other values bound it.
    small = TINY * eps
    has_tiny = jnp.any((s < small) & (jnp.arange(s.shape[0]) < rank))
    bound = -0.5 * jnp.sum(jnp.where(s > small, jnp.log1p((s / small) ** 2), 0)) - 0.5 * n * jnp.log(r0 / n)

    def accurate(_):
        u, s = _graded_svd(r11)
        s = s / _positive(s[0])
        s = jnp.where(s > 1e-15, s, 0)  # its square must not underflow
        return _search(s, u.T @ r12, r0, power, n)

    doubtful = has_tiny & jnp.any((bound > fast) & (counts > 0))
    best = jax.lax.cond(doubtful, accurate, lambda _: fast, None)
    return best - 0.5 * n * (1 + np.log(2 * np.pi))


def _triangle(x, one_hot):
    """R11 [k, d], R12 [k, C], |R22|^2 by columns [C] of a QR of [x, one-hot y], k = min(n, d), and the rank of x.

    x = Q R11 and U'y follows from R12, so no factor with n rows is formed; the residual has no cancellation.
    Columns are sorted by norm: rounding then stays relative to each column, also in an SVD that keeps it so.
    """
    d, k = x.shape[1], min(x.shape)
    x = x / _positive(jnp.max(jnp.abs(x)))
    norms = jnp.linalg.norm(x, axis=0)
    order = jnp.argsort(-norms)
    r = jnp.linalg.qr(jnp.concatenate([x[:, order], one_hot], axis=1), mode="r")
    more_than_rounding = jnp.abs(r[:k, :d]) > ZERO * jnp.finfo(x.dtype).eps * norms[order]
    rank = jnp.sum(jnp.any(more_than_rounding, axis=1))
    return r[:k, :d], r[:k, d:], jnp.sum(r[k:, d:] ** 2, axis=0), rank


def _graded_svd(r11):
    """U and s with small relative errors for rows and columns of falling size: QR iteration, many times slower on CPU.

    The default elsewhere is of the Jacobi or QR kind already.
    """

    def qr_iteration(r):
        return jax.lax.linalg.svd(r, full_matrices=False, algorithm=jax.lax.linalg.SvdAlgorithm.QR)[:2]

    def default(r):
        return jax.lax.linalg.svd(r, full_matrices=False)[:2]

    return jax.lax.platform_dependent(r11, cpu=qr_iteration, default=default)


def _search(s, z, r0, power, n):
    """max over t of L(t) without its constant, [C], from s [k] relative to s_1, z [k, C], r0 [C] and |y|^2 [C]."""
    z2 = z**2

    def value_and_slope(log_t, weighted_sum):
        """L and 2 dL / dlog t at log_t [..., 1 or C]."""
        t = jnp.exp(log_t)[..., None]
        shrink = s**2 / (t + s**2)  # [..., 1 or C, k]
        keep = t / (t + s**2)
        q = r0 + weighted_sum(keep)
        slope = jnp.sum(shrink, axis=-1) - n * weighted_sum(keep * shrink) / q
        return -0.5 * jnp.sum(jnp.log1p(s**2 / t), axis=-1) - 0.5 * n * jnp.log(q / n), slope

    grid = jnp.asarray(GRID, s.dtype)
    value, slope = value_and_slope(grid[:, None], lambda a: a[:, 0] @ z2)  # [g, C]
    is_maximum = (slope[:-1] > 0) & (slope[1:] <= 0)
    height = jnp.where(is_maximum, jnp.maximum(value[:-1], value[1:]), -jnp.inf)
    cell = jax.lax.top_k(height.T, NUM_MAXIMA)[1].T  # [m, C]

    def sum_by_class(a):
        return jnp.sum(a * z2.T, axis=-1)

    def halve(_, bounds):
        left, right = bounds
        middle = (left + right) / 2
        rising = value_and_slope(middle, sum_by_class)[1] > 0
        return jnp.where(rising, middle, left), jnp.where(rising, right, middle)

    left, right = jax.lax.fori_loop(0, BISECTIONS, halve, (grid[cell], grid[cell + 1]))
    refined = jnp.max(value_and_slope((left + right) / 2, sum_by_class)[0], axis=0)
    limit = -0.5 * n * jnp.log(power / n)  # t -> inf
    return jnp.maximum(jnp.maximum(refined, jnp.max(value, axis=0)), limit)


def _positive(value):
    """value, or 1 where it is 0: a safe divisor that lets NaN through."""
    return jnp.where(value == 0, 1, value)
