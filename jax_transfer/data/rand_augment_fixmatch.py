"""RandAugment as FixMatch uses it for strong views (Sohn et al., 2020, arXiv:2001.07685), computed on the device.

The settings are those with which "Improved Fine-Tuning by Better Leveraging Pre-Training Data" trains: n = 2 and m = 10
in their public code. Two of the operations in POOL are drawn for each image, with replacement, each with a whole
magnitude from 1 to 9 (its random generator excludes m itself), and each runs with probability 1/2. Then a grey square
with half the side of the image covers a part of it. It differs from `rand_augment` in the operations, in their
arguments (enhancements only weaken), and in warps that take the nearest pixel and leave black behind.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.data.rand_augment import ENHANCEMENTS, NOTHING, OPERATIONS, apply, argument_of
from jax_transfer.data.transforms import Preprocessing

POOL = (
    "auto_contrast",
    "brightness",
    "color",
    "contrast",
    "equalize",
    "identity",
    "posterize",
    "rotate",
    "sharpness",
    "shear_x",
    "shear_y",
    "solarize",
    "translate_x",
    "translate_y",
)

NUM_OPERATIONS = 2  # per image
PROBABILITY = 0.5  # probability that an operation runs
MAX_MAGNITUDE = 10  # excluded
GREY = 127.0


def rand_augment_fixmatch(
    key, images: Float[Array, "b h w 3"], preprocessing: Preprocessing
) -> Float[Array, "b h w 3"]:
    """Applies two random operations to each image and covers a square of it; the images are in [0, 1].

    >>> import jax
    >>> import jax.numpy as jnp
    >>> augment = lambda key, images: rand_augment_fixmatch(key, images, Preprocessing(image_size=8))
    >>> jax.eval_shape(augment, jax.random.key(0), jnp.full((2, 8, 8, 3), 0.5)).shape
    (2, 8, 8, 3)
    """
    shape = (NUM_OPERATIONS, len(images))
    key_operation, key_runs, key_magnitude, key_negate, key_centre = jax.random.split(key, 5)
    in_pool = jnp.array([OPERATIONS.index(name) if name in OPERATIONS else NOTHING for name in POOL])
    operation = in_pool[jax.random.randint(key_operation, shape, 0, len(POOL))]
    operation = jnp.where(jax.random.bernoulli(key_runs, PROBABILITY, shape), operation, NOTHING)
    magnitude = jax.random.randint(key_magnitude, shape, 1, MAX_MAGNITUDE)
    negate = jax.random.bernoulli(key_negate, 0.5, shape)
    pixels = jnp.round(jnp.clip(images, 0, 1) * 255)  # PIL's uint8
    for i in range(NUM_OPERATIONS):
        pixels = operate(pixels, operation[i], magnitude[i], negate[i])
    return cover(pixels, jax.random.uniform(key_centre, (len(images), 2)), preprocessing.image_size // 2) / 255


def operate(
    pixels: Float[Array, "b h w 3"],
    operation: Int[Array, " b"],
    magnitude: Int[Array, " b"],
    negate: Bool[Array, " b"],
) -> Float[Array, "b h w 3"]:
    """Applies one operation to each image.

    Args:
      pixels: integers from 0 to 255, as floats.
      operation: indices into `rand_augment.OPERATIONS`; NOTHING leaves an image unchanged.
      magnitude: from 1 to 9.
      negate: whether to reverse a rotation, shear or translation.

    Returns:
      The images, with integers from 0 to 255, as floats.

    >>> import jax, jax.numpy as jnp
    >>> pixels, rotate = jnp.full((1, 4, 4, 3), 10.0), jnp.array([OPERATIONS.index("rotate")])
    >>> jax.eval_shape(operate, pixels, rotate, jnp.array([9]), jnp.array([False])).shape
    (1, 4, 4, 3)
    """
    height, width = pixels.shape[1:3]
    sign = jnp.where(negate, -1, 1)
    arguments = {
        # Whole numbers are computed as such, since a float product may fall just below one.
        "rotate": sign * 30 * magnitude // MAX_MAGNITUDE,
        "posterize": 4 + 4 * magnitude // MAX_MAGNITUDE,
        "solarize": 256 - 256 * magnitude // MAX_MAGNITUDE,
        **dict.fromkeys(ENHANCEMENTS, 0.05 + 0.09 * magnitude),
        "shear_x": sign * 0.03 * magnitude,
        "shear_y": sign * 0.03 * magnitude,
        "translate_x": sign * (3 * width * magnitude // 100),
        "translate_y": sign * (3 * height * magnitude // 100),
    }
    return apply(pixels, operation, argument_of(operation, arguments), jnp.zeros(3), bilinear=False)


def cover(pixels: Float[Array, "b h w 3"], centres: Float[Array, "b 2"], side: int) -> Float[Array, "b h w 3"]:
    """Covers a square of each image with grey.

    As in the public code, a square that would begin outside the image begins at its edge, and one that would end
    outside is cut off; and since PIL's rectangles include both of their corners, it is `side` + 1 pixels wide.

    Args:
      centres: row and column of the squares' centres, as fractions of the height and the width.

    >>> import jax.numpy as jnp
    >>> cover(jnp.zeros((1, 4, 4, 3)), jnp.array([[0.0, 0.9]]), side=1)[0, :, :, 0].tolist()[:2]
    [[0.0, 0.0, 0.0, 127.0], [0.0, 0.0, 0.0, 127.0]]
    """
    height, width = pixels.shape[1:3]

    def covered(centre, length):
        start = jnp.floor(jnp.maximum(centre * length - side / 2, 0))[:, None]
        return (jnp.arange(length) >= start) & (jnp.arange(length) <= start + side)

    square = covered(centres[:, 0], height)[:, :, None] & covered(centres[:, 1], width)[:, None, :]
    return jnp.where(square[..., None], GREY, pixels)
