"""The loss terms of PVSE (Song and Soleymani, CVPR 2019, arXiv:1906.04402, section 3.3), as pure functions.

b pairs of an image and a caption are compared with each other, and each has k embeddings from residuals that k heads of
attention give. Where the paper leaves a choice, the terms are those of the authors' public code.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.numerics import unit


def pvse_loss(
    images: Float[Array, "b k e"],
    captions: Float[Array, "b k e"],
    image_residuals: Float[Array, "b k e"],
    caption_residuals: Float[Array, "b k e"],
    *,
    margin: float = 0.1,
    mmd_weight: float = 0.01,
    diversity_weight: float = 0.1,
    gamma: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss of PVSE: hinge + mmd_weight * MMD + diversity_weight * (diversity of both kinds of residuals).

    Args:
      images, captions: unit embeddings; image i belongs to caption i.
      image_residuals, caption_residuals: what the attentions add to the global features, before LayerNorm.
      margin: of the hinge loss.
      mmd_weight, diversity_weight: those of the authors' command for COCO are the defaults.
      gamma: as in `mmd`.

    Returns:
      The loss, and its terms "hinge", "mmd" and "diversity" without their weights.

    Example:
      >>> x = jnp.eye(4).reshape(2, 2, 4)  # captions equal their images, and all residuals are orthogonal
      >>> loss, terms = pvse_loss(x, x, x, x)
      >>> float(loss), sorted(terms)
      (0.0, ['diversity', 'hinge', 'mmd'])
    """
    e = images.shape[-1]
    terms = {
        "hinge": hardest_negative_hinge(multi_instance_similarities(images, captions), margin),
        "mmd": mmd(images.reshape(-1, e), captions.reshape(-1, e), gamma),
        "diversity": diversity(image_residuals) + diversity(caption_residuals),
    }
    return terms["hinge"] + mmd_weight * terms["mmd"] + diversity_weight * terms["diversity"], terms


def multi_instance_similarities(x: Float[Array, "a k e"], y: Float[Array, "b l e"]) -> Float[Array, "a b"]:
    """Computes the largest inner product of one of the embeddings of each x and one of each y, in float32.

    Example:
      >>> multi_instance_similarities(jnp.eye(2)[None], jnp.array([[[0.0, 1.0]], [[-1.0, 0.5]]])).tolist()
      [[1.0, 0.5]]
    """
    return jnp.einsum("ake,ble->abkl", x, y, precision="float32").max((2, 3))


def hardest_negative_hinge(similarities: Float[Array, "b b"], margin: float) -> Float[Array, ""]:
    """Computes the hinge loss with the most similar wrong caption of each image, and wrong image of each caption.

        mean_i max(0, margin + max_{j != i} s_ij - s_ii) + mean_i max(0, margin + max_{j != i} s_ji - s_ii)

    Faghri et al., "VSE++", BMVC 2018, arXiv:1707.05612, equation 6, which PVSE uses. It is 0 for a single pair.

    Args:
      similarities: s_ij of image i and caption j.
      margin: 0.1 in the authors' command for COCO.

    Example:
      >>> round(float(hardest_negative_hinge(jnp.array([[0.5, 0.45], [0.2, 0.9]]), margin=0.1)), 3)
      0.025
    """
    own = jnp.diagonal(similarities)
    wrong = jnp.where(jnp.eye(len(own), dtype=bool), -jnp.inf, similarities)
    of_images, of_captions = (jax.nn.relu(margin + wrong.max(axis) - own).mean() for axis in (1, 0))
    return of_images + of_captions


def mmd(x: Float[Array, "n e"], y: Float[Array, "m e"], gamma: float | None = None) -> Float[Array, ""]:
    """Computes the maximum mean discrepancy of two sets of vectors: mean k(x, x') - 2 mean k(x, y) + mean k(y, y').

    The radial basis function is that of PVSE's public code, k(x, y) = exp(-gamma |x - y|), whose distance is not
    squared. The means are over all pairs, those of a vector with itself among them.

    Args:
      x, y: embeddings of images and of captions.
      gamma: None for 1 / e. The public code has this default too, but its training passes 0.5.

    Returns:
      A scalar that is 0 if the sets are equal. The gradient is finite where vectors coincide.

    Example:
      >>> round(float(mmd(jnp.zeros((3, 2)), jnp.array([[0.0, 2.0]]))), 4)  # 2 - 2 exp(-1)
      1.2642
    """
    gamma = 1 / x.shape[-1] if gamma is None else gamma
    return _mean_kernel(x, x, gamma) - 2 * _mean_kernel(x, y, gamma) + _mean_kernel(y, y, gamma)


def _mean_kernel(x: Float[Array, "n e"], y: Float[Array, "m e"], gamma: float) -> Float[Array, ""]:
    """Averages exp(-gamma |x - y|) over all pairs; distances that are not above rounding are 0, as is their gradient.

    For unit vectors of 1,024 numbers these are distances below 0.003.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    # From inner products, since all differences of 512 vectors of 1,024 numbers would take a gigabyte.
    lengths = jnp.square(x).sum(-1)[:, None] + jnp.square(y).sum(-1)
    squares = lengths - 2 * jnp.matmul(x, y.T, precision="float32")
    rounding = jax.lax.stop_gradient(lengths) * math.sqrt(x.shape[-1]) * jnp.finfo(jnp.float32).eps
    return jnp.exp(-gamma * _root(squares, rounding)).mean()


def diversity(residuals: Float[Array, "b k e"]) -> Float[Array, ""]:
    """Computes how much the residuals of the k attentions are alike: mean_i |G_i - I|_2 / k^2.

    G_i [k, k] is the Gram matrix of the residuals of sample i, each divided by its length (PVSE, section 3.3). The norm
    is the root of the sum of squares.

    Returns:
      A scalar that is 0 if residuals are orthogonal to each other, or there is one attention.

    Example:
      >>> float(diversity(jnp.eye(2)[None])), round(float(diversity(jnp.ones((1, 2, 3)))), 3)
      (0.0, 0.354)
    """
    directions, k = unit(residuals), residuals.shape[1]
    gram = jnp.einsum("bke,ble->bkl", directions, directions, precision="float32") * (1 - jnp.eye(k))
    return _root(jnp.square(gram).sum((1, 2)), 1e-12).mean() / k**2


def _root(x: Float[Array, "*b"], least: Float[Array, "*b"] | float) -> Float[Array, "*b"]:
    """Computes the square root, or 0, with the gradient 0, where x is not above `least`."""
    above = x > least
    return jnp.where(above, jnp.sqrt(jnp.where(above, x, 1)), 0)
