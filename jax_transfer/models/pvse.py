"""The embedding networks of PVSE (Song and Soleymani, CVPR 2019, arXiv:1906.04402, sections 3.1 and 3.2).

A polysemous instance embedding network (PIE-Net) gives an image or a caption k embeddings: k heads of self-attention
look at different places of an image, or at different words, and each adds what it finds to a feature of the whole.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Functions, pure_functions
from jax_transfer.models.transformer import LayerNorm
from jax_transfer.numerics import positive, unit
from jax_transfer.records import InputError


class Embedded(NamedTuple):
    """The outputs of a PIE-Net for a batch, all float32.

    Attributes:
      embeddings: of length 1.
      attention: weight of each of n places or words in each head; 0 where the mask is False, and otherwise with sum 1.
      residuals: what each head adds to the global feature, which `diversity` compares.
    """

    embeddings: Float[Array, "b k e"]
    attention: Float[Array, "b k n"]
    residuals: Float[Array, "b k e"]


def masked_softmax(x: Float[Array, "*b n"], mask: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b n"]:
    """Computes the softmax over the places where the mask is True; the others are 0, and all if there is none.

    >>> masked_softmax(jnp.array([[1.0, 1.0, 5.0], [1.0, 2.0, 3.0]]), jnp.array([[1, 1, 0], [0, 0, 0]], bool)).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    if mask is None:
        return jax.nn.softmax(x, axis=-1)
    # Not -inf, whose differences are NaN where nothing is seen.
    x = jnp.where(mask, x, jnp.finfo(x.dtype).min)
    exponents = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True))) * mask
    return exponents / positive(exponents.sum(-1, keepdims=True))


def _linear(inputs: int, outputs: int, *, use_bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear layer with weights of Glorot and Bengio (2010), equation 16, and a bias of 0."""
    init = nnx.initializers.xavier_uniform()
    options = {"kernel_init": init, "dtype": dtype, "param_dtype": jnp.float32}
    return nnx.Linear(inputs, outputs, use_bias=use_bias, **options, rngs=rngs)


class PieNet(nnx.Module):
    """LayerNorm(global + dropout(sigmoid(linear(attended)))) of length 1, for each of k heads of self-attention.

    The weights of the heads over n local features x [n, d] are softmax_n(W2 tanh(W1 x)), with d / 2 hidden units (Lin
    et al., "A Structured Self-Attentive Sentence Embedding", ICLR 2017, arXiv:1703.03130, equation 6).
    """

    def __init__(self, local_dim: int, embedding_dim: int, heads: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.hidden = _linear(local_dim, local_dim // 2, use_bias=False, **options)
        self.heads = _linear(local_dim // 2, heads, use_bias=False, **options)
        self.fc = _linear(local_dim, embedding_dim, use_bias=True, **options)
        self.norm = LayerNorm(embedding_dim, eps=1e-5)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self,
        whole: Float[Array, "b e"],
        local: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None,
        train: bool,
        rngs: nnx.Rngs | None,
    ) -> Embedded:
        logits = self.heads(jnp.tanh(self.hidden(local))).astype(jnp.float32).swapaxes(1, 2)
        attention = masked_softmax(logits, None if mask is None else mask[:, None])
        attended = attention.astype(local.dtype) @ local
        residuals = jax.nn.sigmoid(self.fc(attended).astype(jnp.float32))
        residuals = self.dropout(residuals, deterministic=not train, rngs=rngs)
        x = self.norm(whole.astype(jnp.float32)[:, None] + residuals)
        return Embedded(unit(x), attention, residuals)


class ImageEmbedding(nnx.Module):
    """A linear layer for the features of the whole image, and a PIE-Net over the maps before pooling."""

    def __init__(self, feature_dim, map_dim, embedding_dim, heads, *, dropout, dtype, rngs: nnx.Rngs):
        self.fc = _linear(feature_dim, embedding_dim, use_bias=True, dtype=dtype, rngs=rngs)
        self.pie = PieNet(map_dim, embedding_dim, heads, dropout=dropout, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, inputs: tuple[Float[Array, "b d"], Float[Array, "b h w c"]], train: bool, rngs: nnx.Rngs | None = None
    ) -> Embedded:
        features, maps = inputs
        whole = self.dropout(self.fc(features), deterministic=not train, rngs=rngs)
        return self.pie(whole, maps.reshape(len(maps), -1, maps.shape[-1]), None, train, rngs)


class Gru(nnx.Module):
    """A gated recurrent unit (Cho et al., 2014, arXiv:1406.1078) with torch's gates, names and initial weights.

    With the gates in the order r, z, n of the columns, s the sigmoid, and a bias of the input and of the state each:

        r = s(W_r x + U_r h),  z = s(W_z x + U_z h),  n = tanh(W_n x + r (U_n h)),  h' = (1 - z) n + z h
    """

    def __init__(self, inputs: int, units: int, *, dtype, rngs: nnx.Rngs):
        bound = units**-0.5

        def uniform(shape) -> Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.kernel_x, self.bias_x = nnx.Param(uniform((inputs, 3 * units))), nnx.Param(uniform((3 * units,)))
        self.kernel_h, self.bias_h = nnx.Param(uniform((units, 3 * units))), nnx.Param(uniform((3 * units,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"], reverse: bool) -> Float[Array, "b u"]:
        """Returns the state, from 0, after the words where the mask is True, read in order or in reverse order."""
        # The products with all words at once, outside the loop.
        of_words = (x.astype(self.dtype) @ self.kernel_x[...].astype(self.dtype)).astype(jnp.float32) + self.bias_x[...]
        kernel, bias = self.kernel_h[...].astype(self.dtype), self.bias_h[...]

        def step(h, word):
            of_word, seen = word
            of_state = (h.astype(self.dtype) @ kernel).astype(jnp.float32) + bias
            (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(part, 3, axis=-1) for part in (of_word, of_state))
            r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
            new = (1 - z) * jnp.tanh(n_x + r * n_h) + z * h
            return jnp.where(seen[:, None], new, h), None

        start = jnp.zeros((len(x), self.kernel_h.shape[0]), jnp.float32)
        return jax.lax.scan(step, start, (of_words.swapaxes(0, 1), mask.T), reverse=reverse)[0]


class TextEmbedding(nnx.Module):
    """A table of word vectors, a bidirectional GRU for the whole caption, and a PIE-Net over the word vectors."""

    def __init__(self, vocabulary_size, word_dim, embedding_dim, heads, *, dropout, dtype, rngs: nnx.Rngs):
        bound = math.sqrt(6 / (vocabulary_size + word_dim))
        table = jax.random.uniform(rngs.params(), (vocabulary_size, word_dim), jnp.float32, -bound, bound)
        self.words = nnx.Param(table)
        self.forward = Gru(word_dim, embedding_dim // 2, dtype=dtype, rngs=rngs)
        self.backward = Gru(word_dim, embedding_dim // 2, dtype=dtype, rngs=rngs)
        self.pie = PieNet(word_dim, embedding_dim, heads, dropout=dropout, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, tokens: Int[Array, "b n"], train: bool, rngs: nnx.Rngs | None = None) -> Embedded:
        mask = tokens != 0
        x = self.dropout(self.words[...][tokens], deterministic=not train, rngs=rngs)
        whole = jnp.concatenate([self.forward(x, mask, False), self.backward(x, mask, True)], -1)
        whole = self.dropout(whole, deterministic=not train, rngs=rngs)
        return self.pie(whole, x, mask, train, rngs)


@functools.cache
def image_embedding(
    *,
    feature_dim: int,
    map_dim: int,
    embedding_dim: int = 1024,
    num_embeddings: int = 2,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Functions:
    """Makes the network that embeds images, after a net that returns features and maps. It has no statistics.

    `apply(params, {}, (features, maps)) -> Embedded` takes features [b, feature_dim] and maps [b, h, w, map_dim], and
    `apply_train` also a key of dropout. Equal arguments give the same functions.

    Args:
      feature_dim: columns of the features of the whole image.
      map_dim: channels of the maps.
      embedding_dim: size of an embedding, e.
      num_embeddings: number of embeddings of an image, k.
      dropout: share of the values that are dropped; 0 in the authors' command for COCO.
      dtype: dtype of the matrix products.

    Raises:
      InputError: if a size is too small.

    >>> net = image_embedding(feature_dim=8, map_dim=8, embedding_dim=6)
    >>> params, stats = net.init(jax.random.key(0))
    >>> net.apply(params, stats, (jnp.ones((1, 8)), jnp.ones((1, 7, 7, 8)))).embeddings.shape
    (1, 2, 6)
    """
    _check_sizes(feature_dim=(feature_dim, 1), map_dim=(map_dim, 2), **_common(embedding_dim, num_embeddings))
    options = {"dropout": dropout, "dtype": DTYPES[dtype]}
    return pure_functions(
        "the image embedding",
        lambda rngs: ImageEmbedding(feature_dim, map_dim, embedding_dim, num_embeddings, **options, rngs=rngs),
    )


@functools.cache
def text_embedding(
    *,
    vocabulary_size: int,
    word_dim: int = 300,
    embedding_dim: int = 1024,
    num_embeddings: int = 2,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Functions:
    """Makes the network that embeds captions. It has no statistics.

    `apply(params, {}, tokens) -> Embedded` maps the words of captions, int [b, n] with 0 for padding at the end, to
    embeddings, and `apply_train` also takes a key of dropout. Padding changes nothing. The feature of a whole caption
    is the last state of each direction of the GRU, the backward one at the first word; the authors' public code takes
    the backward output at the last word, which has seen only that. A caption without words gets the same finite
    embeddings as any other one without.

    `params["words"]` [vocabulary_size, word_dim] is the table of word vectors, which may be replaced by those of a file
    (`data.word_vectors`). Equal arguments give the same functions.

    Args:
      vocabulary_size: number of words, with the padding.
      word_dim: size of a word vector.
      embedding_dim: size of an embedding, e; each direction of the GRU has half as many units.
      num_embeddings: number of embeddings of a caption, k.
      dropout: share of the values that are dropped; 0 in the authors' command for COCO.
      dtype: dtype of the matrix products.

    Raises:
      InputError: if a size is too small, or the size of an embedding is odd.

    >>> net = text_embedding(vocabulary_size=10, word_dim=4, embedding_dim=6)
    >>> params, stats = net.init(jax.random.key(0))
    >>> embedded = net.apply(params, stats, jnp.array([[3, 7, 0], [2, 5, 9]]))
    >>> embedded.embeddings.shape, embedded.attention.shape
    ((2, 2, 6), (2, 2, 3))
    """
    _check_sizes(vocabulary_size=(vocabulary_size, 2), word_dim=(word_dim, 2), **_common(embedding_dim, num_embeddings))
    if embedding_dim % 2:
        raise InputError(f"embedding_dim = {embedding_dim}: expected an even number, half of it for each direction.")
    options = {"dropout": dropout, "dtype": DTYPES[dtype]}
    return pure_functions(
        "the text embedding",
        lambda rngs: TextEmbedding(vocabulary_size, word_dim, embedding_dim, num_embeddings, **options, rngs=rngs),
    )


def _common(embedding_dim: int, num_embeddings: int) -> dict[str, tuple[int, int]]:
    return {"embedding_dim": (embedding_dim, 2), "num_embeddings": (num_embeddings, 1)}


def _check_sizes(**sizes: tuple[int, int]) -> None:
    """Checks sizes, given as (size, smallest one)."""
    for name, (size, least) in sizes.items():
        if size < least:
            raise InputError(f"{name} = {size}: expected at least {least}.")
