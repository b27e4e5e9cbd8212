"""N-LEEP: LEEP with the posteriors of a Gaussian mixture in place of a source classifier ("Ranking Neural Checkpoints", section 3).

`pca` reduces the features, `mixture.fit_mixture` fits and `mixture.responsibilities` evaluates the Gaussians, `leep` scores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer import flops
from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, as_seed, is_traced, scored
from jax_transfer.analysis.canonical import order_of_values
from jax_transfer.analysis.leep import leep_of_valid
from jax_transfer.analysis.mixture import fit_mixture, responsibilities
from jax_transfer.numerics import positive
from jax_transfer.records import InputError

# Features below this are 0 beside the variance of at least 1e-6 of each Gaussian, and their inverse scale is no float32.
NOTHING = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pca:
    """Centre [d], directions [d, m] as columns, variances [m] (over n - 1), m = min(n, d), and how many are kept."""

    mean: Float[Array, "d"]
    directions: Float[Array, "d m"]
    variances: Float[Array, "m"]
    dimension: Int[Array, ""]


def nleep(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    energy: float = 0.8,
    components_per_class: int = 5,
    seed: int = 0,
    max_dimension: int | None = None,
) -> Float[Array, ""]:
    """Mean log-likelihood of the labels given the mixture's posteriors, in nats, at most 0. Higher is better.

    Args:
      x: features.
      y: labels in [0, num_classes).
      num_classes: C, static.
      energy: share of the variance that PCA keeps, in (0, 1), static; the fewest components with more than that.
      components_per_class: Gaussians for each class that occurs (an empty class id adds none), static; the paper's is 5.
      seed: of the k-means++ start. The start depends on the set of samples and not on their order.
      max_dimension: keep at most so many principal components, static; None: as many as the energy asks for.

    Returns:
      A scalar of x's dtype. NaN if a feature is not finite, or under tracing if n is below the number of Gaussians.

    Raises:
      InputError: an argument has the wrong type, shape or range, or n is below the number of Gaussians and y is concrete.
        Labels that are traced give NaN if they are out of range.

    The number of principal components depends on the data, shapes must not. The kept components are therefore padded to the
    multiple of 8, in a way that changes no value. Under jit and vmap a branch is compiled for each of 8, 16, 32, ... up to
    min(n, d) or `max_dimension`, and the data choose the branch: the bound also limits the memory (components x width^2)
    and the time to compile. A vmapped call runs checkpoint by checkpoint: one is enough to
    keep the device busy, and each stops when it has converged.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    components_per_class = as_count(components_per_class, "components_per_class", least=1)
    if max_dimension is not None:
        max_dimension = as_count(max_dimension, "max_dimension", least=1)
    _check_energy(energy)
    seed = as_seed(seed)
    static = (num_classes, energy, components_per_class)
    largest = min(*x.shape, max_dimension or x.shape[1])
    if not is_traced(y):
        _check(x, y, components_per_class)
    if is_traced(x, y, seed):
        return scored(lambda x, y: _nleep_of_any_width(x, y, seed, largest, static), x, y, num_classes)
    x, y, reduced = _prepare(x, y, energy, largest)
    return _nleep_of_width(x, y, seed, reduced, _width(reduced, largest), static)


def nleep_gigaflops(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> float:
    """Floating point operations / 1e9 of `nleep(x, y, num_classes)`, its iterations included.

    Raises:
      InputError: as `nleep`.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))

    def at_its_width(x, y):
        prepared_x, prepared_y, reduced = _prepare(x, y, 0.8, min(x.shape))
        return _nleep_of_width(prepared_x, prepared_y, jnp.asarray(0), reduced, width, (num_classes, 0.8, 5))

    width = _width(_prepare(x, y, 0.8, min(x.shape))[2], min(x.shape))
    return flops.gigaflops(at_its_width, x, y)


def _width(reduced, largest):
    return min(-(-int(reduced.dimension) // 8) * 8, largest)


def _check(x, y, components_per_class):
    components = components_per_class * len(np.unique(np.asarray(y)))
    if x.shape[0] < components:
        raise InputError(
            f"x has {x.shape[0]} samples for {components} Gaussians ({components_per_class} for each class that occurs): "
            "expected at least as many samples; use more samples or a smaller components_per_class."
        )


def _nleep_of_any_width(x, y, seed, largest, static):
    widths = (*(2**i for i in range(3, 30) if 2**i < largest), largest)

    @jax.custom_batching.sequential_vmap  # keeps the branch a branch, and lets each checkpoint converge by itself
    def score(x, y, seed):
        x, y, reduced = _prepare(x, y, static[1], largest)
        branches = [functools.partial(_nleep_of_width, width=width, static=static) for width in widths]
        return jax.lax.switch(jnp.sum(reduced.dimension > jnp.array(widths)), branches, x, y, seed, reduced)

    return score(x, y, seed)


@functools.partial(jax.jit, static_argnames=("energy", "max_dimension"))
def _prepare(x, y, energy, max_dimension):
    """Samples in an order that depends on their values alone, scaled to at most 1, and their PCA in the unit of x."""
    order = order_of_values(x)
    x, y = x[order], y[order]
    unit = positive(jnp.max(jnp.abs(x)))
    x = jnp.where(unit < NOTHING, 0, x)
    reduced = principal_components(x / unit, energy)
    dimension = jnp.minimum(reduced.dimension, max_dimension)
    return x, y, Pca(reduced.mean * unit, reduced.directions, reduced.variances, dimension)


@functools.partial(jax.jit, static_argnames=("width", "static"))
def _nleep_of_width(x, y, seed, reduced, width, static):
    num_classes, _, components_per_class = static
    with jax.default_matmul_precision("float32"):
        scores = (x - reduced.mean) @ reduced.directions[:, :width]
    scores = jnp.where(jnp.arange(width) < reduced.dimension, scores, 0)
    occurring = jnp.sum(jnp.zeros(num_classes, bool).at[y].set(True))
    active = components_per_class * occurring
    k = components_per_class * num_classes
    mixture = fit_mixture(scores, k, jax.random.key(seed), dimension=reduced.dimension, active=active)
    value = leep_of_valid(responsibilities(scores, mixture), y, num_classes)
    return jnp.where(jnp.isfinite(mixture.log_likelihood) & (active <= len(y)), value, jnp.nan)


def _check_energy(energy):
    expected = "a share of the variance in (0, 1), such as 0.8, that is static"
    if is_traced(energy):
        raise InputError(f"energy is traced: expected {expected}.")
    as_number(energy, "energy", lambda energy: 0 < energy < 1, expected)


def pca(x: Float[Array, "n d"], energy: float = 0.8) -> Pca:
    """Principal components of x, and the smallest number of them with more than `energy` of the variance (at least 1).

    From the singular values of the triangle of a QR of the centred x: neither a Gram matrix nor the left factor is formed.

    Raises:
      InputError: x or energy has the wrong type, shape or range.
    """
    _check_energy(energy)
    return principal_components(as_features(x), energy)


@functools.partial(jax.jit, static_argnames="energy")
def principal_components(x: Float[Array, "n d"], energy: float) -> Pca:
    """`pca` of arguments that need no check."""
    mean = jnp.mean(x, axis=0)
    centred = x - mean
    if x.shape[0] > x.shape[1]:
        with jax.default_matmul_precision("float32"):
            centred = jnp.linalg.qr(centred, mode="r")
    _, s, directions = jnp.linalg.svd(centred, full_matrices=False)
    variances = s**2 / max(x.shape[0] - 1, 1)
    share = jnp.cumsum(variances) / positive(jnp.sum(variances))
    dimension = jnp.minimum(jnp.sum(share <= energy) + 1, len(s))
    return Pca(mean, directions.T, variances, jnp.where(s[0] > 0, dimension, 1))
