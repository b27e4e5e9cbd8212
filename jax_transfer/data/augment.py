"""Random transformations of a batch of images, on the device, inside the jitted step.

Each is `(key, images [b, h, w, 3] float in [0, 1], preprocessing) -> images [b, image_size or h, ...]`.
`view` runs the chosen ones, and those of `data.mixing`, in order, cuts what is still too large to
`preprocessing.image_size`, and normalises; `views` makes all that an objective asks for.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jax_transfer.choose import choose
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.rand_augment import rand_augment
from jax_transfer.data.transforms import Preprocessing, crop_start
from jax_transfer.records import Batch, Views


def flip(key, images, preprocessing):
    """Mirrors each image left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def pad_crop(key, images, preprocessing):
    """Pads by an eighth of the side with zeros and cuts a random square: the CIFAR recipe (4 pixels at 32)."""
    pad = preprocessing.image_size // 8
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _random_window(key, padded, preprocessing.image_size)


def random_crop(key, images, preprocessing):
    """Cuts a random square of the model's size from a larger image."""
    return _random_window(key, images, preprocessing.image_size)


def _random_window(key, images, size):
    b, h, w, c = images.shape
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - size + 1, w - size + 1]))
    cut = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, c))  # noqa: E731
    return jax.vmap(cut)(images, corners)


def resized_crop(key, images, preprocessing, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Cuts a random rectangle and resizes it to the model's size: the ImageNet recipe (Szegedy et al. 2015).

    The area is a uniform fraction of the image, the aspect ratio log-uniform. A rectangle that would
    not fit is narrowed to the image's side.
    """
    b, h, w, c = images.shape
    image_size = preprocessing.image_size
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


def color_jitter(key, images, preprocessing, strength=0.4):
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


def random_erase(key, images, preprocessing, probability=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)):
    """Fills a random rectangle of some images with noise (Zhong et al., 2017, arXiv:1708.04896; timm's mode "pixel").

    The area is a uniform fraction of the image, height / width log-uniform. Of ten rectangles the first that fits is
    taken. timm erases after normalisation, with N(0, 1) noise; here the noise is N(mean, std^2) of the preprocessing,
    which becomes the same when the images are normalised. So values may leave [0, 1]: this one comes last.
    """
    b, h, w, _ = images.shape
    key_shape, key_place, key_noise = jax.random.split(key, 3)
    shape, place = jax.random.uniform(key_shape, (2, b, 10)), jax.random.uniform(key_place, (3, b, 1))
    target = h * w * (area[0] + (area[1] - area[0]) * shape[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape[1]
    heights, widths = jnp.round(jnp.sqrt(target * aspect)), jnp.round(jnp.sqrt(target / aspect))
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits, 1, keepdims=True)
    erased = (place[0] < probability) & fits.any(1, keepdims=True)

    def inside(place, sizes, side):
        size = jnp.take_along_axis(sizes, first, 1)
        start = jnp.floor(place * (side - size + 1))
        places = jnp.arange(side)
        return (places >= start) & (places < start + size)

    box = (erased & inside(place[1], heights, h))[:, :, None] & inside(place[2], widths, w)[:, None, :]
    mean, std = (jnp.asarray(v, images.dtype) for v in (preprocessing.mean, preprocessing.std))
    return jnp.where(box[..., None], mean + std * jax.random.normal(key_noise, images.shape, images.dtype), images)


AUGMENTATIONS = {
    "flip": flip,
    "pad_crop": pad_crop,
    "random_crop": random_crop,
    "resized_crop": resized_crop,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
    "random_erase": random_erase,
}


def view(key, batch: Batch, names: tuple[str, ...], preprocessing: Preprocessing, num_classes: int):
    """One view of a batch: augmented, mixed and normalised.

    Args:
      batch: images uint8 [b, host_size, host_size, 3], labels int [b].
      names: keys of AUGMENTATIONS and MIXINGS.

    Returns:
      (images float32 [b, image_size, image_size, 3], labels). The labels stay as they are without a mixing; with one they
      are float32 [b, num_classes], a distribution over the classes for each image.
    """
    images, labels = batch.images.astype(jnp.float32) / 255, batch.labels
    for i, name in enumerate(names):
        function, one_key = choose({**AUGMENTATIONS, **MIXINGS}, name, "augmentation"), jax.random.fold_in(key, i)
        if name in MIXINGS:
            targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes)
            images, labels = function(one_key, images, targets)
        else:
            images = function(one_key, images, preprocessing)
    return _normalise(_centre(images, preprocessing.image_size), preprocessing), labels


_VIEW = 1000  # beyond the places of augmentations, whose keys are folded in from 0 on


def views(
    key,
    batches: Mapping[str, Batch],
    names: Mapping[str, Sequence[tuple[str, ...]]],
    preprocessing: Preprocessing,
    num_classes: Mapping[str, int],
) -> dict[str, Views]:
    """What an objective sees of a step: the views of each feed that it names.

    Args:
      batches: feed -> batch.
      names: feed -> augmentations of each of its views (`Objective.views`).
      num_classes: feed -> number of classes of its labels.

    Returns:
      feed -> Views. The very first view is drawn from `key` itself, each further one from a key of its own.
    """
    place, found = 0, {}
    for feed, each in names.items():
        batch, images = batches[feed], []
        for augmentations in each:
            own = jax.random.fold_in(key, _VIEW + place) if place else key
            seen = view(own, batch, tuple(augmentations), preprocessing, num_classes[feed])
            images.append(seen[0])
            labels = seen[1] if len(images) == 1 else labels
            place += 1
        found[feed] = Views(tuple(images), labels, batch.mask, batch.extra)
    return found


def evaluation_view(images, preprocessing: Preprocessing):
    """uint8 [b, host_size, host_size, 3] -> the centre, normalised, float32 [b, image_size, image_size, 3]."""
    return _normalise(_centre(images.astype(jnp.float32) / 255, preprocessing.image_size), preprocessing)


def _centre(images, size):
    top, left = (crop_start(side, size) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def _normalise(images, preprocessing):
    mean, std = (jnp.asarray(v, images.dtype) for v in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std
