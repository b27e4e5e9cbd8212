"""Measures of a representation that need no classifier: k-nearest neighbours, rank, alignment and uniformity.

All but the first need no labels either, so they also judge pre-training without labels, where a collapse, that is, the
same features for all images, can go along with a small loss.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, scored
from jax_transfer.analysis.spectral import singular_values
from jax_transfer.numerics import positive
from jax_transfer.records import InputError

ROWS_AT_A_TIME = 256  # rows of the [n, n] matrix of similarities that are in memory at a time
RANKME_EPS = 1e-7  # of the paper, for float32


def knn_accuracy(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, k: int = 20) -> Float[Array, ""]:
    """Computes the leave-one-out accuracy of a k-nearest-neighbour classifier with cosine similarity.

        mean_i [y_i = argmax_c |{j in N_k(i) : y_j = c}|],   N_k(i): the k samples j != i with the largest cos(x_i, x_j)

    The unweighted vote that Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    CVPR 2018, section 3.4, weight by similarity. Of several classes with the most votes, the one with the largest sum
    of similarities is predicted; if these are equal too, the first class. Of equally similar samples, the first are the
    nearest.

    Args:
      x: features, of any scale. A row of zeros is orthogonal to all others.
      y: labels in [0, num_classes). A class without samples changes nothing.
      num_classes: C, static.
      k: number of neighbours, static; all other samples vote if there are fewer.

    Returns:
      A scalar of x's dtype in [0, 1]; NaN if a feature is not finite.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or there is only one sample. Traced labels out of
        range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 0.1]])
      >>> round(float(knn_accuracy(x, jnp.array([0, 0, 1, 1, 1]), num_classes=2, k=1)), 2)
      0.6
    """
    num_classes, k, x = as_count(num_classes), as_count(k, "k", least=1), _as_several(x)
    y = as_labels(y, num_classes, len(x))
    return scored(lambda x, y: _knn_accuracy(x, y, num_classes, min(k, len(x) - 1)), x, y, num_classes)


@functools.partial(jax.jit, static_argnames=("num_classes", "k"))
def _knn_accuracy(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, k: int) -> Float[Array, ""]:
    directions = _unit(x)

    def is_right(sample) -> Float[Array, ""]:
        index, direction, label = sample
        similarity = (directions @ direction).at[index].set(-jnp.inf)  # a sample is not its own neighbour
        nearest, neighbours = jax.lax.top_k(similarity, k)
        votes = jnp.zeros(num_classes, jnp.int32).at[y[neighbours]].add(1)
        sums = jnp.zeros(num_classes, x.dtype).at[y[neighbours]].add(nearest)
        return jnp.argmax(jnp.where(votes == votes.max(), sums, -jnp.inf)) == label

    with jax.default_matmul_precision("float32"):
        right = jax.lax.map(is_right, (jnp.arange(len(x)), directions, y), batch_size=ROWS_AT_A_TIME)
    return jnp.where(jnp.isfinite(x).all(), right.mean(dtype=x.dtype), jnp.nan)


def rankme(x: Float[Array, "n d"]) -> Float[Array, ""]:
    """Computes RankMe, the effective rank of the features: exp(-sum_i p_i log p_i) with p = s / sum(s) + 1e-7.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
    Rank", ICML 2023, equation 1. s are the singular values of the features, which are not centred. Except for the
    constant, it is `effective_rank` of these singular values.

    Args:
      x: features, of any scale. The paper recommends 25,600 images; with n images the result is at most min(n, d).

    Returns:
      A scalar of x's dtype in [1, min(n, d)], up to the constant: 1 if all rows are multiples of one row. NaN if a
      feature is not finite.

    Raises:
      InputError: if x has the wrong type or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(rankme(jnp.eye(4))), 2), round(float(rankme(jnp.ones((4, 4)))), 2)
      (4.0, 1.0)
    """
    x = as_features(x)
    s = singular_values(x / positive(jnp.max(jnp.abs(x))))  # so that no singular value overflows
    p = s / positive(jnp.sum(s)) + RANKME_EPS
    return jnp.exp(-jnp.sum(p * jnp.log(p)))


def alignment(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, ""]:
    """Computes how close the features of two views of an image are: mean_i |u_i - v_i|^2, u = x / |x| and v = y / |y|.

    Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, section 4.1, with alpha = 2.

    Args:
      x, y: features of the two views, row by row, of any scale. A row of zeros stays zero.

    Returns:
      A scalar of x's dtype in [0, 4]; 0 if the views have the same direction. NaN if a feature is not finite.

    Raises:
      InputError: if x or y has the wrong type, or their shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> float(alignment(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])))
      1.0
    """
    x, y = as_features(x), as_features(y, "y")
    if x.shape != y.shape:
        raise InputError(f"x {list(x.shape)} and y {list(y.shape)} differ: expected features of two views of n images.")
    return jnp.mean(jnp.sum((_unit(x) - _unit(y)) ** 2, -1))


def uniformity(x: Float[Array, "n d"], t: float = 2.0) -> Float[Array, ""]:
    """Computes how evenly directions spread: log mean_{i != j} exp(-t |u_i - u_j|^2) with u = x / |x|.

    Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, section 4.1.

    Args:
      x: features, of any scale. A row of zeros stays zero.
      t: as in the formula, > 0.

    Returns:
      A scalar of x's dtype in [-4 t, 0], the smaller the more uniform; 0 if all features have the same direction. NaN
      if a feature is not finite.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or there is only one sample.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(uniformity(jnp.array([[1.0, 0.0], [0.0, 3.0]]))), 2)
      -4.0
    """
    as_number(t, "t", lambda t: 0 < t < float("inf"), "a positive number; the paper uses 2")
    return _uniformity(_as_several(x), t)


@jax.jit
def _uniformity(x: Float[Array, "n d"], t: float) -> Float[Array, ""]:
    directions = _unit(x)
    squares = jnp.sum(directions**2, -1)

    def of_row(sample) -> Float[Array, ""]:
        index, direction, square = sample
        distances = jnp.maximum(square + squares - 2 * directions @ direction, 0)
        return jax.nn.logsumexp((-t * distances).at[index].set(-jnp.inf))

    with jax.default_matmul_precision("float32"):
        rows = jax.lax.map(of_row, (jnp.arange(len(x)), directions, squares), batch_size=ROWS_AT_A_TIME)
    return jax.nn.logsumexp(rows) - jnp.log(len(x) * (len(x) - 1.0))


def _as_several(x) -> Float[Array, "n d"]:
    """Converts features as `as_features` does, and raises an error if there is only one sample."""
    x = as_features(x)
    if len(x) < 2:
        raise InputError("x holds one sample: expected at least two, to compare them with each other.")
    return x


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Divides each row by its norm, without overflow; a row of zeros stays zero."""
    x = x / positive(jnp.max(jnp.abs(x), -1, keepdims=True))
    return x / positive(jnp.linalg.norm(x, axis=-1, keepdims=True))
