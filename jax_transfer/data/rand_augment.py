"""RandAugment (Cubuk et al., 2019, arXiv:1909.13719) as in timm's "rand-m9-mstd0.5-inc1", computed on the device.

Two operations are drawn for each image, with replacement. Each runs with probability 1/2, at a magnitude drawn from
N(9, 0.5^2) and clipped to [0, 10]. Every operation gives the same result as PIL on uint8 images, up to rounding.

Images of a batch have different operations, and `lax.switch` under vmap would compute all fifteen for every image. The
operations are therefore merged by kind: eight of them are tables of 256 values per image and channel, five are affine
warps, and colour and sharpness blend the image with another one. For each of its two operations, an image thus costs
one histogram, one table look-up, one warp and one blend. A loop over the images with a real switch computes less, but
runs on one core, kernel by kernel (on two CPU cores, 32 ms instead of 18 ms per operation for 64 images of 64 x 64
pixels), and would gather a batch that is split over devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.numerics import positive

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
NOTHING = len(OPERATIONS)
TABLES = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness")
ENHANCEMENTS = ("color", "contrast", "brightness", "sharpness")

NUM_OPERATIONS = 2  # per image
PROBABILITY = 0.5  # probability that an operation runs
MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 9.0, 0.5, 10.0


def rand_augment(key, images: Float[Array, "b h w 3"], preprocessing: Preprocessing) -> Float[Array, "b h w 3"]:
    """Applies two random operations to each image; the images are in [0, 1].

    Pixels that a warp leaves uncovered are filled with `preprocessing.mean`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> augment = lambda key, images: rand_augment(key, images, Preprocessing(image_size=8))
    >>> jax.eval_shape(augment, jax.random.key(0), jnp.full((2, 8, 8, 3), 0.5)).shape
    (2, 8, 8, 3)
    """
    shape = (NUM_OPERATIONS, len(images))
    key_operation, key_runs, key_magnitude, key_negate = jax.random.split(key, 4)
    operation = jax.random.randint(key_operation, shape, 0, len(OPERATIONS))
    operation = jnp.where(jax.random.bernoulli(key_runs, PROBABILITY, shape), operation, NOTHING)
    magnitude = MAGNITUDE + MAGNITUDE_STD * jax.random.normal(key_magnitude, shape)
    level = jnp.clip(magnitude / MAX_MAGNITUDE, 0, 1)
    negate = jax.random.bernoulli(key_negate, 0.5, shape)
    pixels = jnp.round(images * 255)  # PIL's uint8
    fill = jnp.round(255 * jnp.asarray(preprocessing.mean, jnp.float32))
    for i in range(NUM_OPERATIONS):
        pixels = operate(pixels, operation[i], level[i], negate[i], fill)
    return pixels / 255


def operate(
    pixels: Float[Array, "b h w 3"],
    operation: Int[Array, " b"],
    level: Float[Array, " b"],
    negate: Bool[Array, " b"],
    fill: Float[Array, " 3"],
) -> Float[Array, "b h w 3"]:
    """Applies one operation to each image, as timm does with PIL.

    Args:
      pixels: integers from 0 to 255, as floats.
      operation: indices into OPERATIONS; NOTHING leaves an image unchanged.
      level: magnitude / 10, in [0, 1].
      negate: whether to reverse an operation that has two directions, such as a rotation.
      fill: colour, from 0 to 255, of the pixels that a warp leaves uncovered.

    Returns:
      The images, with integers from 0 to 255, as floats.

    >>> import jax, jax.numpy as jnp
    >>> pixels, invert = jnp.full((1, 4, 4, 3), 10.0), jnp.array([OPERATIONS.index("invert")])
    >>> jax.eval_shape(operate, pixels, invert, jnp.array([0.9]), jnp.array([False]), jnp.zeros(3)).shape
    (1, 4, 4, 3)
    """
    height, width = pixels.shape[1:3]
    amount = level * jnp.where(negate, -1.0, 1.0)
    arguments = {
        "rotate": 30 * amount,
        "posterize": 4 - jnp.floor(level * 4),
        "solarize": 256 - jnp.floor(level * 256),
        "solarize_add": jnp.floor(level * 110),
        **dict.fromkeys(ENHANCEMENTS, 1 + 0.9 * amount),
        "shear_x": 0.3 * amount,
        "shear_y": 0.3 * amount,
        "translate_x": 0.45 * amount * width,
        "translate_y": 0.45 * amount * height,
    }
    return apply(pixels, operation, argument_of(operation, arguments), fill)


def argument_of(operation: Int[Array, " b"], arguments: Mapping[str, Float[Array, " b"]]) -> Float[Array, " b"]:
    """Returns the argument of each image's operation from name of the operation -> argument; 0 if it takes none.

    >>> import jax.numpy as jnp
    >>> operation = jnp.array([OPERATIONS.index("rotate"), OPERATIONS.index("invert")])
    >>> argument_of(operation, {"rotate": jnp.array([12.0, 15.0])}).tolist()
    [12.0, 0.0]
    """
    chosen = jnp.zeros(operation.shape)
    for name, argument in arguments.items():
        chosen = jnp.where(_is(operation, name), argument, chosen)
    return chosen


def apply(
    pixels: Float[Array, "b h w 3"],
    operation: Int[Array, " b"],
    argument: Float[Array, " b"],
    fill: Float[Array, " 3"],
    bilinear: bool = True,
) -> Float[Array, "b h w 3"]:
    """Applies one operation of PIL to each image.

    Args:
      pixels: integers from 0 to 255, as floats.
      operation: indices into OPERATIONS; NOTHING leaves an image unchanged.
      argument: that of PIL's function: the factor of an enhancement, degrees of a rotation, bits that posterize keeps,
        the threshold of solarize, what solarize_add adds below 128, the slope of a shear, and pixels of a translation.
      fill: colour, from 0 to 255, of the pixels that a warp leaves uncovered.
      bilinear: how a warp samples pixels; False: it takes the nearest one.

    Returns:
      The images, with integers from 0 to 255, as floats.

    >>> import jax, jax.numpy as jnp
    >>> pixels, rotate = jnp.full((1, 4, 4, 3), 10.0), jnp.array([OPERATIONS.index("rotate")])
    >>> jax.eval_shape(apply, pixels, rotate, jnp.array([15.0]), jnp.zeros(3)).shape
    (1, 4, 4, 3)
    """
    gray = _gray(pixels)
    looked_up = _look_up(pixels, _tables(pixels, gray, operation, argument))
    degenerate = jnp.where(_is(operation, "color")[:, None, None, None], gray, _smooth(pixels))
    enhanced = _blend(degenerate, pixels, argument[:, None, None, None])
    warped = _warp(pixels, _matrices(operation, argument, *pixels.shape[1:3]), fill, bilinear)
    result = pixels
    for names, candidate in (
        (("color", "sharpness"), enhanced),
        (("rotate", "shear_x", "shear_y", "translate_x", "translate_y"), warped),
        (TABLES, looked_up),
    ):
        result = jnp.where(_is(operation, *names)[:, None, None, None], candidate, result)
    return result


def _is(operation, *names: str) -> Bool[Array, " b"]:
    """Returns a mask of the images whose operation has one of these names."""
    return jnp.isin(operation, jnp.array([OPERATIONS.index(name) for name in names]))


def _tables(pixels, gray, operation, argument) -> Float[Array, "b 3 256"]:
    """Returns a table of new pixel values per image and channel, for the operations in TABLES (else the old values)."""
    value = jnp.arange(256)
    counts = _histograms(pixels)
    argument = argument[:, None, None]
    whole = argument.astype(jnp.int32)
    present = counts > 0
    low = jnp.argmax(present, -1, keepdims=True)
    high = 255 - jnp.argmax(present[..., ::-1], -1, keepdims=True)
    stretched = jnp.where(high > low, jnp.clip((value - low) * 255 // positive(high - low), 0, 255), value)

    last = jnp.take_along_axis(counts, high, -1)
    step = (counts.sum(-1, keepdims=True) - last) // 255
    before = jnp.cumsum(counts, -1) - counts
    equalized = jnp.where(step > 0, jnp.minimum((step // 2 + before) // positive(step), 255), value)

    mean = jnp.floor(gray.mean((1, 2, 3)) + 0.5)[:, None, None]
    tables = {
        "auto_contrast": stretched,
        "equalize": equalized,
        "invert": 255 - value,
        "posterize": value >> (8 - whole) << (8 - whole),
        "solarize": jnp.where(value < whole, value, 255 - value),
        "solarize_add": jnp.where(value < 128, jnp.minimum(value + whole, 255), value),
        "contrast": _blend(mean, value, argument),
        "brightness": _blend(0.0, value, argument),
    }
    chosen = jnp.broadcast_to(value.astype(jnp.float32), counts.shape)
    for name, table in tables.items():
        chosen = jnp.where(_is(operation, name)[:, None, None], table, chosen)
    return chosen


def _histograms(pixels) -> Int[Array, "b 3 256"]:
    """Counts the values of each image and channel."""
    b, h, w, c = pixels.shape
    histogram = jnp.arange(b)[:, None, None] * c + jnp.arange(c)  # the index of each image and channel's histogram
    bins = histogram * 256 + pixels.reshape(b, h * w, c).astype(jnp.int32)
    return jnp.zeros(b * c * 256, jnp.int32).at[bins.ravel()].add(1).reshape(b, c, 256)


def _look_up(pixels, tables):
    """Replaces each pixel value with the entry for it in the tables [b, 3, 256]."""
    b, h, w, c = pixels.shape
    values = jnp.take_along_axis(tables.mT, pixels.reshape(b, h * w, c).astype(jnp.int32), axis=1)
    return values.reshape(pixels.shape)


def _gray(pixels) -> Float[Array, "b h w 1"]:
    """Returns the same as PIL's convert("L"): the luma of ITU-R 601-2, rounded to integers."""
    weighted = pixels.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return ((weighted.sum(-1, keepdims=True) + 0x8000) >> 16).astype(pixels.dtype)


def _blend(other, pixels, factor):
    """Blends like PIL's Image.blend: `other` at factor 0, `pixels` at 1; clipped to [0, 255] and rounded down."""
    return jnp.floor(jnp.clip(other + factor * (pixels - other), 0, 255))


def _smooth(pixels):
    """Smooths like PIL's ImageFilter.SMOOTH: a 3 x 3 mean with weight 5/13 on the centre; the border is unchanged."""
    h, w = pixels.shape[1:3]
    neighbourhood = sum(pixels[:, i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3))
    inner = jnp.floor((neighbourhood + 4 * pixels[:, 1:-1, 1:-1]) / 13 + 0.5)
    return pixels.at[:, 1:-1, 1:-1].set(inner)


def _matrices(operation, argument, height: int, width: int) -> Float[Array, "b 2 3"]:
    """Returns the affine map of each image, as in PIL's Image.AFFINE.

    The pixel at (x, y) of the result is read at matrix @ (x, y, 1) in the image.
    """
    zero, one = jnp.zeros_like(argument), jnp.ones_like(argument)
    angle = -jnp.deg2rad(argument)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    matrices = {
        "rotate": (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
        "shear_x": (one, argument, zero, zero, one, zero),
        "shear_y": (one, zero, zero, argument, one, zero),
        "translate_x": (one, zero, argument, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, argument),
    }
    chosen = jnp.stack([one, zero, zero, zero, one, zero], -1)
    for name, entries in matrices.items():
        chosen = jnp.where(_is(operation, name)[:, None], jnp.stack(entries, -1), chosen)
    return chosen.reshape(-1, 2, 3)


def _warp(pixels, matrices, fill, bilinear: bool):
    """Warps like PIL's Image.transform, bilinear (timm draws bilinear or bicubic at random) or to the nearest pixel."""
    b, h, w, c = pixels.shape
    centres = jnp.stack([*jnp.meshgrid(jnp.arange(w) + 0.5, jnp.arange(h) + 0.5), jnp.ones((h, w))], -1)
    # Sums instead of a matrix product, for which accelerators would keep only a few bits of the coordinates.
    x, y = ((matrices[:, i, None, None] * centres).sum(-1) for i in range(2))
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    flat = pixels.reshape(b, h * w, c)

    def at(row, column):
        """Returns the pixels at [b, h, w] rows and columns, clipped to the image."""
        indices = jnp.clip(row, 0, h - 1).astype(jnp.int32) * w + jnp.clip(column, 0, w - 1).astype(jnp.int32)
        return jax.vmap(lambda image, indices: image[indices])(flat, indices)

    if not bilinear:
        return jnp.where(inside[..., None], at(jnp.floor(y), jnp.floor(x)), fill)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    dx, dy = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]
    upper = at(top, left) * (1 - dx) + at(top, left + 1) * dx
    lower = at(top + 1, left) * (1 - dx) + at(top + 1, left + 1) * dx
    return jnp.where(inside[..., None], jnp.floor(upper * (1 - dy) + lower * dy), fill)
