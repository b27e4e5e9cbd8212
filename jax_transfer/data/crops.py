"""Random crops of full images: which window each image of a batch shows, and cutting it on the host or on the device.

A view whose list of augmentations begins with a key of CROPS is cut from the full image, and not from the square that
evaluation sees. A feed draws the windows of a step on the host, from its seed and the number of the step alone, so the
windows are the same for streamed and resident data, any number of devices, processes and steps per call, and after
resuming. Boxes follow torchvision's `RandomResizedCrop`, and windows equal its `resized_crop` of PIL images. To keep
that, files are decoded whole: decoding at a smaller scale changes pixels by several grey levels even if the window is
shrunk thirty times (measured in docs/results/benchmarks).
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from jax_transfer.data.transforms import INTERPOLATIONS, to_uint8_rgb

ATTEMPTS = 10  # boxes drawn for an image before the central fallback, as in torchvision


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random rectangle that is resized to a square, the usual crop for ImageNet (Szegedy et al., 2015).

    Attributes:
      area: smallest and largest fraction of the image's area; the fraction is uniform.
      ratio: smallest and largest width / height; its logarithm is uniform.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


CROPS = {
    "resized_crop": Crop(),
    "resized_crop_20": Crop(area=(0.2, 1.0)),  # MoCo v2
    "resized_crop_90": Crop(area=(0.9, 1.0)),  # CLIP
    "global_crop": Crop(area=(0.4, 1.0)),  # DINO
    "local_crop": Crop(area=(0.05, 0.4)),  # DINO
}


def crops_of(views: Sequence[Sequence[str]]) -> tuple[Crop | None, ...]:
    """Returns the crop of each view, or None for a view that shows the central square.

    Args:
      views: names of the augmentations of each view (`Objective.views` of one feed).

    >>> crops_of((("resized_crop", "flip"), ("pad_crop",), ()))
    (Crop(area=(0.08, 1.0), ratio=(0.75, 1.3333333333333333)), None, None)
    """
    return tuple(CROPS.get(names[0]) if names else None for names in views)


def draws(seed: int, step: int, batch_size: int, window: int = 0) -> Float[np.ndarray, "b 22"]:
    """Returns the uniform numbers in [0, 1) that determine one window of each image of a step.

    They come from a counter (Philox), so no earlier step has to be drawn. Each image has its own row.

    Args:
      window: number of the window; images have several if several views have a crop.

    >>> draws(seed=0, step=5, batch_size=4).shape
    (4, 22)
    """
    bits = np.random.Philox(key=[seed % 2**64, 0xC0], counter=[0, 0, window, step])
    numbers = bits.random_raw(batch_size * (2 * ATTEMPTS + 2)).reshape(batch_size, -1)
    return (numbers >> np.uint64(11)) * 2.0**-53


def boxes(
    crop: Crop, uniforms: Float[np.ndarray, "b 22"], heights: Int[np.ndarray, "b"], widths: Int[np.ndarray, "b"]
) -> Int[np.ndarray, "b 4"]:
    """Returns the windows (top, left, height, width) in pixels that `uniforms`, see `draws`, choose in each image.

    Of ten drawn shapes the first one that fits into the image is placed at a uniform position. If none fits, the window
    is the largest central one whose ratio is closest to that of the image, as in torchvision.

    >>> box = boxes(Crop(area=(1.0, 1.0), ratio=(1.0, 1.0)), draws(0, 0, 1), np.array([30]), np.array([40]))
    >>> box.tolist()  # no square has the area of the image
    [[0, 5, 30, 30]]
    """
    area, ratio = uniforms[:, :ATTEMPTS], uniforms[:, ATTEMPTS : 2 * ATTEMPTS]
    least, most = crop.ratio
    target = (heights * widths)[:, None] * (crop.area[0] + (crop.area[1] - crop.area[0]) * area)
    aspect = np.exp(np.log(least) + (np.log(most) - np.log(least)) * ratio)
    tall, wide = np.round(np.sqrt(target / aspect)), np.round(np.sqrt(target * aspect))
    fits = (tall > 0) & (tall <= heights[:, None]) & (wide > 0) & (wide <= widths[:, None])
    first, drawn = np.argmax(fits, 1), fits.any(1)
    rows = np.arange(len(uniforms))
    narrow, broad = widths < least * heights, widths > most * heights
    height = np.where(drawn, tall[rows, first], np.where(narrow, np.maximum(np.round(widths / least), 1), heights))
    width = np.where(drawn, wide[rows, first], np.where(broad, np.maximum(np.round(heights * most), 1), widths))
    top = np.where(drawn, np.floor(uniforms[:, -2] * (heights - height + 1)), (heights - height) // 2)
    left = np.where(drawn, np.floor(uniforms[:, -1] * (widths - width + 1)), (widths - width) // 2)
    return np.stack([top, left, height, width], 1).astype(np.int32)


def window(image: np.ndarray, box, size: int, interpolation: str) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts a window (top, left, height, width) from an image [h, w, c] and resizes it with antialiasing, on the host.

    Args:
      size: side of the result in pixels.
      interpolation: a key of FILTERS.

    >>> window(np.zeros((30, 40), np.uint8), (5, 0, 20, 30), 16, "bilinear").shape
    (16, 16, 3)
    """
    top, left, height, width = box
    part = to_uint8_rgb(image)[top : top + height, left : left + width]
    return np.asarray(Image.fromarray(part).resize((size, size), INTERPOLATIONS[interpolation]))


def windows(
    images: UInt8[Array, "b h w 3"], boxes: Float[Array, "b 4"], size: int, interpolation: str
) -> UInt8[Array, "b size size 3"]:
    """Cuts a window (top, left, height, width) from each image and resizes it, on the device; see `window`.

    Windows of whole pixels equal those of `window` to one grey level. With negative weights (bicubic, lanczos), the few
    pixels that PIL clips between its two passes may differ by more.

    Args:
      boxes: in pixels of `images`; they need not be whole.
      interpolation: a key of FILTERS.

    >>> windows(jnp.zeros((2, 30, 40, 3), jnp.uint8), jnp.array([[5, 0, 20, 30]] * 2), 16, "bilinear").shape
    (2, 16, 16, 3)
    """
    top, left, height, width = jnp.asarray(boxes, jnp.float32).T
    rows = _weights(top, height, size, images.shape[1], interpolation)
    columns = _weights(left, width, size, images.shape[2], interpolation)
    # The precision is that of the pixels; by default, accelerators would round the weights to 8 bits.
    narrow = jnp.einsum("bwk,bhkc->bhwc", columns, images.astype(jnp.float32), precision="high")
    resized = jnp.einsum("bhk,bkwc->bhwc", rows, narrow, precision="high")
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def _weights(start, length, size: int, pixels: int, interpolation: str) -> Float[Array, "b {size} {pixels}"]:
    """Returns the weight of each pixel of a line in each pixel of the resized part of the line, as PIL computes it.

    Args:
      start, length: the part of each line, [b], in pixels.
    """
    scale = (length / size)[:, None, None]
    centre = (jnp.arange(size)[:, None] + 0.5) * scale
    pixel = jnp.arange(pixels) - start[:, None, None]
    inside = (pixel > -1) & (pixel < length[:, None, None])
    weights = jnp.where(inside, FILTERS[interpolation]((pixel + 0.5 - centre) / jnp.maximum(scale, 1)), 0.0)
    return weights / weights.sum(-1, keepdims=True)


def _bicubic(x):
    x = jnp.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


# Interpolations of crops -> the weight of a pixel at a distance from the centre, as in PIL.
FILTERS = {
    "bilinear": lambda x: jnp.maximum(1 - jnp.abs(x), 0.0),
    "hamming": lambda x: jnp.where(jnp.abs(x) < 1, jnp.sinc(x) * (0.54 + 0.46 * jnp.cos(jnp.pi * x)), 0.0),
    "bicubic": _bicubic,
    "lanczos": lambda x: jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0.0),
}


def shrink(image: np.ndarray, most: int, interpolation: str) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes each side of an image [h, w, c] that is longer than `most` pixels to `most`; its content stays whole.

    >>> shrink(np.zeros((30, 50), np.uint8), 40, "bilinear").shape
    (30, 40, 3)
    """
    image = to_uint8_rgb(image)
    height, width = (min(side, most) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))
