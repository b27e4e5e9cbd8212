"""Random transformations of a batch of images, on the device, inside the jitted step.

Each is `(key, images [b, h, w, 3] float in [0, 1], image_size) -> images [b, image_size or h, ...]`.
`apply` runs the chosen ones in order, cuts what is still too large to `image_size`, and normalises.
"""

import jax
import jax.numpy as jnp

from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing


def flip(key, images, image_size):
    """Mirrors each image left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def pad_crop(key, images, image_size):
    """Pads by an eighth of the side with zeros and cuts a random square: the CIFAR recipe (4 pixels at 32)."""
    pad = image_size // 8
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _random_window(key, padded, image_size)


def random_crop(key, images, image_size):
    """Cuts a random square of `image_size` from a larger image."""
    return _random_window(key, images, image_size)


def _random_window(key, images, size):
    b, h, w, c = images.shape
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - size + 1, w - size + 1]))
    cut = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, c))  # noqa: E731
    return jax.vmap(cut)(images, corners)


def resized_crop(key, images, image_size, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Cuts a random rectangle and resizes it to `image_size`: the ImageNet recipe (Szegedy et al. 2015).

    The area is a uniform fraction of the image, the aspect ratio log-uniform. A rectangle that would
    not fit is narrowed to the image's side.
    """
    b, h, w, c = images.shape
    key_area, key_ratio, key_y, key_x = jax.random.split(key, 4)
    target = h * w * jax.random.uniform(key_area, (b,), minval=area[0], maxval=area[1])
    aspect = jnp.exp(jax.random.uniform(key_ratio, (b,), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1])))
    height, width = jnp.minimum(jnp.sqrt(target / aspect), h), jnp.minimum(jnp.sqrt(target * aspect), w)
    y = jax.random.uniform(key_y, (b,)) * (h - height)
    x = jax.random.uniform(key_x, (b,)) * (w - width)
    scale = jnp.stack([image_size / height, image_size / width], -1)
    shift = jnp.stack([-y, -x], -1) * scale

    def resize(image, scale, shift):
        return jax.image.scale_and_translate(image, (image_size, image_size, c), (0, 1), scale, shift, "linear")

    return jax.vmap(resize)(images, scale, shift)


def color_jitter(key, images, image_size, strength=0.4):
    """Scales brightness, contrast and saturation each by a uniform factor in [1 - strength, 1 + strength]."""
    factors = jax.random.uniform(
        key, (3, images.shape[0], 1, 1, 1), images.dtype, minval=1 - strength, maxval=1 + strength
    )
    images = images * factors[0]
    gray = _luminance(images)
    mean = gray.mean((1, 2, 3), keepdims=True)
    images = mean + (images - mean) * factors[1]
    gray = _luminance(images)
    return jnp.clip(gray + (images - gray) * factors[2], 0, 1)


def _luminance(images):
    return (images * jnp.array([0.299, 0.587, 0.114], images.dtype)).sum(-1, keepdims=True)


AUGMENTATIONS = {
    "flip": flip,
    "pad_crop": pad_crop,
    "random_crop": random_crop,
    "resized_crop": resized_crop,
    "color_jitter": color_jitter,
}


def apply(key, images, names: tuple[str, ...], preprocessing: Preprocessing):
    """uint8 [b, host_size, host_size, 3] -> augmented and normalised, float32 [b, image_size, image_size, 3]."""
    images = images.astype(jnp.float32) / 255
    for i, name in enumerate(names):
        function = choose(AUGMENTATIONS, name, "augmentation")
        images = function(jax.random.fold_in(key, i), images, preprocessing.image_size)
    return _normalise(_centre(images, preprocessing.image_size), preprocessing)


def evaluation_view(images, preprocessing: Preprocessing):
    """uint8 [b, host_size, host_size, 3] -> the centre, normalised, float32 [b, image_size, image_size, 3]."""
    return _normalise(_centre(images.astype(jnp.float32) / 255, preprocessing.image_size), preprocessing)


def _centre(images, size):
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images[:, top : top + size, left : left + size]


def _normalise(images, preprocessing):
    mean, std = (jnp.asarray(v, images.dtype) for v in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std
