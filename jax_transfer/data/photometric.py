"""Changes of colour and sharpness: pure functions of images and of drawn parameters, with those of torchvision.

Images are float [b, h, w, 3] in [0, 1], and parameters [b], one for each image, or scalars. Each function equals that
of torchvision for floating-point images to a twentieth of a grey level (on photographs and noise), and that of PIL to
one, but for two: PIL turns the hue in an HSV of 8 bits, which is up to 14 grey levels off, and replaces a Gaussian by
three boxes, up to 39 on noise. The random augmentations of `data.augment` draw the parameters.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "b h w 3"]
Parameters = Float[Array, "b"] | float


def luma(images: Images) -> Float[Array, "b h w 1"]:
    """Computes the luma of RGB images (ITU-R 601-2).

    >>> luma(jnp.ones((1, 1, 1, 3))).shape
    (1, 1, 1, 1)
    """
    # Written out, since a sum over an axis of three is several times slower on CPU.
    return 0.299 * images[..., :1] + 0.587 * images[..., 1:2] + 0.114 * images[..., 2:]


def blend(images: Images, others: Array, factors: Parameters) -> Images:
    """Moves images away from others (factor > 1) or towards them: others + factor (images - others), within [0, 1].

    >>> float(blend(jnp.full((1, 1, 1, 3), 0.5), jnp.zeros(()), 0.5).max())
    0.25
    """
    return jnp.clip(others + _by_image(factors) * (images - others), 0, 1)


def adjust_brightness(images: Images, factors: Parameters) -> Images:
    """Multiplies images by factors.

    >>> float(adjust_brightness(jnp.full((1, 1, 1, 3), 0.5), 1.5).max())
    0.75
    """
    return blend(images, jnp.zeros((), images.dtype), factors)


def adjust_contrast(images: Images, factors: Parameters) -> Images:
    """Blends images with the mean of their luma.

    >>> float(adjust_contrast(jnp.full((1, 1, 1, 3), 0.5), 1.5).max())
    0.5
    """
    return blend(images, luma(images).mean((1, 2, 3), keepdims=True), factors)


def adjust_saturation(images: Images, factors: Parameters) -> Images:
    """Blends images with their luma; a factor of 0 gives gray images.

    >>> float(adjust_saturation(jnp.full((1, 1, 1, 3), 0.5), 0.0).max())
    0.5
    """
    return blend(images, luma(images), factors)


def adjust_hue(images: Images, shifts: Parameters) -> Images:
    """Turns the hue by a fraction of the colour circle; saturation and value (HSV) stay.

    >>> adjust_hue(jnp.array([[[[1.0, 0.0, 0.0]]]]), 1 / 3).round(3).tolist()  # red to green
    [[[[0.0, 1.0, 0.0]]]]
    """
    r, g, b = (images[..., i : i + 1] for i in range(3))
    value = jnp.maximum(r, jnp.maximum(g, b))
    chroma = value - jnp.minimum(r, jnp.minimum(g, b))
    safe = jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    shifted = sixths + 6 * _by_image(shifts)
    # A channel is value - chroma times a trapezoid of the distance of the hue from that channel.
    k = (jnp.array([5.0, 3.0, 1.0], images.dtype) + shifted) % 6
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def solarize(images: Images, threshold: Parameters = 128 / 255) -> Images:
    """Inverts all values of at least the threshold.

    >>> solarize(jnp.array([[[[0.25, 0.5, 1.0]]]]), 0.5).tolist()
    [[[[0.25, 0.5, 0.0]]]]
    """
    return jnp.where(images >= _by_image(threshold) - 1e-4, 1 - images, images)


def gaussian_blur(images: Images, sigmas: Parameters, radius: int) -> Images:
    """Convolves images with a Gaussian, cut off at `radius` pixels and normalised; borders are mirrored.

    It equals torchvision's `gaussian_blur` with a kernel of 2 radius + 1 pixels.

    Args:
      sigmas: standard deviations in pixels; images with 0 are unchanged.
      radius: smaller than the images.

    >>> gaussian_blur(jnp.ones((1, 8, 8, 3)), 1.0, radius=3).round(3).max().item()
    1.0
    """
    sigmas = jnp.broadcast_to(jnp.asarray(sigmas, images.dtype), len(images))
    # As products with matrices, and not as sums of shifted images: XLA would compute the image again for each shift.
    rows, columns = (_blur_matrices(sigmas, radius, images.shape[axis]) for axis in (1, 2))
    # The precision is that of the pixels; by default, accelerators would round the weights to 8 bits.
    narrow = jnp.einsum("bwk,bhkc->bhwc", columns, images, precision="high")
    return jnp.einsum("bhk,bkwc->bhwc", rows, narrow, precision="high")


def _blur_matrices(sigmas: Float[Array, "b"], radius: int, size: int) -> Float[Array, "b size size"]:
    """Returns the weight of each pixel of a line in each pixel of the blurred line."""

    def weight(distances):
        squares = jnp.square(distances / jnp.where(sigmas > 0, sigmas, 1)[:, None, None])
        inside = (jnp.abs(distances) <= radius) & ((sigmas[:, None, None] > 0) | (distances == 0))
        return jnp.where(inside, jnp.exp(-squares / 2), 0)

    i, j = jnp.arange(size)[:, None], jnp.arange(size)
    # A pixel also stands for its mirror images at both borders, -j and 2 (size - 1) - j, but a border is not repeated.
    left, right = (j > 0) * weight(i + j), (j < size - 1) * weight(2 * (size - 1) - i - j)
    total = weight(jnp.arange(-radius, radius + 1)[None]).sum(-1, keepdims=True)
    return (weight(i - j) + left + right) / total


def blur_radius(sigma: float) -> int:
    """Returns the radius at which a Gaussian with this standard deviation has fallen to a hundredth.

    >>> blur_radius(2.0)
    7
    """
    return math.ceil(3.1 * sigma)


def _by_image(parameters: Parameters) -> Float[Array, "b 1 1 1"]:
    return jnp.asarray(parameters).reshape(-1, 1, 1, 1)
