"""Gaussian mixtures with full covariances by EM, from a k-means start, as scikit-learn's GaussianMixture fits them.

What float32 needs, where components have fewer samples than dimensions and only the regularisation (1e-6) keeps their
covariances positive: a covariance C is factored twice (shifted CholeskyQR: Fukaya et al., SIAM J. Sci. Comput. 2020). With
the samples D of a component, centred and weighted, L1 is the factor of D D' + a shift above rounding; the covariance of
L1^-1 D, where directions of small variance are large, gives L2; and C = L1 L2 L2' L1' holds to rounding in each direction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jax_transfer.numerics import positive

REG = 1e-6  # added to the variances, in the unit of the features squared: scikit-learn's reg_covar
BLOCK = {"cpu": 2**20, "default": 2**26}  # floats of [components, p, n] held at once; 2**20 stays in a CPU's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """A fitted Gaussian mixture; (x - means[k]) @ precision_cholesky[k] is white.

    log_likelihood: mean over samples, in nats, of this mixture; converged: it rose by less than the tolerance at last.
    A component without samples has weight 0.
    """

    weights: Float[Array, "k"]
    means: Float[Array, "k p"]
    precision_cholesky: Float[Array, "k p p"]
    log_likelihood: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]

    @property
    def covariances(self) -> Float[Array, "k p p"]:
        factor = jnp.linalg.inv(self.precision_cholesky)
        return factor.mT @ factor


@functools.partial(jax.jit, static_argnames="k")
def fit_mixture(
    x: Float[Array, "n p"],
    k: int,
    key: Key[Array, ""],
    *,
    start: Mixture | None = None,
    dimension: Int[Array, ""] | None = None,
    active: Int[Array, ""] | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Mixture:
    """Gaussian mixture with k full covariances by EM, from k-means or from `start`.

    Args:
      x: samples, in any unit.
      k: number of components, static.
      key: of the k-means++ start; not used with `start`.
      start: a mixture to start from; only weights, means and precision_cholesky are read.
      dimension: columns from this one on are padding, zero: they change neither posteriors nor likelihood, and have unit
        variance in the result. None: no padding.
      active: components from this one on stay without samples. None: all are used.
      max_iterations, tolerance: stop when the mean log-likelihood changed by less than the tolerance, in nats.
    """
    dimension = x.shape[1] if dimension is None else dimension
    real = jnp.arange(x.shape[1]) < dimension
    mean = jnp.mean(x, axis=0)
    largest = positive(jnp.max(jnp.abs(x - mean)))  # its square may overflow
    unit = largest * positive(jnp.max(jnp.std((x - mean) / largest, axis=0)))
    xt = ((x - mean) / unit).T  # [p, n]: sums over p run along n, which vectorises
    reg = jnp.where(real, jnp.minimum(REG / unit / unit, 1e30), 1)
    with jax.default_matmul_precision("float32"):
        if start is None:  # one M-step, from hard assignments, comes before the first iteration
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

        def iterate(state):
            parameters, posteriors, likelihood, before, iterations, _ = state
            converged = jnp.abs(likelihood - before) < tolerance
            parameters, joint = _update(posteriors, xt, parameters, reg, real)
            after, posteriors = _posteriors(joint)
            return parameters, posteriors, after, likelihood, iterations + 1, converged

        state = (
            parameters,
            posteriors,
            likelihood,
            jnp.array(jnp.inf, x.dtype),
            jnp.array(iterations),
            jnp.array(False),
        )
        state = jax.lax.while_loop(lambda state: ~state[5] & (state[4] < max_iterations), iterate, state)
    (weights, means, factors), _, likelihood, _, iterations, converged = state
    likelihood = likelihood - dimension * jnp.log(unit)
    factors = factors / jnp.where(real, unit, 1)[:, None]
    return Mixture(weights, mean + unit * means, factors, likelihood, iterations, converged)


@jax.jit
def responsibilities(x: Float[Array, "n p"], mixture: Mixture) -> Float[Array, "n k"]:
    """Posterior probability of each component for each sample; rows sum to 1."""
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
    dimension: Int[Array, ""] | None = None,
    active: Int[Array, ""] | None = None,
    max_iterations: int = 100,
) -> tuple[Float[Array, "k p"], Int[Array, "n"]]:
    """Centres and the nearest centre of each sample: Lloyd's iterations from a greedy k-means++ start.

    The start is that of scikit-learn (2 + floor(log k) candidates a centre), and so is the stop: centres that moved by less
    than 1e-4 of the mean variance, squared. A centre that loses its samples stays where it is. `dimension`, `active` as in
    `fit_mixture`. Arthur and Vassilvitskii, SODA 2007.
    """
    n, p = x.shape
    active = k if active is None else active
    squares = jnp.sum(x**2, axis=1)

    def distances(centres):  # [k, n]
        return jnp.maximum(jnp.sum(centres**2, axis=1)[:, None] - 2 * centres @ x.T + squares, 0)

    trials = 2 + int(np.log(k))
    is_trial = jnp.arange(trials) < 2 + jnp.floor(jnp.log(active)).astype(int)

    def add_centre(nearest, index):
        total = jnp.cumsum(nearest)
        draws = jax.random.uniform(jax.random.fold_in(key, index), (trials,), x.dtype) * total[-1]
        candidates = jnp.minimum(jnp.searchsorted(total, draws), n - 1)
        closer = jnp.minimum(nearest, distances(x[candidates]))
        best = jnp.argmin(jnp.where(is_trial, jnp.sum(closer, axis=1), jnp.inf))
        return closer[best], candidates[best]

    first = jax.random.randint(jax.random.fold_in(key, 0), (), 0, n)
    _, others = jax.lax.scan(add_centre, distances(x[first][None])[0], jnp.arange(1, k))
    centres = x[jnp.concatenate([first[None], others.astype(first.dtype)])]
    is_active = jnp.arange(k)[:, None] < active

    def assign(centres):
        return jnp.argmin(jnp.where(is_active, distances(centres), jnp.inf), axis=0)

    still = 1e-4 * jnp.sum(jnp.var(x, axis=0)) / (p if dimension is None else dimension)

    def move(state):
        centres, nearest, steps, _ = state
        members = jax.nn.one_hot(nearest, k, dtype=x.dtype, axis=0)
        counts = jnp.sum(members, axis=1)[:, None]
        moved = jnp.where(counts > 0, members @ x / jnp.maximum(counts, 1), centres)
        return moved, assign(moved), steps + 1, jnp.sum((moved - centres) ** 2) <= still

    state = (centres, assign(centres), 0, jnp.array(False))
    centres, nearest, _, _ = jax.lax.while_loop(lambda state: ~state[3] & (state[2] < max_iterations), move, state)
    return centres, nearest


def _posteriors(joint):
    """Mean log-likelihood, and the posteriors [k, n], of log weight + log density [k, n]."""
    log_density = jax.nn.logsumexp(joint, axis=0)
    return jnp.mean(log_density), jnp.exp(joint - log_density)


def _log_joint(xt, parameters, dimension):
    """log weight + log density of each component at each sample, [k, n]."""

    def block(parameters):
        weights, means, factors = parameters
        white = jnp.einsum("bij,bin->bjn", factors, xt - means[:, :, None])
        return _joint(weights, factors, white, dimension)

    return _over_components(block, parameters, xt.size)


def _joint(weights, factors, white, dimension):
    log_volume = jnp.sum(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)), axis=1)
    constant = jnp.log(weights) + log_volume - 0.5 * dimension * np.log(2 * np.pi)
    return jnp.where(weights[:, None] > 0, constant[:, None] - 0.5 * jnp.sum(white**2, axis=1), -jnp.inf)


def _update(posteriors, xt, parameters, reg, real):
    """M-step: the parameters for posteriors [k, n], and log weight + log density under them, [k, n].

    A component without samples gets weight 0 and keeps its mean and covariance.
    """
    p, n = xt.shape
    eps, dimension = jnp.finfo(xt.dtype).eps, jnp.sum(real)
    identity = jnp.eye(p, dtype=xt.dtype)

    def block(inputs):
        posteriors, (_, means, factors) = inputs
        counts = jnp.sum(posteriors, axis=1)
        alive = counts > 10 * eps
        weights = jnp.where(alive, counts / n, 0)
        share = posteriors / jnp.where(alive, counts, 1)[:, None]
        means = jnp.where(alive[:, None], share @ xt.T, means)
        moments = ((share[:, None] * xt).reshape(-1, n) @ xt.T).reshape(-1, p, p)  # one large product; it cancels
        covariance = moments - jnp.where(alive[:, None, None], means[:, :, None] * means[:, None, :], 0)
        shift = 10 * eps * jnp.trace(moments, axis1=1, axis2=2)[:, None] * real
        inverse = _inverse_factor(covariance + (reg + shift)[:, :, None] * identity)
        # In samples that are all but equal the error of the difference may exceed the shift; at worst it is n times as large.
        inverse = jax.lax.cond(
            jnp.any(jnp.isnan(inverse)),
            lambda: _where_finite(inverse, _inverse_factor(covariance + (reg + n * shift)[:, :, None] * identity)),
            lambda: inverse,
        )
        white = inverse @ (xt - means[:, :, None])
        # What the shift hid: here the covariance is at most 1, and rounding stays below 4 sqrt(p) eps.
        remainder = (white * share[:, None]) @ white.mT + (inverse * reg) @ inverse.mT
        correction = _inverse_factor(remainder + (4 * jnp.sqrt(dimension) * eps * real)[:, None] * identity)
        factors = jnp.where(alive[:, None, None], (correction @ inverse).mT, factors)
        return (weights, means, factors), _joint(weights, factors, correction @ white, dimension)

    return _over_components(block, (posteriors, parameters), xt.size)


def _where_finite(matrices, others):
    """Each matrix that holds no NaN, and another one in place of each that does, [b, p, p]."""
    return jnp.where(jnp.any(jnp.isnan(matrices), axis=(1, 2), keepdims=True), others, matrices)


def _inverse_factor(matrices):
    """L^-1 of L L' = matrix, [b, p, p]."""
    factors = jax.lax.linalg.cholesky(matrices)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    return jax.lax.linalg.triangular_solve(factors, identity, left_side=True, lower=True)


def _over_components(function, inputs, size):
    """function on blocks of components, one after the other; `size` floats a component are held at once."""

    def in_blocks(inputs, limit):
        k = len(jax.tree.leaves(inputs)[0])
        block = max(b for b in range(1, k + 1) if k % b == 0 and (b == 1 or b * size <= limit))
        blocks = jax.tree.map(lambda leaf: leaf.reshape(k // block, block, *leaf.shape[1:]), inputs)
        results = jax.lax.map(function, blocks)
        return jax.tree.map(lambda leaf: leaf.reshape(k, *leaf.shape[2:]), results)

    run = {platform: functools.partial(in_blocks, limit=limit) for platform, limit in BLOCK.items()}
    return jax.lax.platform_dependent(inputs, **run)
