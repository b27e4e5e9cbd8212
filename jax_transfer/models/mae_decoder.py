"""The decoder of masked autoencoders (He et al., 2022, arXiv:2111.06377), a transformer over all patches."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Functions, block_output, pure_functions
from jax_transfer.models.transformer import LayerNorm, Size, blocks, gaussian_002, linear
from jax_transfer.records import InputError


def grid_sinusoids(rows: int, columns: int, dim: int) -> Float[np.ndarray, "n d"]:
    """Returns fixed position embeddings of a grid of patches, row by row: sines and cosines of the column and the row.

    With the d / 4 frequencies w_i = 10000^(-4 i / d), the vector of a patch is
    [sin(column w), cos(column w), sin(row w), cos(row w)] (Vaswani et al., 2017, arXiv:1706.03762, section 3.5, for
    each axis; the order is that of the authors of MAE).

    >>> [[round(float(x), 2) for x in row] for row in grid_sinusoids(1, 2, 4)]
    [[0.0, 1.0, 0.0, 1.0], [0.84, 0.54, 0.0, 1.0]]
    """
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:rows, :columns])
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1).astype(np.float32)


class MaskedDecoder(nnx.Module):
    """Projects tokens, puts a mask token in the place of each hidden patch, and predicts the pixels of all patches."""

    def __init__(self, size: Size, token_dim: int, grid: tuple[int, int], outputs: int, *, dtype, rngs: nnx.Rngs):
        self.embed = linear(token_dim, size.dim, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(gaussian_002(rngs.params(), (1, 1, size.dim)))
        options = {"qkv_bias": True, "eps": 1e-6, "dropout": 0.0, "dtype": dtype, "rngs": rngs}
        self.blocks = blocks(size, 4.0, stochastic_depth=0.0, **options)
        self.norm = LayerNorm(size.dim, eps=1e-6)
        self.pred = linear(size.dim, outputs, dtype=jnp.float32, rngs=rngs)
        self.grid = grid

    def __call__(
        self, inputs: tuple[Float[Array, "b 1+m e"], Int[Array, "b n"]], train: bool, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n o"]:
        tokens, places = inputs
        x = self.embed(tokens)
        b, _, dim = x.shape
        hidden = places.shape[1] - (x.shape[1] - 1)
        masks = jnp.broadcast_to(self.mask_token[...], (b, hidden, dim)).astype(x.dtype)
        patches = jnp.take_along_axis(jnp.concatenate([x[:, 1:], masks], 1), places[..., None], axis=1)
        # The position of the class token is zero.
        x = jnp.concatenate([x[:, :1], (patches + grid_sinusoids(*self.grid, dim)).astype(x.dtype)], 1)
        for block in self.blocks:
            x = block_output(block(x, train, rngs))
        return self.pred(self.norm(x[:, 1:].astype(jnp.float32)))


@functools.cache
def masked_decoder(
    *, token_dim: int, grid: tuple[int, int], outputs: int, width: int, layers: int, heads: int, dtype: str = "float32"
) -> Functions:
    """Makes the decoder of a masked autoencoder. It has no statistics, and is the same in training and evaluation.

    `apply(params, {}, (tokens, places)) -> predictions` maps the tokens [b, 1 + m, token_dim] of the class token and of
    m visible patches to values float32 [b, n, outputs] for all n patches. Patch j of image i is the visible patch
    number `places[i, j]` if that is less than m, and hidden otherwise: `places` int [b, n] holds 0 to n - 1 once each.
    Blocks are those of the vision transformers, with weights from N(0, 0.02^2). Equal arguments give the same object.

    Args:
      token_dim: columns of the tokens.
      grid: rows and columns of patches.
      outputs: values that are predicted for a patch.
      width, layers, heads: width of the decoder's tokens, number of blocks, and heads of each attention layer.
      dtype: dtype of the matrix products.

    Raises:
      InputError: if the width is not a multiple of 4, as the position embedding needs, and of the number of heads.

    >>> import jax
    >>> decoder = masked_decoder(token_dim=8, grid=(2, 2), outputs=12, width=16, layers=1, heads=2)
    >>> params, stats = decoder.init(jax.random.key(0))
    >>> tokens, places = jnp.ones((1, 1 + 1, 8)), jnp.array([[3, 0, 1, 2]])  # patch 1 is visible
    >>> decoder.apply(params, stats, (tokens, places)).shape
    (1, 4, 12)
    """
    if width % heads or width % 4:
        raise InputError(
            f"a decoder of width {width} has {heads} heads; expected a width that is a multiple of 4 and of the heads."
        )

    def make_module(rngs):
        return MaskedDecoder(Size(width, layers, heads), token_dim, grid, outputs, dtype=DTYPES[dtype], rngs=rngs)

    return pure_functions("the decoder", make_module)
