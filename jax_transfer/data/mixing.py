"""Mixing the images of a batch in pairs, and their labels with them, on the device.

Each is `(key, images [b, h, w, c], targets [b, c]) -> images, targets`: the rows of targets are distributions over the
classes. Image i meets image b - 1 - i and one mixture serves the whole batch, as in timm. The batch is the global one: the
result does not depend on the number of devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mixup(key, images, targets, alpha=0.8):
    """weight image + (1 - weight) other, weight ~ Beta(alpha, alpha) (Zhang et al., 2018, arXiv:1710.09412)."""
    return _mix(images, targets, _everywhere(images, jax.random.beta(key, alpha, alpha)))


def cutmix(key, images, targets, alpha=1.0):
    """A rectangle of the other image, of a share 1 - weight of the area, weight ~ Beta(alpha, alpha).

    Yun et al., 2019, arXiv:1905.04899. Its centre is uniform; what lies outside of the image is cut off, and the labels
    are weighted by what is left.
    """
    key_weight, key_box = jax.random.split(key)
    return _mix(images, targets, _outside_of_a_box(key_box, images, jax.random.beta(key_weight, alpha, alpha)))


def mixup_or_cutmix(key, images, targets, mixup_alpha=0.8, cutmix_alpha=1.0):
    """One of the two, each with probability one half, for the whole batch: as timm does where both are on."""
    key_which, key_weight, key_box = jax.random.split(key, 3)
    cut = jax.random.bernoulli(key_which)
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    weight = jax.random.beta(key_weight, alpha, alpha)
    own = jnp.where(cut, _outside_of_a_box(key_box, images, weight), _everywhere(images, weight))
    return _mix(images, targets, own)


MIXINGS = {"mixup": mixup, "cutmix": cutmix, "mixup_or_cutmix": mixup_or_cutmix}


def _mix(images, targets, own: Float[Array, "h w 1"]):
    """`own` is how much of each pixel is kept; the labels are weighted by its mean."""
    weight = own.mean()
    return own * images + (1 - own) * images[::-1], weight * targets + (1 - weight) * targets[::-1]


def _everywhere(images, weight):
    return jnp.full((*images.shape[1:3], 1), weight)


def _outside_of_a_box(key, images, weight):
    height, width = images.shape[1:3]
    centre = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array([height, width]))

    def inside(centre, size):
        half = jnp.floor(size * jnp.sqrt(1 - weight)) // 2
        distance = jnp.arange(size) - centre
        return (distance >= -half) & (distance < half)

    box = inside(centre[0], height)[:, None] & inside(centre[1], width)
    return 1.0 - box[..., None]
