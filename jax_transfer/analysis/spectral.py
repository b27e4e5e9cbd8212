"""Spectral components of features, and quantities that describe them.

"Towards Inadequately Pre-trained Models in Transfer Learning", section 4.4. Feature matrices are compared through the
relations between the same samples, so the checkpoints may differ in width, architecture and source.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_number, is_traced
from jax_transfer.numerics import positive
from jax_transfer.records import InputError

# Relative tolerance of a sum of singular values, so that eight of ten equal values reach 80 % of the sum despite
# rounding.
ROUNDING = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralComponents:
    """Decomposition of features into a main and a residual component, with main + residual = features.

    For several batches, rank and singular_values have a leading batch axis.

    Attributes:
      main: projection of the features on the leading singular vectors.
      residual: the features minus main.
      rank: number of singular values that main keeps.
      singular_values: all singular values of the features, in descending order.
    """

    main: Float[Array, "n d"]
    residual: Float[Array, "n d"]
    rank: Int[Array, "*batches"]
    singular_values: Float[Array, "*batches s"]


def spectral_components(x: Float[Array, "n d"], energy: float = 0.8) -> SpectralComponents:
    """Splits a feature matrix into its main and residual spectral components.

        F = U S V',   F_m = U S_m V',   F_r = F - F_m

    "Towards Inadequately Pre-trained Models in Transfer Learning", equations 1 to 3. S_m keeps the first k singular
    values, where k is the smallest number with s_1 + ... + s_k >= energy (s_1 + s_2 + ...). As in the paper, the
    features are not centred. F_m is computed by projecting F on the first k singular vectors of its shorter side.
    They are computed from the R factor of a QR factorisation, so no factor with n rows is formed.

    Args:
      x: features, of any scale.
      energy: fraction of the sum of the singular values (not of their squares) that main keeps, in (0, 1].

    Returns:
      `SpectralComponents` with a scalar rank and singular_values [min(n, d)]. The rank is 1 if all features are 0; the
      components are NaN if a feature is not finite.

    Raises:
      InputError: if energy is out of range, or x has the wrong type or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> components = spectral_components(jnp.diag(jnp.array([5.0, 4.0, 1.0])), energy=0.8)
      >>> int(components.rank), [round(float(value), 2) for value in jnp.diag(components.main)]
      (2, [5.0, 4.0, 0.0])
    """
    _check_energy(energy)
    return _components(as_features(x), energy)


def batched_spectral_components(
    x: Float[Array, "n d"], batch_size: int = 128, energy: float = 0.8
) -> SpectralComponents:
    """Computes `spectral_components` of each batch of rows separately, as in the paper, where F [b, d] is a batch.

    Args:
      x: features, in the order of the batches. The last batch may be smaller.
      batch_size: b, static. If it is n or more, the whole matrix is one batch.
      energy: as in `spectral_components`.

    Returns:
      `SpectralComponents` with main and residual [n, d], and rank [m] and singular_values [m, min(b, d)] of the m
      batches. The singular values of a smaller last batch are padded with 0.

    Raises:
      InputError: if x, energy or batch_size has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> batched_spectral_components(jnp.eye(5), batch_size=2).rank.tolist()
      [2, 2, 1]
    """
    _check_energy(energy)
    x, batch_size = as_features(x), as_count(batch_size, "batch_size", least=1)
    return _batched_components(x, min(batch_size, len(x)), energy)


def _check_energy(energy) -> None:
    as_number(energy, "energy", lambda energy: 0 < energy <= 1, "a fraction in (0, 1]; the paper uses 0.8")


@jax.jit
def _components(x: Float[Array, "n d"], energy: float) -> SpectralComponents:
    with jax.default_matmul_precision("float32"):
        scaled, scale = _scaled(x)
        vectors, s = _shorter_side(scaled)
        rank = _main_rank(s, energy)
        projection = jnp.where(jnp.arange(len(s)) < rank, vectors, 0) @ vectors.T
        main = x @ projection if x.shape[0] >= x.shape[1] else projection @ x
        return SpectralComponents(main, x - main, rank, s * scale)


@functools.partial(jax.jit, static_argnames="batch_size")
def _batched_components(x: Float[Array, "n d"], batch_size: int, energy: float) -> SpectralComponents:
    n, d = x.shape
    num_rows = n // batch_size * batch_size  # rows in complete batches
    result = jax.vmap(_components, (0, None))(x[:num_rows].reshape(-1, batch_size, d), energy)
    result = dataclasses.replace(
        result, main=result.main.reshape(num_rows, d), residual=result.residual.reshape(num_rows, d)
    )
    if num_rows == n:
        return result
    last = _components(x[num_rows:], energy)
    missing = result.singular_values.shape[1] - len(last.singular_values)
    s = jnp.pad(last.singular_values, (0, missing))
    last = dataclasses.replace(last, rank=last.rank[None], singular_values=s[None])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), result, last)


def singular_values(x: Float[Array, "n d"]) -> Float[Array, "s"]:
    """Computes the singular values of x in descending order, s = min(n, d).

    Raises:
      InputError: if x has the wrong type or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(value), 2) for value in singular_values(jnp.array([[3.0, 0.0], [0.0, 4.0]]))]
      [4.0, 3.0]
    """
    return _singular_values(as_features(x))


@jax.jit
def _singular_values(x: Float[Array, "n d"]) -> Float[Array, "s"]:
    with jax.default_matmul_precision("float32"):
        x, scale = _scaled(x)
        tall = x if x.shape[0] >= x.shape[1] else x.T
        return jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False) * scale


def main_rank(singular_values: Float[Array, "s"], energy: float = 0.8) -> Int[Array, ""]:
    """Returns the smallest k with s_1 + ... + s_k >= energy (s_1 + s_2 + ...).

    Args:
      singular_values: in descending order, as returned by `singular_values`.
      energy: fraction of their sum, in (0, 1].

    Raises:
      InputError: if an argument has the wrong type, shape or range.

    Example:
      >>> int(main_rank([5.0, 4.0, 1.0], energy=0.8))
      2
    """
    _check_energy(energy)
    return _main_rank(_as_singular_values(singular_values), energy)


def _main_rank(s: Float[Array, "s"], energy: float) -> Int[Array, ""]:
    sums = jnp.cumsum(s)
    return 1 + jnp.sum(sums < energy * (1 - ROUNDING) * sums[-1])


def effective_rank(singular_values: Float[Array, "s"]) -> Float[Array, ""]:
    """Computes the effective rank, exp(-sum_i p_i log p_i) with p = s / sum(s).

    Roy and Vetterli, "The Effective Rank", EUSIPCO 2007, equation 4. The result is 1 if at most one singular value
    differs from 0, and the number of singular values if they are all equal and positive.

    Args:
      singular_values: in descending order, as returned by `singular_values`; not the features themselves.

    Raises:
      InputError: if the singular values have the wrong type or shape, are negative or are not in descending order.

    Example:
      >>> round(float(effective_rank([2.0, 2.0, 0.0])), 2)
      2.0
    """
    singular_values = _as_singular_values(singular_values)
    p = singular_values / positive(jnp.sum(singular_values))
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def spectral_decay(singular_values: Float[Array, "s"]) -> Float[Array, ""]:
    """Fits the exponent a of the power law s_i ~ i^-a by least squares on the logarithms.

    A larger exponent means that fewer directions matter. Only singular values above 1e-6 of the first one are used,
    since the others are rounding errors in float32. The exponent is 0 if fewer than two of these remain, and NaN if a
    singular value is not finite.

    Args:
      singular_values: in descending order, as returned by `singular_values`; not the features themselves.

    Raises:
      InputError: if the singular values have the wrong type or shape, are negative or are not in descending order.

    Example:
      >>> round(float(spectral_decay([1.0, 1 / 2, 1 / 3, 1 / 4])), 2)
      1.0
    """
    singular_values = _as_singular_values(singular_values)
    is_used = singular_values > 1e-6 * singular_values[0]
    weight = is_used / jnp.maximum(jnp.sum(is_used), 1)
    log_i = jnp.log(jnp.arange(1, len(singular_values) + 1))
    log_s = jnp.log(jnp.where(is_used, singular_values, 1))
    log_i = log_i - jnp.sum(weight * log_i)
    decay = -jnp.sum(weight * log_i * log_s) / positive(jnp.sum(weight * log_i**2))
    return jnp.where(jnp.all(jnp.isfinite(singular_values)), decay, jnp.nan)


def _as_singular_values(s) -> Float[Array, "s"]:
    """Converts s as `as_features` does; raises an error if concrete values are negative or not in descending order."""
    s = as_features(s, "singular_values", "s")
    if not is_traced(s):
        values = np.asarray(s)
        if (values < 0).any() or (np.diff(values) > 0).any():
            raise InputError(
                "singular_values holds negative or ascending values: expected the result of `singular_values`, in "
                "descending order."
            )
    return s


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Similarities:
    """Pairwise similarities of k and l feature matrices of the same samples, in [0, 1]; 1 for equal matrices.

    Attributes:
      cka: linear centred kernel alignment.
      overlap: overlap of the main subspaces.
    """

    cka: Float[Array, "k l"]
    overlap: Float[Array, "k l"]


def similarities(x: Float[Array, "k n d"], y: Float[Array, "l n e"] | None = None, energy: float = 0.8) -> Similarities:
    """Compares how k checkpoints and l other checkpoints represent the same n samples.

    Rotating or scaling the features of a checkpoint does not change the similarities.

    cka: linear centred kernel alignment, <K_a, K_b> / (|K_a| |K_b|), where K is the Gram matrix of the centred
      features (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, equation 5).
    overlap: |U_a' U_b|^2 / min(rank_a, rank_b), where U holds the left singular vectors that span the main component of
      `spectral_components`. This is the mean squared cosine of the principal angles; random subspaces have an expected
      overlap of max(rank_a, rank_b) / n.

    Args:
      x: stacked features; pad narrower ones with columns of zeros. The memory grows as (k + l) n^2, so use a sample
        of the images and compare few checkpoints at a time.
      y: features of the other checkpoints; None: x is compared with itself.
      energy: as in `spectral_components`.

    Returns:
      `Similarities` with cka [k, l] and overlap [k, l].

    Raises:
      InputError: if an argument has the wrong type, shape or range, or x and y differ in the number of samples.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> rotated = 3 * x @ jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> [round(float(value), 2) for value in similarities(jnp.stack([x, rotated])).cka[0]]
      [1.0, 1.0]
    """
    _check_energy(energy)
    x = as_features(x, "x", "k n d")
    y = None if y is None else as_features(y, "y", "l n e")
    if y is not None and y.shape[1] != x.shape[1]:
        raise InputError(f"y has {y.shape[1]} samples and x {x.shape[1]}: expected features of the same samples.")
    return _similarities(x, y, energy)


@jax.jit
def _similarities(x: Float[Array, "k n d"], y: Float[Array, "l n e"] | None, energy: float) -> Similarities:
    def kernel_and_projection(x: Float[Array, "n d"]) -> tuple[Float[Array, "nn"], Float[Array, "nn"], Int[Array, ""]]:
        """Returns the normalised Gram matrix and the projection on the main subspace, both flattened, and its rank."""
        x, _ = _scaled(x)
        vectors, s = _shorter_side(x)
        rank = _main_rank(s, energy)
        u = x @ vectors / positive(s) if x.shape[0] >= x.shape[1] else vectors
        u = jnp.where(jnp.arange(len(s)) < rank, u, 0)
        centred = x - x.mean(0)
        kernel = centred @ centred.T
        return (kernel / positive(jnp.linalg.norm(kernel))).ravel(), (u @ u.T).ravel(), rank

    with jax.default_matmul_precision("float32"):
        kernels, projections, ranks = results = jax.lax.map(kernel_and_projection, x)
        other_kernels, other_projections, other_ranks = results if y is None else jax.lax.map(kernel_and_projection, y)
        overlap = projections @ other_projections.T / jnp.minimum(ranks[:, None], other_ranks)
        return Similarities(cka=kernels @ other_kernels.T, overlap=overlap)


def _shorter_side(x: Float[Array, "n d"]) -> tuple[Float[Array, "s s"], Float[Array, "s"]]:
    """Returns the singular vectors of the shorter side of x, as columns, and the singular values; s = min(n, d)."""
    tall = x if x.shape[0] >= x.shape[1] else x.T
    _, s, vt = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), full_matrices=False)
    return vt.T, s


def _scaled(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """Returns (x / scale, scale), where |x / scale| <= 1, since the squares of large values overflow in float32."""
    scale = positive(jnp.max(jnp.abs(x)))
    return x / scale, scale
