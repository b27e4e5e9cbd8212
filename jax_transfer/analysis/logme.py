"""LogME: the maximised evidence of a Bayesian linear model on the features (You et al., ICML 2021).

For one class with 0/1 targets y [n], features x = U diag(s) V' [n, d], prior precision a and noise precision b, the
log evidence (equation 2 of the paper) depends on x only through s and z = U'y. The paper maximises it by the iteration

    a <- gamma / m'm,   b <- (n - gamma) / |y - x m|^2,   from a = b = 1,

with m the posterior mean and gamma = sum_i s_i^2 / (s_i^2 + t), t = a / b. It is an iteration of t alone, and at its
fixed points the evidence is that of the best b at this t,

    L(t) = -1/2 sum_i log(1 + s_i^2 / t) - n/2 log(Q(t) / n) - n/2 (1 + log 2 pi),
    Q(t) = r0 + sum_i z_i^2 t / (t + s_i^2),      r0 = |y - U z|^2.

A step of log t has the sign of L'(t): the iteration climbs L from t = 1 to the nearest stationary point, which takes
thousands of steps where L is flat. Here a step is at least STEP long, and the last one is bisected.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, scored
from jax_transfer.numerics import positive

LOW, HIGH = -70.0, 36.0  # of log(t / s_1^2); further out L equals its limit to rounding
STEP = 1 / 16  # of log t; two stationary points closer than that may be passed over
BISECTIONS = 24  # of a step, which may be as long as 80: to 1e-5 in log t, where L is flat to 1e-10
ZERO = 8  # an entry of R below ZERO eps times its column's norm is rounding
TINY = 1000  # singular values below TINY eps s_1 have lost relative accuracy in a divide-and-conquer SVD


def logme(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Mean over the classes that occur of the maximised log evidence per sample, in nats. Higher is better.

    Args:
      x: features, as they are: not centred, not rescaled; there is no bias term.
      y: labels in [0, num_classes); a class without samples does not count.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype, NaN for features that are not finite. For each class it is the evidence at the limit of the
      paper's iteration from a = b = 1: t -> inf (no feature helps) gives that of pure noise of power n_c / n, t -> 0
      (n directions interpolate) that without noise. The unit of x sets where the iteration starts: the score changes
      with it only where the evidence has several maxima (features of several scales, d >= n).
      Where fewer than n directions fit a class exactly the evidence is unbounded: there the residual counts as rounding
      error (ZERO eps relative to the labels), which gives a large finite score that depends on the dtype.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels that are traced give NaN if they are out of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_logme, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _logme(x, y, num_classes):
    one_hot = jax.nn.one_hot(y, num_classes, dtype=x.dtype)
    with jax.default_matmul_precision("float32"):
        evidence = _evidence(x, one_hot)
    occurs = jnp.any(one_hot > 0, axis=0)
    return jnp.sum(jnp.where(occurs, evidence, 0)) / jnp.sum(occurs) / x.shape[0]


@jax.custom_batching.sequential_vmap  # QR and SVD run through a batch one by one anyway, and lax.cond stays a branch
def _evidence(x, one_hot):
    """L at the fixed point of each class, [C]; for a class without samples any number."""
    n, eps = x.shape[0], jnp.finfo(x.dtype).eps
    scale = positive(jnp.max(jnp.abs(x)))
    r11, r12, r0, rank = _triangle(x / scale, one_hot)
    counts = jnp.sum(one_hot, axis=0)  # |y|^2
    r0 = jnp.maximum(r0, (ZERO * eps) ** 2 * positive(counts))

    def climb(u, s, smallest):
        """L and the least log(t / s_1^2) on the way, for each class, from an SVD of R11."""
        start = jnp.clip(-2 * (jnp.log(positive(s[0])) + jnp.log(scale)), LOW, HIGH)
        s = s / positive(s[0])
        s = jnp.where(s > smallest, s, 0)
        value, log_t = _fixed_point(s, (u.T @ r12).T ** 2, r0, n, start)
        return value, jnp.minimum(log_t, start)

    u, s, _ = jnp.linalg.svd(r11, full_matrices=False)
    fast, lowest = climb(u, s, ZERO * eps)
    # Tiny singular values matter only if t is as tiny somewhere on the way.
    has_tiny = jnp.any((s < TINY * eps * s[0]) & (jnp.arange(s.shape[0]) < rank))
    doubtful = has_tiny & jnp.any((lowest < 2 * jnp.log(TINY * eps)) & (counts > 0))
    # The square of 1e-15 does not underflow.
    return jax.lax.cond(doubtful, lambda: climb(*_graded_svd(r11), 1e-15)[0], lambda: fast)


def _triangle(x, one_hot):
    """R11 [k, d], R12 [k, C], |R22|^2 by columns [C] of a QR of [x, one-hot y], k = min(n, d), and the rank of x.

    x = Q R11 and U'y follows from R12, so no factor with n rows is formed; the residual has no cancellation.
    Columns are sorted by norm: rounding then stays relative to each column, also in an SVD that keeps it so.
    """
    d, k = x.shape[1], min(x.shape)
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


def _fixed_point(s, z2, r0, n, start):
    """L [C] and log t [C] where the iteration from log t = start ends; s [k] and t relative to s_1, z^2 [C, k], r0 [C]."""

    def step(log_t):
        """The iteration's step of log t, and whether L rises there."""
        t = jnp.exp(log_t)[:, None]
        shrink, keep = s**2 / (t + s**2), t / (t + s**2)  # [C, k]
        gamma = jnp.sum(shrink, axis=1)
        residual = r0 + jnp.sum(z2 * keep**2, axis=1)
        t_mm = jnp.sum(z2 * keep * shrink, axis=1)  # t m'm
        noise = n - len(s) + jnp.sum(keep, axis=1)  # n - gamma without its cancellation
        rises = gamma * residual > noise * t_mm
        return jnp.log(gamma * residual) - jnp.log(noise * t_mm), rises

    log_t = jnp.full(r0.shape, start)
    upwards = step(log_t)[1]

    def on_the_way(log_t, rises):
        return (rises == upwards) & jnp.where(upwards, log_t < HIGH, log_t > LOW)

    def move(state):
        previous, log_t, length, rises = state
        active = on_the_way(log_t, rises)
        length = jnp.fmax(jnp.abs(length), STEP)  # fmax: 0 / 0 for features that are zero
        moved = jnp.clip(log_t + jnp.where(upwards, length, -length), LOW, HIGH)
        previous, log_t = jnp.where(active, log_t, previous), jnp.where(active, moved, log_t)
        return previous, log_t, *step(log_t)

    first = (log_t, log_t, *step(log_t))
    previous, log_t, _, _ = jax.lax.while_loop(lambda state: jnp.any(on_the_way(state[1], state[3])), move, first)

    def halve(_, bounds):
        left, right = bounds
        middle = (left + right) / 2
        rises = step(middle)[1]
        return jnp.where(rises, middle, left), jnp.where(rises, right, middle)

    bounds = jnp.minimum(previous, log_t), jnp.maximum(previous, log_t)
    log_t = sum(jax.lax.fori_loop(0, BISECTIONS, halve, bounds)) / 2
    t = jnp.exp(log_t)[:, None]
    q = r0 + jnp.sum(z2 * t / (t + s**2), axis=1)
    value = -0.5 * jnp.sum(jnp.log1p(s**2 / t), axis=1) - 0.5 * n * (jnp.log(q / n) + 1 + np.log(2 * np.pi))
    return value, log_t
