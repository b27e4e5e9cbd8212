"""Spectral components of features ("Towards Inadequately Pre-trained Models", section 4.4), and views that explain them.

The views that compare two feature matrices compare what they say of the same samples, so the checkpoints may differ in
width, architecture and source.
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

ROUNDING = (
    1e-6  # of the sum of singular values: ten equal ones reach 80 % with eight, whatever float32 makes of the sum
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralComponents:
    """main + residual = the features. rank: how many singular values main keeps; singular_values: all, descending.

    For batches, rank and singular_values have a leading axis of batches.
    """

    main: Float[Array, "n d"]
    residual: Float[Array, "n d"]
    rank: Int[Array, "*batches"]
    singular_values: Float[Array, "*batches s"]


def spectral_components(x: Float[Array, "n d"], energy: float = 0.8) -> SpectralComponents:
    """Main and residual component of a feature matrix, equations 1 to 3: F = U S V', F_m = U S_m V', F_r = F - F_m.

    S_m keeps the first k singular values, k the smallest number with s_1 + ... + s_k >= energy (s_1 + s_2 + ...). The
    features are not centred, as in the paper. F_m is the projection of F on the first k singular vectors of its shorter
    side. They come from the triangle of a QR decomposition, so the factor with n rows is never formed.

    Args:
      x: features, of any scale.
      energy: the share of the sum of the singular values (not of their squares) that main keeps, in (0, 1].

    Returns:
      `SpectralComponents`: rank is a scalar, singular_values [min(n, d)]. NaN if a feature is not finite. Zeros have rank 1.

    Raises:
      InputError: if energy is out of range, or x has no rows or no columns.
    """
    _check_energy(energy)
    return _components(as_features(x), energy)


def batched_spectral_components(
    x: Float[Array, "n d"], batch_size: int = 128, energy: float = 0.8
) -> SpectralComponents:
    """`spectral_components` of each batch of rows for itself: the paper's F is a batch of features, b x d.

    Args:
      x: features, in the order in which they fall into batches. The last batch may be smaller.
      batch_size: b, static; n or more: the whole matrix is one batch.
      energy: as for `spectral_components`.

    Returns:
      `SpectralComponents`: main and residual [n, d], rank [m] and singular_values [m, min(b, d)] of the m batches; the
      singular values that a smaller last batch lacks are 0.

    Raises:
      InputError: also if batch_size is not positive.
    """
    _check_energy(energy)
    x, batch_size = as_features(x), as_count(batch_size, "batch_size", least=1)
    return _batched_components(x, min(batch_size, len(x)), energy)


def _check_energy(energy):
    as_number(energy, "energy", lambda energy: 0 < energy <= 1, "a share in (0, 1]; the paper's is 0.8")


@jax.jit
def _components(x, energy):
    with jax.default_matmul_precision("float32"):
        scaled, scale = _scaled(x)
        vectors, s = _shorter_side(scaled)
        rank = _main_rank(s, energy)
        projection = jnp.where(jnp.arange(len(s)) < rank, vectors, 0) @ vectors.T
        main = x @ projection if x.shape[0] >= x.shape[1] else projection @ x
        return SpectralComponents(main, x - main, rank, s * scale)


@functools.partial(jax.jit, static_argnames="batch_size")
def _batched_components(x, batch_size, energy):
    n, d = x.shape
    whole = n // batch_size * batch_size
    found = jax.vmap(_components, (0, None))(x[:whole].reshape(-1, batch_size, d), energy)
    found = dataclasses.replace(found, main=found.main.reshape(whole, d), residual=found.residual.reshape(whole, d))
    if whole == n:
        return found
    last = _components(x[whole:], energy)
    lacking = found.singular_values.shape[1] - len(last.singular_values)
    s = jnp.pad(last.singular_values, (0, lacking))
    last = dataclasses.replace(last, rank=last.rank[None], singular_values=s[None])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, last)


def singular_values(x: Float[Array, "n d"]) -> Float[Array, "s"]:
    """Those of x in descending order, s = min(n, d).

    Raises:
      InputError: if x has the wrong type or shape.
    """
    return _singular_values(as_features(x))


@jax.jit
def _singular_values(x):
    with jax.default_matmul_precision("float32"):
        x, scale = _scaled(x)
        tall = x if x.shape[0] >= x.shape[1] else x.T
        return jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False) * scale


def main_rank(singular_values: Float[Array, "s"], energy: float = 0.8) -> Int[Array, ""]:
    """The smallest k for which the first k of the descending singular values sum to the share `energy` of all.

    Raises:
      InputError: if an argument has the wrong type, shape or range.
    """
    _check_energy(energy)
    return _main_rank(_as_singular_values(singular_values), energy)


def _main_rank(s, energy):
    sums = jnp.cumsum(s)
    return 1 + jnp.sum(sums < energy * (1 - ROUNDING) * sums[-1])


def effective_rank(singular_values: Float[Array, "s"]) -> Float[Array, ""]:
    """exp of the entropy of s / sum(s): 1 if one singular value is all there is, s if they are equal.

    Roy and Vetterli, "The Effective Rank", EUSIPCO 2007, equation 4. 1 if all are 0.

    Args:
      singular_values: of `singular_values`, not the features themselves.

    Raises:
      InputError: if they have the wrong type or shape.
    """
    singular_values = _as_singular_values(singular_values)
    p = singular_values / positive(jnp.sum(singular_values))
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def spectral_decay(singular_values: Float[Array, "s"]) -> Float[Array, ""]:
    """The exponent a of the power law s_i ~ i^-a, by least squares on logarithms: the steeper, the fewer directions matter.

    Of the singular values above 1e-6 of the first, the rest is rounding in float32; 0 if there are fewer than two.

    Raises:
      InputError: if they have the wrong type or shape.
    """
    singular_values = _as_singular_values(singular_values)
    counted = singular_values > 1e-6 * singular_values[0]
    weight = counted / jnp.maximum(jnp.sum(counted), 1)
    log_i = jnp.log(jnp.arange(1, len(singular_values) + 1))
    log_s = jnp.log(jnp.where(counted, singular_values, 1))
    log_i = log_i - jnp.sum(weight * log_i)
    decay = -jnp.sum(weight * log_i * log_s) / positive(jnp.sum(weight * log_i**2))
    return jnp.where(jnp.all(jnp.isfinite(singular_values)), decay, jnp.nan)


def _as_singular_values(s) -> Float[Array, "s"]:
    """s as `as_features` returns it; concrete ones that are negative or not in descending order raise."""
    s = as_features(s, "singular_values", "s")
    if not is_traced(s):
        values = np.asarray(s)
        if (values < 0).any() or (np.diff(values) > 0).any():
            raise InputError(
                "singular_values holds negative or ascending values: expected those of `singular_values`, the largest first."
            )
    return s


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Similarities:
    """Between k and l feature matrices of the same samples, each in [0, 1], 1 between equal ones."""

    cka: Float[Array, "k l"]
    overlap: Float[Array, "k l"]


def similarities(x: Float[Array, "k n d"], y: Float[Array, "l n e"] | None = None, energy: float = 0.8) -> Similarities:
    """How alike k checkpoints represent n samples as l others do, whatever rotates or scales their features.

    cka: linear centred kernel alignment, <K_a, K_b> / (|K_a| |K_b|) for the Gram matrices K of centred features
      (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, equation 5).
    overlap: of the main subspaces, |U_a' U_b|^2 / min(rank_a, rank_b), U the left singular vectors that span F_m of
      `spectral_components`: the mean squared cosine of the principal angles. Random subspaces have max(rank) / n.

    Args:
      x: stacked features; narrower ones padded with columns of zeros. Memory grows with (k + l) n^2: take a sample of
        images, and a part of many checkpoints.
      y: those of the others; None: x again.
      energy: as for `spectral_components`.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or x and y differ in the number of samples.
    """
    _check_energy(energy)
    x = as_features(x, "x", "k n d")
    y = None if y is None else as_features(y, "y", "l n e")
    if y is not None and y.shape[1] != x.shape[1]:
        raise InputError(f"y has {y.shape[1]} samples and x {x.shape[1]}: expected features of the same samples.")
    return _similarities(x, y, energy)


@jax.jit
def _similarities(x, y, energy):
    def views(x):
        x, _ = _scaled(x)
        vectors, s = _shorter_side(x)
        rank = _main_rank(s, energy)
        u = x @ vectors / positive(s) if x.shape[0] >= x.shape[1] else vectors
        u = jnp.where(jnp.arange(len(s)) < rank, u, 0)
        centred = x - x.mean(0)
        kernel = centred @ centred.T
        return (kernel / positive(jnp.linalg.norm(kernel))).ravel(), (u @ u.T).ravel(), rank

    with jax.default_matmul_precision("float32"):
        kernels, projections, ranks = of_x = jax.lax.map(views, x)
        other_kernels, other_projections, other_ranks = of_x if y is None else jax.lax.map(views, y)
        overlap = projections @ other_projections.T / jnp.minimum(ranks[:, None], other_ranks)
        return Similarities(cka=kernels @ other_kernels.T, overlap=overlap)


def _shorter_side(x: Float[Array, "n d"]) -> tuple[Float[Array, "s s"], Float[Array, "s"]]:
    """Singular vectors of the shorter side of x, in columns, and the singular values: s = min(n, d)."""
    tall = x if x.shape[0] >= x.shape[1] else x.T
    _, s, vt = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), full_matrices=False)
    return vt.T, s


def _scaled(x):
    """(x / scale, scale): entries of at most 1, for the squares of 1e30 are no float32."""
    scale = positive(jnp.max(jnp.abs(x)))
    return x / scale, scale
