"""The text tower of CLIP (Radford et al., 2021, arXiv:2103.00020, section 2.4): a causal transformer over tokens."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Functions, block_output, gaussian, pure_functions
from jax_transfer.models.transformer import LayerNorm, Size, blocks, gaussian_002
from jax_transfer.records import InputError


class TextTransformer(nnx.Module):
    """Token and position embedding, pre-norm causal blocks, LayerNorm of the last token, projection without bias."""

    def __init__(self, size: Size, vocabulary_size, context_length, embedding_dim, *, dtype, rngs: nnx.Rngs):
        self.token_embed = nnx.Param(gaussian_002(rngs.params(), (vocabulary_size, size.dim)))
        self.pos_embed = nnx.Param(gaussian(rngs.params(), (context_length, size.dim), 0.01))
        options = {"qkv_bias": True, "eps": 1e-5, "dropout": 0.0, "causal": True, "dtype": dtype, "rngs": rngs}
        self.blocks = blocks(size, 4.0, stochastic_depth=0.0, **options)
        self.norm = LayerNorm(size.dim, eps=1e-5)
        self.projection = nnx.Param(gaussian(rngs.params(), (size.dim, embedding_dim), size.dim**-0.5))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "b l"], train: bool, rngs: nnx.Rngs | None = None) -> Float[Array, "b e"]:
        length = tokens.shape[1]
        if length > self.pos_embed.shape[0]:
            raise InputError(
                f"captions have {length} tokens, and the text tower has a context of {self.pos_embed.shape[0]}: encode "
                "them to at most that length."
            )
        x = (self.token_embed[...][tokens] + self.pos_embed[:length]).astype(self.dtype)
        for block in self.blocks:
            x = block_output(block(x, train, rngs))
        # Only the last token before the padding, the end of the caption, has seen all others.
        last = jnp.count_nonzero(tokens, axis=1) - 1
        features = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.norm(features.astype(jnp.float32)) @ self.projection[...]


@functools.cache
def text_tower(
    *,
    vocabulary_size: int,
    context_length: int,
    embedding_dim: int,
    width: int,
    layers: int,
    heads: int,
    dtype: str = "float32",
) -> Functions:
    """Makes the text tower of CLIP. It has no statistics, and is the same in training and evaluation.

    `apply(params, {}, tokens) -> embeddings` maps tokens int [b, l] (`data.vocabulary`), of which 0 is padding at the
    end, to float32 [b, embedding_dim], not normalised. Padding changes nothing, so l need only be as long as the
    longest caption. Blocks are those of the vision transformers, with
    exact gelu and weights from N(0, 0.02^2). Equal arguments give the same functions.

    Args:
      vocabulary_size: rows of the token embedding.
      context_length: the most tokens of a caption.
      embedding_dim: columns of the result.
      width, layers, heads: width of the tokens, number of blocks, and heads of each attention layer.
      dtype: dtype of the matrix products in the blocks.

    Raises:
      InputError: if the heads do not divide the width.

    >>> import jax
    >>> tower = text_tower(vocabulary_size=300, context_length=8, embedding_dim=16, width=32, layers=2, heads=4)
    >>> params, stats = tower.init(jax.random.key(0))
    >>> tower.apply(params, stats, jnp.array([[1, 17, 2, 0, 0, 0, 0, 0]])).shape
    (1, 16)
    """
    if width % heads:
        raise InputError(f"a text tower of width {width} has {heads} heads; expected a number that divides the width.")

    def make_module(rngs):
        size = Size(width, layers, heads)
        return TextTransformer(size, vocabulary_size, context_length, embedding_dim, dtype=DTYPES[dtype], rngs=rngs)

    return pure_functions("the text tower", make_module)
