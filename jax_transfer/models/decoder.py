"""The decoder of the autoencoders, as pure functions of a dictionary: codes to images by transposed convolutions."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.models.net import block_output, gaussian
from jax_transfer.records import InputError

GRID = 4  # rows and columns of the map that a code is projected to
DOUBLINGS = 3
FACTOR = 2**DOUBLINGS  # height and width of an image are multiples of it


def new_decoder(key: jax.Array, code_dim: int, width: int) -> dict:
    """Draws the parameters of a decoder. They do not depend on the size of the images.

    Kernels have the variance 2 / inputs (He et al., 2015, arXiv:1502.01852), that of the last layer 1 / inputs.

    Args:
      code_dim: columns of the codes.
      width: channels of the last hidden map; the ones before it have two and four times as many.

    >>> params = new_decoder(jax.random.key(0), code_dim=16, width=8)
    >>> params["project"]["kernel"].shape, [params[str(i)]["kernel"].shape for i in range(DOUBLINGS)]
    ((16, 512), [(4, 4, 32, 16), (4, 4, 16, 8), (4, 4, 8, 3)])
    """
    channels = [*(width * 2**i for i in reversed(range(DOUBLINGS))), 3]
    keys = jax.random.split(key, 1 + DOUBLINGS)
    first = (code_dim, GRID * GRID * channels[0])
    params: dict[str, Any] = {
        "project": {"kernel": gaussian(keys[0], first, code_dim**-0.5), "bias": jnp.zeros(first[1])}
    }
    for i in range(DOUBLINGS):
        inputs, outputs = channels[i], channels[i + 1]
        std = ((1 if outputs == 3 else 2) / (4 * inputs)) ** 0.5  # a pixel of the output sums 2x2 of the input
        params[str(i)] = {
            "kernel": gaussian(keys[i + 1], (4, 4, inputs, outputs), std),
            "bias": jnp.zeros(outputs),
            "norm": {"scale": jnp.ones(inputs), "bias": jnp.zeros(inputs)},
        }
    return params


def decode(params: dict, codes: Float[Array, "b e"], height: int, width: int) -> Float[Array, "b h w 3"]:
    """Computes images from codes, in float32.

    Each code is projected to a map of 4x4 pixels, which is resized bilinearly to an eighth of the images (which is 4x4
    for 32 pixels), and doubled three times by a 4x4 transposed convolution. The convolutions are those of DCGAN
    (Radford et al., 2016, arXiv:1511.06434); a LayerNorm over the channels of each pixel and ReLU precede each, in the
    place of DCGAN's BatchNorm, so that there are no statistics and images do not depend on each other.

    Args:
      params: result of `new_decoder`.
      height, width: size of the images in pixels, multiples of 8.

    Raises:
      InputError: for another size.

    >>> params = new_decoder(jax.random.key(0), code_dim=16, width=8)
    >>> decode(params, jnp.ones((2, 16)), 24, 32).shape
    (2, 24, 32, 3)
    """
    if height % FACTOR or width % FACTOR:
        raise InputError(
            f"images of {height}x{width} pixels cannot be decoded: use a preprocessing.image_size that is a multiple "
            f"of {FACTOR}, such as {FACTOR * max(1, round(height / FACTOR))}."
        )
    x = codes.astype(jnp.float32) @ params["project"]["kernel"] + params["project"]["bias"]
    x = x.reshape(len(codes), GRID, GRID, -1)
    x = jax.image.resize(x, (len(codes), height // FACTOR, width // FACTOR, x.shape[-1]), "bilinear")
    for i in range(DOUBLINGS):
        layer = params[str(i)]
        x = jax.nn.relu(jax.nn.standardize(x, epsilon=1e-5) * layer["norm"]["scale"] + layer["norm"]["bias"])
        x = block_output(_doubled(x, layer["kernel"]) + layer["bias"])
    return x


def _doubled(x: Float[Array, "b h w i"], kernel: Float[Array, "4 4 i o"]) -> Float[Array, "b 2*h 2*w o"]:
    """Computes a transposed convolution with stride 2, as torch's ConvTranspose2d(i, o, 4, stride=2, padding=1) does.

    The input is spread out with zeros between its pixels, and convolved with the kernel, which torch stores rotated.
    """
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
