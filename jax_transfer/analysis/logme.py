"""LogME: the maximised evidence of a Bayesian linear model on the features (You et al., ICML 2021).

Consider one class with 0/1 targets y [n], features x = U diag(s) V' [n, d], prior precision a and noise precision b.
The log evidence (equation 2 of the paper) depends on x only through s and z = U'y. The paper maximises it by iterating

    a <- gamma / m'm,   b <- (n - gamma) / |y - x m|^2,   from a = b = 1,

where m is the posterior mean, gamma = sum_i s_i^2 / (s_i^2 + t) and t = a / b. The iterates depend on t alone. At a
fixed point, b is optimal for t, and the evidence is

    L(t) = -1/2 sum_i log(1 + s_i^2 / t) - n/2 log(Q(t) / n) - n/2 (1 + log 2 pi),
    Q(t) = r0 + sum_i z_i^2 t / (t + s_i^2),      r0 = |y - U z|^2.

Each step changes log t in the direction in which L increases, so the iteration climbs from t = 1 to the nearest
stationary point of L. Where L is flat, this takes thousands of steps. This implementation moves in the same direction
by at least MIN_STEP at a time and, once it has passed the stationary point, bisects the last step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, scored
from jax_transfer.analysis.hscore import ROUNDING
from jax_transfer.numerics import positive

MIN_LOG_T, MAX_LOG_T = -70.0, 36.0  # bounds of log(t / s_1^2), beyond which L equals its limit up to rounding
MIN_STEP = 1 / 16  # minimum step of log t; two stationary points that are closer together may be skipped
BISECTIONS = 24  # halvings of the last step (at most 80): log t is accurate to 1e-5, which changes L by about 1e-10
SMALL = 1000  # a divide-and-conquer SVD loses relative accuracy in singular values below SMALL * eps * s_1


def logme(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes LogME: the maximised log evidence per sample, in nats, averaged over the classes that occur.

    See the module docstring for the formula (You et al., "LogME: Practical Assessment of Pre-trained Models for
    Transfer Learning", ICML 2021, equation 2 and algorithm 1). Higher is better.

    Args:
      x: features. They are neither centred nor rescaled, and the linear model has no bias.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of x's dtype; NaN if a feature is not finite. Each class contributes the evidence at the limit of the
      paper's iteration from a = b = 1. For t -> inf (no feature helps), this is the evidence of pure noise with the
      power n_c / n; for t -> 0 (n directions interpolate the targets), it is the evidence without noise. The scale of x
      determines where the iteration starts, but it changes the score only if the evidence has several maxima, which can
      happen if d >= n and the features have different scales. If fewer than n directions fit a class exactly, the
      evidence is unbounded: the residual is then taken to be rounding error (ROUNDING * eps relative to the labels),
      and the score is a large finite number that depends on the dtype.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [-0.1, 0.9]])
      >>> informative, shuffled = logme(x, jnp.array([0, 0, 1, 1]), 2), logme(x, jnp.array([0, 1, 0, 1]), 2)
      >>> round(float(informative), 2), round(float(shuffled), 2)
      (-0.34, -1.06)
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    return scored(functools.partial(_logme, num_classes=num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _logme(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    one_hot = jax.nn.one_hot(y, num_classes, dtype=x.dtype)
    with jax.default_matmul_precision("float32"):
        evidence = _evidence(x, one_hot)
    occurs = jnp.any(one_hot > 0, axis=0)
    return jnp.sum(jnp.where(occurs, evidence, 0)) / jnp.sum(occurs) / x.shape[0]


# Sequential: QR and SVD process a batch one matrix at a time anyway, and lax.cond then runs only one of the branches.
@jax.custom_batching.sequential_vmap
def _evidence(x: Float[Array, "n d"], one_hot: Float[Array, "n c"]) -> Float[Array, "c"]:
    """Returns L at the fixed point of each class; the value of a class without samples is arbitrary."""
    n, eps = x.shape[0], jnp.finfo(x.dtype).eps
    scale = positive(jnp.max(jnp.abs(x)))
    r11, r12, r0, rank = _triangle(x / scale, one_hot)
    counts = jnp.sum(one_hot, axis=0)  # |y|^2
    r0 = jnp.maximum(r0, (ROUNDING * eps) ** 2 * positive(counts))

    def evidence_and_lowest_log_t(
        u: Float[Array, "k k"], s: Float[Array, "k"], threshold: float | np.floating
    ) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Returns L and the lowest log(t / s_1^2) visited, given an SVD of R11; s_i <= `threshold` s_1 counts as 0."""
        start = jnp.clip(-2 * (jnp.log(positive(s[0])) + jnp.log(scale)), MIN_LOG_T, MAX_LOG_T)
        s = s / positive(s[0])
        s = jnp.where(s > threshold, s, 0)
        value, log_t = _fixed_point(s, (u.T @ r12).T ** 2, r0, n, start)
        return value, jnp.minimum(log_t, start)

    u, s, _ = jnp.linalg.svd(r11, full_matrices=False)
    evidence, lowest_log_t = evidence_and_lowest_log_t(u, s, ROUNDING * eps)
    # Inaccurate small singular values matter only if t has become as small as the squares of these values.
    has_small = jnp.any((s < SMALL * eps * s[0]) & (jnp.arange(s.shape[0]) < rank))
    needs_accurate_svd = has_small & jnp.any((lowest_log_t < 2 * jnp.log(SMALL * eps)) & (counts > 0))
    return jax.lax.cond(
        needs_accurate_svd,
        lambda: evidence_and_lowest_log_t(*_accurate_svd(r11), 1e-15)[0],  # the square of 1e-15 does not underflow
        lambda: evidence,
    )


def _triangle(
    x: Float[Array, "n d"], one_hot: Float[Array, "n c"]
) -> tuple[Float[Array, "k d"], Float[Array, "k c"], Float[Array, "c"], Int[Array, ""]]:
    """Returns R11, R12, the column sums of R22^2 and the rank of x, from a QR of [x, one_hot]; k = min(n, d).

    Since x = Q R11 and U'y follows from R12, no factor with n rows is needed, and the residual, obtained from R22, does
    not suffer from cancellation. The columns of x are sorted by norm, which keeps rounding errors relative to each
    column.
    """
    d, k = x.shape[1], min(x.shape)
    norms = jnp.linalg.norm(x, axis=0)
    order = jnp.argsort(-norms)
    r = jnp.linalg.qr(jnp.concatenate([x[:, order], one_hot], axis=1), mode="r")
    is_significant = jnp.abs(r[:k, :d]) > ROUNDING * jnp.finfo(x.dtype).eps * norms[order]
    rank = jnp.sum(jnp.any(is_significant, axis=1))
    return r[:k, :d], r[:k, d:], jnp.sum(r[k:, d:] ** 2, axis=0), rank


def _accurate_svd(r11: Float[Array, "k d"]) -> tuple[Float[Array, "k k"], Float[Array, "k"]]:
    """Returns U and s with a small relative error in every s_i; the rows and columns of r11 have decreasing norms.

    On a CPU this requires QR iteration, which is many times slower than divide and conquer. On other devices, the
    default algorithm (Jacobi or QR) is accurate enough.
    """

    def qr_iteration(r: Float[Array, "k d"]) -> tuple[Float[Array, "k k"], Float[Array, "k"]]:
        u, s, _ = jax.lax.linalg.svd(r, full_matrices=False, algorithm=jax.lax.linalg.SvdAlgorithm.QR)
        return u, s

    def default(r: Float[Array, "k d"]) -> tuple[Float[Array, "k k"], Float[Array, "k"]]:
        u, s, _ = jax.lax.linalg.svd(r, full_matrices=False)
        return u, s

    return jax.lax.platform_dependent(r11, cpu=qr_iteration, default=default)


def _fixed_point(
    s: Float[Array, "k"], z2: Float[Array, "c k"], r0: Float[Array, "c"], n: int, start: Float[Array, ""]
) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Returns L and log t at the fixed point reached from log t = start.

    Args:
      s: singular values divided by the largest one, s_1; t is in units of s_1^2.
      z2: squared entries of z = U'y, for each class.
      r0: squared norm of the residual y - U z.
    """

    def paper_step(log_t: Float[Array, "c"]) -> tuple[Float[Array, "c"], Bool[Array, "c"]]:
        """Returns the step in log t of the paper's iteration, and whether L increases with t."""
        t = jnp.exp(log_t)[:, None]
        shrink, keep = s**2 / (t + s**2), t / (t + s**2)  # [C, k]
        gamma = jnp.sum(shrink, axis=1)
        residual = r0 + jnp.sum(z2 * keep**2, axis=1)
        t_mm = jnp.sum(z2 * keep * shrink, axis=1)  # t m'm
        n_minus_gamma = n - len(s) + jnp.sum(keep, axis=1)  # computed without cancellation
        increases = gamma * residual > n_minus_gamma * t_mm
        return jnp.log(gamma * residual) - jnp.log(n_minus_gamma * t_mm), increases

    log_t = jnp.full(r0.shape, start)
    upwards = paper_step(log_t)[1]

    def not_converged(log_t: Float[Array, "c"], increases: Bool[Array, "c"]) -> Bool[Array, "c"]:
        return (increases == upwards) & jnp.where(upwards, log_t < MAX_LOG_T, log_t > MIN_LOG_T)

    def update_log_t(state):
        """Moves the classes that have not converged; state: previous log t, log t, next step, whether L increases."""
        previous, log_t, length, increases = state
        active = not_converged(log_t, increases)
        length = jnp.fmax(jnp.abs(length), MIN_STEP)  # fmax ignores the NaN of 0 / 0, the step if all features are 0
        updated = jnp.clip(log_t + jnp.where(upwards, length, -length), MIN_LOG_T, MAX_LOG_T)
        previous, log_t = jnp.where(active, log_t, previous), jnp.where(active, updated, log_t)
        return previous, log_t, *paper_step(log_t)

    state = (log_t, log_t, *paper_step(log_t))
    previous, log_t, _, _ = jax.lax.while_loop(
        lambda state: jnp.any(not_converged(state[1], state[3])), update_log_t, state
    )

    def bisect(_, bounds: tuple[Float[Array, "c"], Float[Array, "c"]]) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        low, high = bounds
        middle = (low + high) / 2
        increases = paper_step(middle)[1]
        return jnp.where(increases, middle, low), jnp.where(increases, high, middle)

    bounds = jnp.minimum(previous, log_t), jnp.maximum(previous, log_t)
    log_t = jnp.asarray(sum(jax.lax.fori_loop(0, BISECTIONS, bisect, bounds)) / 2)
    t = jnp.exp(log_t)[:, None]
    q = r0 + jnp.sum(z2 * t / (t + s**2), axis=1)
    value = -0.5 * jnp.sum(jnp.log1p(s**2 / t), axis=1) - 0.5 * n * (jnp.log(q / n) + 1 + np.log(2 * np.pi))
    return value, log_t
