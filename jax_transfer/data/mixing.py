"""Mixes pairs of images of a batch, and their labels, on the device.

Each mixing is a function `(key, images [b, h, w, 3], targets [b, c]) -> (images, targets)`; the rows of targets are
distributions over the classes. Image i is mixed with image b - 1 - i, and the whole batch shares one mixing weight, as
in timm. The pairs are formed in the global batch, so the result does not depend on the number of devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mixup(key, images, targets, alpha=0.8):
    """Averages each image with another one, weight * image + (1 - weight) * other, and their targets likewise.

    weight ~ Beta(alpha, alpha) (Zhang et al., 2018, arXiv:1710.09412).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> _, targets = mixup(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), jnp.eye(2))
    >>> targets.sum(1).tolist()
    [1.0, 1.0]
    """
    return _mix(images, targets, _everywhere(images, jax.random.beta(key, alpha, alpha)))


def cutmix(key, images, targets, alpha=1.0):
    """Pastes a rectangle of the other image, covering a share 1 - weight of the area, weight ~ Beta(alpha, alpha).

    Yun et al., 2019, arXiv:1905.04899. The centre of the rectangle is uniform. The part outside the image is cut off,
    and the targets are weighted by the area that is actually pasted.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> images = jnp.stack([jnp.zeros((8, 8, 3)), jnp.ones((8, 8, 3))])
    >>> mixed, targets = cutmix(jax.random.key(0), images, jnp.eye(2))
    >>> bool(jnp.allclose(mixed[0].mean(), targets[0, 1]))  # the share of pasted pixels
    True
    """
    key_weight, key_box = jax.random.split(key)
    return _mix(images, targets, _outside_random_box(key_box, images, jax.random.beta(key_weight, alpha, alpha)))


def mixup_or_cutmix(key, images, targets, mixup_alpha=0.8, cutmix_alpha=1.0):
    """Applies either mixup or cutmix to the whole batch, each with probability 1/2, as timm does if both are enabled.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> images, targets = mixup_or_cutmix(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), jnp.eye(2))
    >>> images.shape, targets.shape
    ((2, 4, 4, 3), (2, 2))
    """
    key_which, key_weight, key_box = jax.random.split(key, 3)
    cut = jax.random.bernoulli(key_which)
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    weight = jax.random.beta(key_weight, alpha, alpha)
    kept = jnp.where(cut, _outside_random_box(key_box, images, weight), _everywhere(images, weight))
    return _mix(images, targets, kept)


MIXINGS = {"mixup": mixup, "cutmix": cutmix, "mixup_or_cutmix": mixup_or_cutmix}


def _mix(images, targets, kept: Float[Array, "h w 1"]):
    """Mixes each image with its partner. `kept` is the weight of each pixel of the image; 1 - kept that of the partner.

    The targets are mixed with the mean of `kept`.
    """
    weight = kept.mean()
    return kept * images + (1 - kept) * images[::-1], weight * targets + (1 - weight) * targets[::-1]


def _everywhere(images, weight) -> Float[Array, "h w 1"]:
    """Returns the same weight for all pixels."""
    return jnp.full((*images.shape[1:3], 1), weight)


def _outside_random_box(key, images, weight) -> Float[Array, "h w 1"]:
    """Returns 0 inside a random box of area (1 - weight) * h * w and 1 outside."""
    height, width = images.shape[1:3]
    centre = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array([height, width]))

    def inside(centre, size):
        """Returns the mask of the coordinates that the box covers along one axis."""
        half = jnp.floor(size * jnp.sqrt(1 - weight)) // 2
        distance = jnp.arange(size) - centre
        return (distance >= -half) & (distance < half)

    box = inside(centre[0], height)[:, None] & inside(centre[1], width)
    return 1.0 - box[..., None]
