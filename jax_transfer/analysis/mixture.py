"""Fits Gaussian mixtures with full covariances by EM from a k-means start, like scikit-learn's GaussianMixture.

If a component has fewer samples than dimensions, only the regularisation (1e-6) keeps its covariance positive definite.
In float32 this requires factorising the covariance C twice (shifted CholeskyQR: Fukaya et al., SIAM J. Sci. Comput.
2020). Let D be the centred and weighted samples of a component. L1 is the Cholesky factor of D D' plus a shift that is
larger than the rounding error. L2 is the Cholesky factor of the covariance of L1^-1 D, in which directions of small
variance have been scaled up. Then C = L1 L2 L2' L1' is accurate up to rounding in every direction.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jax_transfer.numerics import positive

REG = 1e-6  # added to the variances, in squared units of the features, like scikit-learn's reg_covar
# Maximum number of floats [components, p, n] in memory at once; 2**20 fit in a CPU's cache.
BLOCK = {"cpu": 2**20, "default": 2**26}

# weights, means and precision Cholesky factors, as in Mixture
Parameters = tuple[Float[Array, "k"], Float[Array, "k p"], Float[Array, "k p p"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """A fitted Gaussian mixture of k components in p dimensions.

    Attributes:
      weights: weights of the components, which sum to 1; 0 for a component without samples.
      means: means of the components.
      precision_cholesky: factors of the precision matrices: (x - means[k]) @ precision_cholesky[k] is white.
      log_likelihood: mean log-likelihood of the samples, in nats.
      iterations: number of EM iterations performed.
      converged: whether the last iteration changed the log-likelihood by less than the tolerance.
    """

    weights: Float[Array, "k"]
    means: Float[Array, "k p"]
    precision_cholesky: Float[Array, "k p p"]
    log_likelihood: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames="k")
def fit_mixture(
    x: Float[Array, "n p"],
    k: int,
    key: Key[Array, ""],
    *,
    start: Mixture | None = None,
    dimension: Int[Array, ""] | int | None = None,
    active: Int[Array, ""] | int | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Mixture:
    """Fits a Gaussian mixture with k full covariances by EM, starting from k-means or from `start`.

    Args:
      x: samples, on any scale.
      k: number of components, static.
      key: random key of the k-means++ start; ignored if `start` is given.
      start: a mixture to start from; only its weights, means and precision_cholesky are used.
      dimension: number of real columns. The remaining columns are padding and must be 0; they affect neither the
        posteriors nor the likelihood, and have unit variance in the result. None: no padding.
      active: number of components to use; the remaining ones get no samples. None: all k.
      max_iterations: maximum number of EM iterations.
      tolerance: EM stops when the mean log-likelihood changes by less than this, in nats.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
      >>> mixture = fit_mixture(x, 2, jax.random.key(0))
      >>> [round(float(mean), 2) for mean in jnp.sort(mixture.means[:, 0])], bool(mixture.converged)
      ([0.1, 5.1], True)
    """
    dimension = x.shape[1] if dimension is None else dimension
    real = jnp.arange(x.shape[1]) < dimension
    mean = jnp.mean(x, axis=0)
    largest = positive(jnp.max(jnp.abs(x - mean)))  # scaled first, since the squares of large deviations would overflow
    unit = largest * positive(jnp.max(jnp.std((x - mean) / largest, axis=0)))
    xt = ((x - mean) / unit).T  # [p, n], so that sums over p vectorise along n
    reg = jnp.where(real, jnp.minimum(REG / unit / unit, 1e30), 1)
    with jax.default_matmul_precision("float32"):
        if start is None:  # iteration -1 is the M-step from the hard assignments of k-means
            centres, nearest = k_means(xt.T, k, key, dimension=dimension, active=active)
            identity = jnp.broadcast_to(jnp.eye(len(xt), dtype=x.dtype), (k, len(xt), len(xt)))
            parameters = (jnp.zeros(k, x.dtype), centres, identity)
            posteriors = jax.nn.one_hot(nearest, k, dtype=x.dtype, axis=0)
            likelihood, iterations = jnp.array(-jnp.inf, x.dtype), -1
        else:
            scale = jnp.where(real, unit, 1)[:, None]
            parameters = (start.weights, (start.means - mean) / unit, scale * start.precision_cholesky)
            likelihood, posteriors = _posteriors(_log_joint(xt, parameters, dimension))
            iterations = 0

        def em_iteration(state):
            """Performs an M-step and an E-step; `converged` compares the likelihoods of the last two iterations."""
            parameters, posteriors, likelihood, previous_likelihood, iterations, _ = state
            converged = jnp.abs(likelihood - previous_likelihood) < tolerance
            parameters, joint = _update(posteriors, xt, parameters, reg, real)
            new_likelihood, posteriors = _posteriors(joint)
            return parameters, posteriors, new_likelihood, likelihood, iterations + 1, converged

        state = (
            parameters,
            posteriors,
            likelihood,
            jnp.array(jnp.inf, x.dtype),
            jnp.array(iterations),
            jnp.array(False),
        )
        state = jax.lax.while_loop(lambda state: ~state[5] & (state[4] < max_iterations), em_iteration, state)
    (weights, means, factors), _, likelihood, _, iterations, converged = state
    likelihood = likelihood - dimension * jnp.log(unit)
    factors = factors / jnp.where(real, unit, 1)[:, None]
    return Mixture(weights, mean + unit * means, factors, likelihood, iterations, converged)


@jax.jit
def responsibilities(x: Float[Array, "n p"], mixture: Mixture) -> Float[Array, "n k"]:
    """Computes the posterior probability of each component for each sample; rows sum to 1.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
      >>> posteriors = responsibilities(x, fit_mixture(x, 2, jax.random.key(0)))
      >>> posteriors.shape, bool(jnp.argmax(posteriors[0]) != jnp.argmax(posteriors[-1]))
      ((6, 2), True)
    """
    centre = mixture.weights @ mixture.means
    parameters = (mixture.weights, mixture.means - centre, mixture.precision_cholesky)
    with jax.default_matmul_precision("float32"):
        return _posteriors(_log_joint((x - centre).T, parameters, x.shape[1]))[1].T


@functools.partial(jax.jit, static_argnames="k")
def k_means(
    x: Float[Array, "n p"],
    k: int,
    key: Key[Array, ""],
    *,
    dimension: Int[Array, ""] | int | None = None,
    active: Int[Array, ""] | int | None = None,
    max_iterations: int = 100,
) -> tuple[Float[Array, "k p"], Int[Array, "n"]]:
    """Clusters samples by Lloyd's iterations from a greedy k-means++ start (Arthur and Vassilvitskii, SODA 2007).

    As in scikit-learn, 2 + floor(log k) candidates are drawn for each centre, and the iterations stop when the squared
    distance that the centres move is at most 1e-4 of the mean variance. A centre without samples does not move.

    Args:
      x: samples.
      k: number of clusters, static.
      key: random key of the start.
      dimension: number of real columns, as in `fit_mixture`.
      active: number of clusters to use, as in `fit_mixture`.
      max_iterations: maximum number of Lloyd's iterations.

    Returns:
      (centres [k, p], index of the nearest centre of each sample [n]).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> centres, nearest = k_means(jnp.array([[0.0], [0.2], [5.0], [5.2]]), 2, jax.random.key(0))
      >>> sorted(round(float(centre), 1) for centre in centres[:, 0]), bool(nearest[0] == nearest[1])
      ([0.1, 5.1], True)
    """
    n, p = x.shape
    active = k if active is None else active
    squares = jnp.sum(x**2, axis=1)

    def squared_distances(centres: Float[Array, "m p"]) -> Float[Array, "m n"]:
        return jnp.maximum(jnp.sum(centres**2, axis=1)[:, None] - 2 * centres @ x.T + squares, 0)

    trials = 2 + int(np.log(k))
    is_trial = jnp.arange(trials) < 2 + jnp.floor(jnp.log(active)).astype(int)

    def add_centre(nearest: Float[Array, "n"], index: Int[Array, ""]) -> tuple[Float[Array, "n"], Int[Array, ""]]:
        """Draws the next centre; `nearest` holds each sample's squared distance to the nearest centre so far."""
        cumulative = jnp.cumsum(nearest)
        draws = jax.random.uniform(jax.random.fold_in(key, index), (trials,), x.dtype) * cumulative[-1]
        candidates = jnp.minimum(jnp.searchsorted(cumulative, draws), n - 1)
        reduced = jnp.minimum(nearest, squared_distances(x[candidates]))
        best = jnp.argmin(jnp.where(is_trial, jnp.sum(reduced, axis=1), jnp.inf))
        return reduced[best], candidates[best]

    first = jax.random.randint(jax.random.fold_in(key, 0), (), 0, n)
    _, others = jax.lax.scan(add_centre, squared_distances(x[first][None])[0], jnp.arange(1, k))
    centres = x[jnp.concatenate([first[None], others.astype(first.dtype)])]
    is_active = jnp.arange(k)[:, None] < active

    def assign(centres: Float[Array, "k p"]) -> Int[Array, "n"]:
        return jnp.argmin(jnp.where(is_active, squared_distances(centres), jnp.inf), axis=0)

    tolerance = 1e-4 * jnp.sum(jnp.var(x, axis=0)) / (p if dimension is None else dimension)

    def lloyd_iteration(state):
        centres, nearest, steps, _ = state
        members = jax.nn.one_hot(nearest, k, dtype=x.dtype, axis=0)
        counts = jnp.sum(members, axis=1)[:, None]
        updated = jnp.where(counts > 0, members @ x / jnp.maximum(counts, 1), centres)
        return updated, assign(updated), steps + 1, jnp.sum((updated - centres) ** 2) <= tolerance

    state = (centres, assign(centres), 0, jnp.array(False))
    centres, nearest, _, _ = jax.lax.while_loop(
        lambda state: ~state[3] & (state[2] < max_iterations), lloyd_iteration, state
    )
    return centres, nearest


def _posteriors(joint: Float[Array, "k n"]) -> tuple[Float[Array, ""], Float[Array, "k n"]]:
    """Returns the mean log-likelihood and the posteriors; `joint` is log weight + log density."""
    log_density = jax.nn.logsumexp(joint, axis=0)
    return jnp.mean(log_density), jnp.exp(joint - log_density)


def _log_joint(xt: Float[Array, "p n"], parameters: Parameters, dimension: Int[Array, ""] | int) -> Float[Array, "k n"]:
    """Computes log weight + log density of each component at each sample."""

    def block(parameters: Parameters) -> Float[Array, "b n"]:
        weights, means, factors = parameters
        white = jnp.einsum("bij,bin->bjn", factors, xt - means[:, :, None])
        return _joint(weights, factors, white, dimension)

    return _over_components(block, parameters, xt.size)


def _joint(
    weights: Float[Array, "b"],
    factors: Float[Array, "b p p"],
    white: Float[Array, "b p n"],
    dimension: Int[Array, ""] | int,
) -> Float[Array, "b n"]:
    """Computes log weight + log density from whitened samples; -inf for a component of weight 0."""
    log_volume = jnp.sum(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)), axis=1)
    constant = jnp.log(weights) + log_volume - 0.5 * dimension * np.log(2 * np.pi)
    return jnp.where(weights[:, None] > 0, constant[:, None] - 0.5 * jnp.sum(white**2, axis=1), -jnp.inf)


def _update(
    posteriors: Float[Array, "k n"],
    xt: Float[Array, "p n"],
    parameters: Parameters,
    reg: Float[Array, "p"],
    real: Bool[Array, "p"],
) -> tuple[Parameters, Float[Array, "k n"]]:
    """Performs the M-step: returns the new parameters and the log weight + log density computed with them.

    A component without samples gets weight 0 and keeps its mean and covariance.

    Args:
      posteriors: responsibilities of the components.
      xt: samples, transposed.
      parameters: parameters of the previous step.
      reg: regularisation added to the variance of each column.
      real: True for columns that are not padding.
    """
    p, n = xt.shape
    eps, dimension = jnp.finfo(xt.dtype).eps, jnp.sum(real)
    identity = jnp.eye(p, dtype=xt.dtype)

    def block(inputs: tuple[Float[Array, "b n"], Parameters]) -> tuple[Parameters, Float[Array, "b n"]]:
        posteriors, (_, means, factors) = inputs
        counts = jnp.sum(posteriors, axis=1)
        alive = counts > 10 * eps
        weights = jnp.where(alive, counts / n, 0)
        share = posteriors / jnp.where(alive, counts, 1)[:, None]
        means = jnp.where(alive[:, None], share @ xt.T, means)
        # One large product; the shift allows for cancellation in the subtraction below.
        moments = ((share[:, None] * xt).reshape(-1, n) @ xt.T).reshape(-1, p, p)
        covariance = moments - jnp.where(alive[:, None, None], means[:, :, None] * means[:, None, :], 0)
        shift = 10 * eps * jnp.trace(moments, axis1=1, axis2=2)[:, None] * real
        inverse = _inverse_factor(covariance + (reg + shift)[:, :, None] * identity)
        # If the samples are nearly equal, the error of the subtraction can exceed the shift, by at most a factor of n.
        inverse = jax.lax.cond(
            jnp.any(jnp.isnan(inverse)),
            lambda: _where_finite(inverse, _inverse_factor(covariance + (reg + n * shift)[:, :, None] * identity)),
            lambda: inverse,
        )
        white = inverse @ (xt - means[:, :, None])
        # The second factor undoes the shift. The whitened covariance is at most 1; its error is below 4 sqrt(p) eps.
        remainder = (white * share[:, None]) @ white.mT + (inverse * reg) @ inverse.mT
        correction = _inverse_factor(remainder + (4 * jnp.sqrt(dimension) * eps * real)[:, None] * identity)
        factors = jnp.where(alive[:, None, None], (correction @ inverse).mT, factors)
        return (weights, means, factors), _joint(weights, factors, correction @ white, dimension)

    return _over_components(block, (posteriors, parameters), xt.size)


def _where_finite(matrices: Float[Array, "b p p"], others: Float[Array, "b p p"]) -> Float[Array, "b p p"]:
    """Replaces every matrix that contains NaN with the corresponding matrix in `others`."""
    return jnp.where(jnp.any(jnp.isnan(matrices), axis=(1, 2), keepdims=True), others, matrices)


def _inverse_factor(matrices: Float[Array, "b p p"]) -> Float[Array, "b p p"]:
    """Returns L^-1 for the Cholesky factorisation L L' of each matrix."""
    factors = jax.lax.linalg.cholesky(matrices)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    return jax.lax.linalg.triangular_solve(factors, identity, left_side=True, lower=True)


def _over_components(function: Callable, inputs, size: int):
    """Applies `function` to one block of components at a time, to limit memory; a component takes `size` floats."""

    def in_blocks(inputs, limit: int):
        k = len(jax.tree.leaves(inputs)[0])
        block = max(b for b in range(1, k + 1) if k % b == 0 and (b == 1 or b * size <= limit))
        blocks = jax.tree.map(lambda leaf: leaf.reshape(k // block, block, *leaf.shape[1:]), inputs)
        results = jax.lax.map(function, blocks)
        return jax.tree.map(lambda leaf: leaf.reshape(k, *leaf.shape[2:]), results)

    run = {platform: functools.partial(in_blocks, limit=limit) for platform, limit in BLOCK.items()}
    return jax.lax.platform_dependent(inputs, **run)
