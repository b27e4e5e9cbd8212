"""Triplet losses, which bring the embeddings of copies of one image together and move other images away."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.records import InputError


def _squared_distances(embeddings: Float[Array, "b m e"]) -> tuple[Float[Array, "b m m"], Float[Array, "b m b*m"]]:
    """Returns squared distances between unit vectors along the embeddings, to the copies of the same and of all images.

    In the second array, those to the same image are infinite.

    Raises:
      InputError: if there are no two images, each with two copies, to compare.
    """
    images, copies, _ = embeddings.shape
    if images < 2 or copies < 2:
        raise InputError(
            f"a triplet loss compares copies of several images, and a batch has {images} of {copies} copies: use a "
            "batch_size and copies of at least 2, and as many images in each of the microbatches."
        )
    # The bound keeps the gradient finite at 0.
    unit = embeddings * jax.lax.rsqrt(jnp.maximum(jnp.square(embeddings).sum(-1, keepdims=True), 1e-12))
    # In bfloat16 or TF32, the default on accelerators, small distances would be noise.
    same = 2 - 2 * jnp.einsum("ice,ide->icd", unit, unit, precision="highest")
    every = 2 - 2 * jnp.einsum("ice,jde->icjd", unit, unit, precision="highest")
    other = ~jnp.eye(images, dtype=bool)[:, None, :, None]
    return jnp.maximum(same, 0), jnp.where(other, jnp.maximum(every, 0), jnp.inf).reshape(images, copies, -1)


def semi_hard_triplet_loss(embeddings: Float[Array, "b m e"], margin: float) -> Float[Array, ""]:
    """Returns the mean of max(0, margin + p - n) over all ordered pairs of copies of an image.

    p is the squared distance of the two copies, and n that from the first copy to a semi-hard negative: the nearest
    copy of another image that is farther than p, or, if there is none, the farthest one (Schroff et al., 2015,
    arXiv:1503.03832, section 3.2). Embeddings are first scaled to length 1.

    Args:
      embeddings: those of m copies of each of b images.
      margin: 0.2 in the paper, and 0.5 in the exemplars of Kolesnikov et al. (2019).

    Raises:
      InputError: if b or m is 1.

    Example:
      >>> embeddings = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])  # n = 2
      >>> float(semi_hard_triplet_loss(embeddings, margin=0.5)), float(semi_hard_triplet_loss(embeddings, margin=2.5))
      (0.0, 0.5)
    """
    positive, negative = _squared_distances(embeddings)
    p, n = positive[..., None], negative[:, :, None, :]
    nearest = jnp.where(n > p, n, jnp.inf).min(-1)
    farthest = jnp.where(jnp.isinf(n), -jnp.inf, n).max(-1)
    semi_hard = jnp.where(jnp.isfinite(nearest), nearest, farthest)
    copies = embeddings.shape[1]
    losses = jax.nn.relu(margin + positive - semi_hard) * (1 - jnp.eye(copies))
    return losses.sum() / (len(embeddings) * copies * (copies - 1))


def batch_hard_triplet_loss(embeddings: Float[Array, "b m e"]) -> Float[Array, ""]:
    """Returns the mean of log(1 + exp(p - n)) over all copies of all images.

    p is the distance from a copy to the farthest copy of its image, and n that to the nearest copy of another image:
    the batch-hard loss with a soft margin (Hermans et al., 2017, arXiv:1703.07737, equation 5 and section 2).
    Embeddings are first scaled to length 1. Distances are at least 1e-6, where their gradient is 0.

    Args:
      embeddings: those of m copies of each of b images.

    Raises:
      InputError: if b or m is 1.

    Example:
      >>> embeddings = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [-1.0, 0.0]]])  # p = 0, n = 2
      >>> round(float(batch_hard_triplet_loss(embeddings)), 3)
      0.127
    """
    positive, negative = (jnp.sqrt(jnp.maximum(squared, 1e-12)) for squared in _squared_distances(embeddings))
    return jax.nn.softplus(positive.max(-1) - negative.min(-1)).mean()
