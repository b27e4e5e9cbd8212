"""N-LEEP: LEEP with the posteriors of a Gaussian mixture instead of a source classifier.

"Ranking Neural Checkpoints", section 3. `pca` reduces the features, `mixture.fit_mixture` fits the Gaussians,
`mixture.responsibilities` computes their posteriors, and `leep` scores them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

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

# If all features are below this value, they count as 0: they are negligible compared with the variance of a Gaussian,
# which is at least 1e-6, and the inverse of their scale overflows in float32.
NEGLIGIBLE = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pca:
    """Principal components of n samples, m = min(n, d).

    Attributes:
      mean: mean of the samples.
      directions: principal directions, one per column.
      variances: variance of each direction, with the divisor n - 1, in descending order.
      dimension: number of directions to keep.
    """

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
    seed: int | Int[Array, ""] = 0,
    max_dimension: int | None = None,
) -> Float[Array, ""]:
    """Computes N-LEEP: the mean log-likelihood of the labels given the posteriors of a Gaussian mixture, in nats.

    Li et al., "Ranking Neural Checkpoints", CVPR 2021, section 3.5; see `leep` for the formula. Higher is better.

    PCA, the mixture, the counts (equation 5) and the mean (equation 4) all use the same samples: a study gives the
    training images of the target, and `rank` all its images. In the paper, the mean is over the test images.

    The number of principal components depends on the data, but array shapes must not. The principal components are
    therefore padded to a multiple of 8, which does not change the score. Under jit and vmap, one branch is compiled for
    each width 8, 16, 32, ... up to min(n, d) or `max_dimension`, and the data determine which branch runs. A smaller
    `max_dimension` reduces the memory (Gaussians x width^2) and the compile time. A vmapped call processes the
    checkpoints one by one, since a single checkpoint keeps the device busy and each one stops when it has converged.

    Args:
      x: features.
      y: labels in [0, num_classes).
      num_classes: C, static.
      energy: fraction of the variance, in (0, 1), static; PCA keeps as few components as possible that exceed it.
      components_per_class: number of Gaussians for each class that occurs, static; the paper uses 5.
      seed: seed of the k-means++ start. The order of the samples does not matter.
      max_dimension: maximum number of principal components, static; None: no limit.

    Returns:
      A scalar of x's dtype, at most 0. NaN if a feature is not finite, or if y is traced and n is less than the number
      of Gaussians.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or y is concrete and n is less than the number of
        Gaussians. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
      >>> round(float(nleep(x, jnp.array([0, 0, 0, 1, 1, 1]), num_classes=2, components_per_class=1)), 2)
      0.0
    """
    x, y, seed, largest, static = _arguments(x, y, num_classes, energy, components_per_class, seed, max_dimension)
    if not is_traced(y):
        _check(x, y, components_per_class)
    if is_traced(x, y, seed):
        score = functools.partial(_nleep_of_any_width, seed=seed, largest=largest, energy=energy, static=static)
        return scored(score, x, y, num_classes)
    x, y, reduced = _prepare(x, y, energy, largest)
    return _nleep_of_components(_components(x, reduced, _width(reduced, largest)), y, seed, reduced.dimension, static)


def nleep_gigaflops(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    energy: float = 0.8,
    components_per_class: int = 5,
    seed: int = 0,
    max_dimension: int | None = None,
) -> float:
    """Counts the floating point operations / 1e9 of `nleep` with these arguments, including its iterations.

    Raises:
      InputError: if an argument has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> nleep_gigaflops(jnp.eye(10), jnp.arange(10) % 2, num_classes=2) > 0
      True
    """
    x, y, start, largest, static = _arguments(x, y, num_classes, energy, components_per_class, seed, max_dimension)
    prepare = functools.partial(_prepare, energy=energy, max_dimension=largest)
    prepared_x, prepared_y, reduced = prepare(x, y)
    components = _components(prepared_x, reduced, _width(reduced, largest))
    projection = 2 * math.prod(x.shape) * components.shape[1] / 1e9
    return (
        flops.gigaflops(prepare, x, y) + projection + _counter(static)(components, prepared_y, start, reduced.dimension)
    )


@functools.cache
def _counter(static: tuple[int, int]) -> Callable[..., float]:
    """Returns a counter of the work after the reduction, which is compiled once for all features of one width."""
    return flops.counter(functools.partial(_nleep_of_components, static=static))


def _arguments(x, y, num_classes, energy, components_per_class, seed, max_dimension):
    """Returns (x, y, seed, the largest width, the static arguments of `_nleep_of_components`), after checking them."""
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    components_per_class = as_count(components_per_class, "components_per_class", least=1)
    if max_dimension is not None:
        max_dimension = as_count(max_dimension, "max_dimension", least=1)
    _check_energy(energy)
    return x, y, as_seed(seed), min(*x.shape, max_dimension or x.shape[1]), (num_classes, components_per_class)


def _width(reduced: Pca, largest: int) -> int:
    """Rounds the dimension up to a multiple of 8, but not above `largest`."""
    return min(-(-int(reduced.dimension) // 8) * 8, largest)


def _check(x: Float[Array, "n d"], y: Int[Array, "n"], components_per_class: int) -> None:
    components = components_per_class * len(np.unique(np.asarray(y)))
    if x.shape[0] < components:
        raise InputError(
            f"x has {x.shape[0]} samples for {components} Gaussians ({components_per_class} for each class that "
            "occurs): expected at least as many samples. Use more samples or a smaller components_per_class."
        )


def _nleep_of_any_width(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    seed: Int[Array, ""],
    largest: int,
    energy: float,
    static: tuple[int, int],
) -> Float[Array, ""]:
    """Computes the score of traced arguments: compiles one branch per width, and the data determine which one runs."""
    widths = (*(2**i for i in range(3, 30) if 2**i < largest), largest)

    def of_width(width, x, y, seed, reduced):
        return _nleep_of_components(_components(x, reduced, width), y, seed, reduced.dimension, static)

    # Sequential, so that only one branch runs per checkpoint and each checkpoint stops when it has converged.
    @jax.custom_batching.sequential_vmap
    def score(x: Float[Array, "n d"], y: Int[Array, "n"], seed: Int[Array, ""]) -> Float[Array, ""]:
        x, y, reduced = _prepare(x, y, energy, largest)
        branches = [functools.partial(of_width, width) for width in widths]
        return jax.lax.switch(jnp.sum(reduced.dimension > jnp.array(widths)), branches, x, y, seed, reduced)

    return score(x, y, seed)


@functools.partial(jax.jit, static_argnames=("energy", "max_dimension"))
def _prepare(
    x: Float[Array, "n d"], y: Int[Array, "n"], energy: float, max_dimension: int
) -> tuple[Float[Array, "n d"], Int[Array, "n"], Pca]:
    """Sorts the samples by their values and computes their PCA; if all features are below NEGLIGIBLE, they become 0."""
    order = order_of_values(x)
    x, y = x[order], y[order]
    unit = positive(jnp.max(jnp.abs(x)))
    x = jnp.where(unit < NEGLIGIBLE, 0, x)
    reduced = principal_components(x / unit, energy)
    dimension = jnp.minimum(reduced.dimension, max_dimension)
    return x, y, Pca(reduced.mean * unit, reduced.directions, reduced.variances, dimension)


@functools.partial(jax.jit, static_argnames="width")
def _components(x: Float[Array, "n d"], reduced: Pca, width: int) -> Float[Array, "n p"]:
    """Reduces samples to their first `width` principal components; those that are not kept are 0."""
    with jax.default_matmul_precision("float32"):
        components = (x - reduced.mean) @ reduced.directions[:, :width]
    return jnp.where(jnp.arange(width) < reduced.dimension, components, 0)


@functools.partial(jax.jit, static_argnames="static")
def _nleep_of_components(
    x: Float[Array, "n p"],
    y: Int[Array, "n"],
    seed: Int[Array, ""],
    dimension: Int[Array, ""],
    static: tuple[int, int],
) -> Float[Array, ""]:
    """Computes the score from principal components, of which `dimension` are kept; static: classes, components a class.

    Features and energies with the same width share a compiled program.
    """
    num_classes, components_per_class = static
    occurring = jnp.sum(jnp.zeros(num_classes, bool).at[y].set(True))
    active = components_per_class * occurring
    k = components_per_class * num_classes
    mixture = fit_mixture(x, k, jax.random.key(seed), dimension=dimension, active=active)
    value = leep_of_valid(responsibilities(x, mixture), y, num_classes)
    return jnp.where(jnp.isfinite(mixture.log_likelihood) & (active <= len(y)), value, jnp.nan)


def _check_energy(energy):
    expected = "a static fraction of the variance in (0, 1), such as 0.8"
    if is_traced(energy):
        raise InputError(f"energy is traced: expected {expected}.")
    as_number(energy, "energy", lambda energy: 0 < energy < 1, expected)


def pca(x: Float[Array, "n d"], energy: float = 0.8) -> Pca:
    """Computes the principal components of x and the number needed to exceed the fraction `energy` of the variance.

    The components are the singular vectors of the centred x. If n > d, they are computed from the R factor of its QR
    factorisation, which needs neither a Gram matrix nor a factor with n rows. At least one component is kept.

    Args:
      x: features.
      energy: fraction of the variance, in (0, 1).

    Returns:
      `Pca`; x is reduced by (x - pca.mean) @ pca.directions[:, :pca.dimension].

    Raises:
      InputError: if x or energy has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> result = pca(jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
      >>> int(result.dimension), [round(float(variance), 2) for variance in result.variances]
      (1, [6.0, 0.67])
    """
    _check_energy(energy)
    return principal_components(as_features(x), energy)


@functools.partial(jax.jit, static_argnames="energy")
def principal_components(x: Float[Array, "n d"], energy: float) -> Pca:
    """Computes `pca` without checking the arguments; energy is static.

    Example:
      >>> import jax.numpy as jnp
      >>> int(principal_components(jnp.eye(3), energy=0.8).dimension)
      2
    """
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
