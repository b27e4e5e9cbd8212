"""Random augmentations of a batch of images, computed on the device inside the jitted step.

Each augmentation is a function `(key, images, preprocessing) -> images` with images float [b, h, w, 3] in [0, 1]; the
result is [b, image_size, image_size, 3] or has the same shape as the images. `view` applies a list of augmentations
(and of the functions in `data.mixing`) in order, crops the centre to `preprocessing.image_size` if the images are still
larger, and normalises. `views` computes all the views that an objective asks for. A crop of the full image
(`data.crops`), which a list can only begin with, is not among the augmentations: the feed has already cut its window.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jax_transfer.choose import choose
from jax_transfer.data import photometric
from jax_transfer.data.crops import CROPS, crops_of
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.photometric import luma
from jax_transfer.data.rand_augment import rand_augment
from jax_transfer.data.rand_augment_fixmatch import rand_augment_fixmatch
from jax_transfer.data.transforms import Preprocessing, crop_start
from jax_transfer.records import Batch, Views


def flip(key, images, preprocessing):
    """Mirrors each image left to right with probability 1/2.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> flip(jax.random.key(0), images, None).shape
    (1, 2, 2, 1)
    """
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def pad_crop(key, images, preprocessing):
    """Pads each side with image_size // 8 zeros and crops a random square: the CIFAR recipe (4 pixels at size 32).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> pad_crop(jax.random.key(0), jnp.ones((2, 32, 32, 3)), Preprocessing(image_size=32)).shape
    (2, 32, 32, 3)
    """
    pad = preprocessing.image_size // 8
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _random_window(key, padded, preprocessing.image_size)


def random_crop(key, images, preprocessing):
    """Crops a random square with side `preprocessing.image_size` from each image.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> random_crop(jax.random.key(0), jnp.ones((2, 40, 40, 3)), Preprocessing(image_size=32)).shape
    (2, 32, 32, 3)
    """
    return _random_window(key, images, preprocessing.image_size)


def _random_window(key, images, size):
    """Crops a square with side `size` from each image, at a uniformly random position."""
    b, h, w, c = images.shape
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - size + 1, w - size + 1]))
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, c))  # noqa: E731
    return jax.vmap(crop)(images, corners)


def color_jitter(key, images, preprocessing, strength=0.4):
    """Scales brightness, contrast and saturation, each by a uniform factor in [1 - strength, 1 + strength].

    >>> import jax
    >>> import jax.numpy as jnp
    >>> gray = jnp.full((1, 2, 2, 3), 0.5)
    >>> jittered = color_jitter(jax.random.key(0), gray, None)
    >>> bool(((0.3 <= jittered) & (jittered <= 0.7)).all())  # only the brightness of a gray image changes
    True
    """
    factors = jax.random.uniform(
        key, (3, images.shape[0], 1, 1, 1), images.dtype, minval=1 - strength, maxval=1 + strength
    )
    images = images * factors[0]
    gray = luma(images)
    mean = gray.mean((1, 2, 3), keepdims=True)
    images = mean + (images - mean) * factors[1]
    gray = luma(images)
    return jnp.clip(gray + (images - gray) * factors[2], 0, 1)


def jitter(key, images, preprocessing, probability=0.8, strength=0.4, saturation=0.4, hue=0.1):
    """Changes brightness, contrast, saturation and hue of some images, in a random order: torchvision's ColorJitter.

    The factors of the first two are uniform in [1 - strength, 1 + strength], that of the saturation is uniform in
    [1 - saturation, 1 + saturation], and the shift of the hue in [-hue, hue]. The defaults are those of MoCo v2 and
    SLIP; "jitter_byol" has the saturation of BYOL and DINO, 0.2.

    Args:
      probability: share of the images that are changed.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> gray = jnp.full((1, 2, 2, 3), 0.5)
    >>> jittered = jitter(jax.random.key(0), gray, None)
    >>> bool(((0.3 <= jittered) & (jittered <= 0.7)).all())  # only the brightness of a gray image changes
    True
    """
    b = len(images)
    key_factors, key_shift, key_order, key_chosen = jax.random.split(key, 4)
    strengths = jnp.array([[strength], [strength], [saturation]])
    factors = jax.random.uniform(key_factors, (3, b), minval=1 - strengths, maxval=1 + strengths)
    shifts = jax.random.uniform(key_shift, (b,), minval=-hue, maxval=hue)
    # Each image has an order of the three blends, and a number of blends that come before its hue is turned: the hue,
    # the most costly of the four, is computed once.
    order = jnp.argsort(jax.random.uniform(key_order, (b, 4)), -1)
    blends = jnp.argsort(order[:, :3], -1)  # [b, 3], in the order in which they are made
    num_before = order[:, 3]

    def blended(changed, index, wanted):
        kind = blends[:, index].reshape(-1, 1, 1, 1)
        gray = luma(changed)
        other = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, gray.mean((1, 2, 3), keepdims=True), gray))
        chosen = jnp.take_along_axis(factors, blends[:, index][None], 0)[0]
        return photometric.blend(changed, other, jnp.where(wanted, chosen, 1.0))

    changed = images
    for index in range(3):
        changed = blended(changed, index, index < num_before)
    changed = photometric.adjust_hue(changed, shifts)
    for index in range(3):
        changed = blended(changed, index, index >= num_before)
    return jnp.where(_drawn(key_chosen, b, probability), changed, images)


def gray(key, images, preprocessing, probability=0.2):
    """Removes the colours of some images.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> red = jnp.array([[[[1.0, 0.0, 0.0]]]])
    >>> [round(x, 3) for x in gray(jax.random.key(0), red, None, probability=1.0).ravel().tolist()]
    [0.299, 0.299, 0.299]
    """
    return jnp.where(_drawn(key, len(images), probability), luma(images), images)


def blur(key, images, preprocessing, probability=0.5, sigma=(0.1, 2.0)):
    """Blurs some images with a Gaussian, whose standard deviation in pixels is uniform between those of `sigma`.

    The range is the one that SimCLR, MoCo v2 and DINO use for images of 224 pixels.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> blur(jax.random.key(0), jnp.ones((2, 16, 16, 3)), None).shape
    (2, 16, 16, 3)
    """
    key_sigma, key_chosen = jax.random.split(key)
    sigmas = jax.random.uniform(key_sigma, (len(images),), minval=sigma[0], maxval=sigma[1])
    chosen = _drawn(key_chosen, len(images), probability).reshape(-1)
    radius = min(photometric.blur_radius(sigma[1]), min(images.shape[1:3]) - 1)
    return photometric.gaussian_blur(images, jnp.where(chosen, sigmas, 0.0), radius)


def solarize(key, images, preprocessing, probability=0.2):
    """Inverts the values of some images that are at least 128 of 255.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> solarize(jax.random.key(0), jnp.ones((1, 1, 1, 3)), None, probability=1.0).tolist()
    [[[[0.0, 0.0, 0.0]]]]
    """
    return jnp.where(_drawn(key, len(images), probability), photometric.solarize(images), images)


def _drawn(key, count: int, probability: float):
    """Draws which images are changed, [b, 1, 1, 1]."""
    return jax.random.bernoulli(key, probability, (count, 1, 1, 1))


def random_erase(key, images, preprocessing, probability=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)):
    """Fills a random rectangle of some images with noise (Zhong et al., 2017, arXiv:1708.04896; timm's mode "pixel").

    The area is a uniform fraction of the image and height / width is log-uniform. Ten rectangles are drawn, and the
    first one that fits is used. timm erases after normalisation, with N(0, 1) noise. Here the noise is N(mean, std^2)
    with the mean and std of the preprocessing, which normalisation turns into N(0, 1). Values may therefore lie outside
    [0, 1]: make this the last augmentation.

    Args:
      probability: share of the images in which a rectangle is erased.
      area: smallest and largest fraction of the image's area.
      ratio: smallest and largest height / width.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> images, preprocessing = jnp.zeros((4, 16, 16, 3)), Preprocessing(image_size=16)
    >>> erased = random_erase(jax.random.key(0), images, preprocessing, probability=1.0)
    >>> (erased != 0).any((1, 2, 3)).tolist()
    [True, True, True, True]
    """
    b, h, w, _ = images.shape
    key_shape, key_position, key_noise = jax.random.split(key, 3)
    shape, position = jax.random.uniform(key_shape, (2, b, 10)), jax.random.uniform(key_position, (3, b, 1))
    target = h * w * (area[0] + (area[1] - area[0]) * shape[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape[1]
    heights, widths = jnp.round(jnp.sqrt(target * aspect)), jnp.round(jnp.sqrt(target / aspect))
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits, 1, keepdims=True)
    erased = (position[0] < probability) & fits.any(1, keepdims=True)

    def inside(position, sizes, side):
        """Returns the mask [b, side] of the coordinates that the rectangle covers along one axis."""
        size = jnp.take_along_axis(sizes, first, 1)
        start = jnp.floor(position * (side - size + 1))
        coordinates = jnp.arange(side)
        return (coordinates >= start) & (coordinates < start + size)

    box = (erased & inside(position[1], heights, h))[:, :, None] & inside(position[2], widths, w)[:, None, :]
    mean, std = (jnp.asarray(v, images.dtype) for v in (preprocessing.mean, preprocessing.std))
    return jnp.where(box[..., None], mean + std * jax.random.normal(key_noise, images.shape, images.dtype), images)


AUGMENTATIONS = {
    "flip": flip,
    "pad_crop": pad_crop,
    "random_crop": random_crop,
    "color_jitter": color_jitter,
    "jitter": jitter,
    "jitter_byol": functools.partial(jitter, saturation=0.2),
    "gray": gray,
    "blur": blur,
    "blur_always": functools.partial(blur, probability=1.0),
    "blur_rarely": functools.partial(blur, probability=0.1),
    "solarize": solarize,
    "rand_augment": rand_augment,
    "rand_augment_fixmatch": rand_augment_fixmatch,
    "random_erase": random_erase,
}


def view(key, batch: Batch, names: tuple[str, ...], preprocessing: Preprocessing, num_classes: int):
    """Returns one view of a batch: augmented, mixed and normalised.

    Args:
      batch: images uint8 [b, host_size, host_size, 3], or windows cut by a crop; labels int [b].
      names: keys of AUGMENTATIONS and MIXINGS, applied in this order; the first one may be a key of CROPS.
      num_classes: number of classes of the labels; only a mixing uses it.

    Returns:
      (images float32 [b, image_size, image_size, 3], labels). After a mixing, the labels are float32 [b, num_classes],
      a distribution over the classes for each image; otherwise they are those of the batch.

    Raises:
      InputError: if a name is unknown.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> batch = Batch(jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.array([0, 2]), jnp.ones(2, bool), {})
    >>> images, labels = view(jax.random.key(0), batch, ("flip", "mixup"), Preprocessing(image_size=8), num_classes=3)
    >>> images.shape, labels.shape
    ((2, 8, 8, 3), (2, 3))
    """
    images, labels = batch.images.astype(jnp.float32) / 255, batch.labels
    for i, name in enumerate(names):
        if i == 0 and name in CROPS:  # done by the feed
            continue
        augment, augment_key = choose({**AUGMENTATIONS, **MIXINGS}, name, "augmentation"), jax.random.fold_in(key, i)
        if name in MIXINGS:
            targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes)
            images, labels = augment(augment_key, images, targets)
        else:
            images = augment(augment_key, images, preprocessing)
    return _normalise(_centre(images, preprocessing.image_size), preprocessing), labels


# Views fold numbers above this offset into the key. The augmentations of a view fold in 0, 1, 2, ...
_VIEW_OFFSET = 1000


def views(
    key,
    batches: Mapping[str, Batch],
    names: Mapping[str, Sequence[tuple[str, ...]]],
    preprocessing: Preprocessing,
    num_classes: Mapping[str, int],
) -> dict[str, Views]:
    """Returns the views of one step that an objective asks for, for each feed.

    Args:
      batches: feed -> batch.
      names: feed -> the augmentations of each of its views (`Objective.views`).
      num_classes: feed -> number of classes of its labels.

    Returns:
      feed -> Views, with the labels of the feed's first view. A view that begins with a crop shows the next window of
      the batch. The very first view uses `key` itself; each later one uses a key folded from it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> batch = Batch(jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.array([0, 2]), jnp.ones(2, bool), {})
    >>> names = {"source": ((), ("flip",))}  # two views: the plain images, and flipped ones
    >>> seen = views(jax.random.key(0), {"source": batch}, names, Preprocessing(image_size=8), {"source": 3})
    >>> [images.shape for images in seen["source"].images]
    [(2, 8, 8, 3), (2, 8, 8, 3)]
    """
    number, result = 0, {}
    for feed, augmentations_of_views in names.items():
        batch, images = batches[feed], []
        windows = iter(batch.windows)
        if len(batch.windows) != (cropped := sum(map(bool, crops_of(augmentations_of_views)))):
            raise ValueError(
                f"The batches of feed {feed!r} have {len(batch.windows)} windows, but {cropped} of its views begin "
                "with a crop: make the feed with make_feed(..., crops=crops_of(views))."
            )
        labels = jnp.asarray(batch.labels)  # replaced by the labels of the first view
        for augmentations, crop in zip(augmentations_of_views, crops_of(augmentations_of_views), strict=True):
            view_key = jax.random.fold_in(key, _VIEW_OFFSET + number) if number else key
            seen = dataclasses.replace(batch, images=next(windows)) if crop else batch
            view_images, view_labels = view(view_key, seen, tuple(augmentations), preprocessing, num_classes[feed])
            images.append(view_images)
            labels = view_labels if len(images) == 1 else labels
            number += 1
        result[feed] = Views(tuple(images), labels, batch.mask, batch.extra)
    return result


def evaluation_view(images, preprocessing: Preprocessing):
    """Crops the centre and normalises, without augmentation.

    uint8 [b, host_size, host_size, 3] -> float32 [b, image_size, image_size, 3].

    >>> import jax.numpy as jnp
    >>> preprocessing = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> images = evaluation_view(jnp.full((1, 8, 8, 3), 255, jnp.uint8), preprocessing)
    >>> images.shape, float(images.max())
    ((1, 8, 8, 3), 1.0)
    """
    return _normalise(_centre(images.astype(jnp.float32) / 255, preprocessing.image_size), preprocessing)


def _centre(images, size):
    top, left = (crop_start(side, size) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def _normalise(images, preprocessing):
    mean, std = (jnp.asarray(v, images.dtype) for v in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std
