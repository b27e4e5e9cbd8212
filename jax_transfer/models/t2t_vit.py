"""Tokens-to-Token Vision Transformer (Yuan et al., 2021, arXiv:2101.11986), with the layout and names of the release.

Three soft splits (overlapping patches), with a small token layer after each of the first two, reduce the image to a
grid with 1/16 of its side; a narrow and deep Vision Transformer follows. The token layers use self-attention in
`t2t_vit_t_14` and the kernel attention of the Performer in `t2t_vit_14`. As in the released code
(github.com/yitu-opensource/T2T-ViT), every LayerNorm has eps 1e-5, the qkv layers of the backbone have no bias, and the
shortcut around the attention of a token layer adds the values v instead of the input, which is wider than the output.

Some arrays of a released file are not trained: the position embedding `pos_embed` (sinusoids) and the random directions
of the Performer, `tokens_to_token/attention{1,2}/w`. They are kept in `stats`, so that no weight decay applies to them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import BICUBIC_248, Spec
from jax_transfer.models.transformer import (
    LayerNorm,
    Mlp,
    Size,
    as_grid,
    attend,
    blocks,
    check_arguments,
    check_images,
    gaussian_002,
    gelu,
    join_class_token,
    linear,
    split_heads,
)
from jax_transfer.models.vit import image_size_from_shapes

EPS = 1e-5
STRIDE = 16  # pixels of the image per token of the backbone, in each direction
TOKEN_DIM = 64


def sinusoids(n: int, d: int) -> Float[np.ndarray, "1 n d"]:
    """Returns the position embedding of Vaswani et al. (2017, section 3.5).

    Its columns alternate between sin and cos of position / 10000^(2i / d).

    >>> sinusoids(3, 4).shape
    (1, 3, 4)
    """
    angles = np.arange(n)[:, None] / 10000 ** (2 * (np.arange(d) // 2) / d)
    return np.where(np.arange(d) % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)[None]


def soft_split(x: Float[Array, "b h w c"], size: int, stride: int, padding: int) -> Float[Array, "b m p"]:
    """Returns all patches, row by row; each is ordered by channel, row, column, as in `torch.nn.Unfold`.

    Patches are built by slicing rows and then columns, because the gradient of `conv_general_dilated_patches` is ten
    times slower on a CPU, and taking one slice per pixel of a patch takes five times longer to compile.

    >>> soft_split(jnp.zeros((1, 8, 8, 3)), size=3, stride=2, padding=1).shape
    (1, 16, 27)
    """
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (h, w))
    x = jnp.stack([x[:, i : i + stride * (rows - 1) + 1 : stride] for i in range(size)], axis=-1)
    x = jnp.stack([x[:, :, i : i + stride * (columns - 1) + 1 : stride] for i in range(size)], axis=-1)
    return x.reshape(b, rows * columns, c * size * size)


class TokenAttention(nnx.Module):
    """Self-attention with one head, from `features` to `token_dim` channels; the values v are added to its output."""

    def __init__(self, features: int, token_dim: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.qkv = linear(features, 3 * token_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.proj = linear(token_dim, token_dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.scale = features**-0.5  # depends on the width of the input and not of the head, as in the released code

    def __call__(self, x: Float[Array, "b n p"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        q, k, v = split_heads(self.qkv(x), 3, 1)
        return v[:, 0] + self.dropout(self.proj(attend(q, k, v, self.scale)), deterministic=not train, rngs=rngs)


class TokenTransformer(nnx.Module):
    """The token layer of the T2T-ViT_t models."""

    def __init__(self, features: int, token_dim: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(features, eps=EPS)
        self.attn = TokenAttention(features, token_dim, dropout=dropout, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(token_dim, eps=EPS)
        self.mlp = Mlp(token_dim, token_dim, dropout=dropout, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n p"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        x = self.attn(self.norm1(x), train, rngs)
        return x + self.mlp(self.norm2(x), train, rngs)


class Gelu(nnx.Module):
    """`gelu` as a layer, so that the layer after it has the same index as in the released weights."""

    def __call__(self, x: Array) -> Array:
        return gelu(x)


class TokenPerformer(nnx.Module):
    """The token layer of the T2T-ViT models: attention at a cost that is linear in the number of tokens.

    exp(q . k) is estimated by phi(q) . phi(k) with m = d / 2 positive features (Choromanski et al., 2021,
    arXiv:2009.14794, lemma 1): phi(x) = exp(w x - |x|^2 / 2) / sqrt(m), where the rows of w are orthogonal with length
    sqrt(m). The kernel is computed in float32.
    """

    def __init__(self, features: int, token_dim: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        m = token_dim // 2
        self.norm1 = LayerNorm(features, eps=EPS)
        self.kqv = linear(features, 3 * token_dim, dtype=dtype, rngs=rngs)
        self.w = nnx.BatchStat(jax.nn.initializers.orthogonal(math.sqrt(m))(rngs.params(), (m, token_dim), jnp.float32))
        self.proj = linear(token_dim, token_dim, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(token_dim, eps=EPS)
        first, last = (linear(token_dim, token_dim, dtype=dtype, rngs=rngs) for _ in range(2))
        self.mlp = nnx.List([first, Gelu(), last])
        self.dropout = nnx.Dropout(dropout)

    def _phi(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
        w = self.w[...]
        return jnp.exp(x @ w.T - 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)) / math.sqrt(len(w))

    def _attend(self, q, k, v: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        phi_q, phi_k = self._phi(q), self._phi(k)
        total = phi_q @ jnp.sum(phi_k, axis=1)[:, :, None]
        return phi_q @ (jnp.swapaxes(phi_k, 1, 2) @ v) / (total + 1e-8)

    def __call__(self, x: Float[Array, "b n p"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        k, q, v = jnp.split(self.kqv(self.norm1(x)), 3, axis=-1)
        y = self._attend(*(part.astype(jnp.float32) for part in (q, k, v))).astype(v.dtype)
        x = v + self.dropout(self.proj(y), deterministic=not train, rngs=rngs)
        y = self.norm2(x)
        for layer in self.mlp:
            y = layer(y)
        return x + self.dropout(y, deterministic=not train, rngs=rngs)


TOKEN_LAYERS = {"transformer": TokenTransformer, "performer": TokenPerformer}


class TokensToToken(nnx.Module):
    """Turns images into tokens: soft splits of 7/4/2, 3/2/1, 3/2/1 (size/stride/padding), token layers in between."""

    def __init__(self, token_layer: str, token_dim: int, dim: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        options = {"dropout": dropout, "dtype": dtype, "rngs": rngs}
        self.attention1 = TOKEN_LAYERS[token_layer](3 * 7 * 7, token_dim, **options)
        self.attention2 = TOKEN_LAYERS[token_layer](token_dim * 3 * 3, token_dim, **options)
        self.project = linear(token_dim * 3 * 3, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        b, h, w, _ = x.shape
        x = block_output(self.attention1(soft_split(x, 7, 4, 2), train, rngs)).reshape(b, h // 4, w // 4, -1)
        x = block_output(self.attention2(soft_split(x, 3, 2, 1), train, rngs)).reshape(b, h // 8, w // 8, -1)
        return block_output(self.project(soft_split(x, 3, 2, 1)))


class T2TViT(nnx.Module):
    """Tokens-to-token module, class token, fixed position embedding, blocks, LayerNorm of the class token, head."""

    def __init__(
        self, token_layer: str, size: Size, token_dim: int, image_size: int, num_classes: int,
        *, token_dropout, dropout, stochastic_depth, dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        options = {"dtype": dtype, "rngs": rngs}
        self.tokens_to_token = TokensToToken(token_layer, token_dim, size.dim, dropout=token_dropout, **options)
        self.cls_token = nnx.Param(gaussian_002(rngs.params(), (1, 1, size.dim)))
        self.pos_embed = nnx.BatchStat(jnp.asarray(sinusoids(1 + (image_size // STRIDE) ** 2, size.dim)))
        self.dropout = nnx.Dropout(dropout)
        rates = {"dropout": dropout, "stochastic_depth": stochastic_depth}
        self.blocks = blocks(size, 3.0, qkv_bias=False, eps=EPS, **rates, **options)
        self.norm = LayerNorm(size.dim, eps=EPS)
        self.head = linear(size.dim, num_classes, dtype=jnp.float32, rngs=rngs)
        self.image_size = image_size
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        check_images(images, self.image_size)
        x = self.tokens_to_token(images.astype(self.dtype), train, rngs)
        x = join_class_token(x, self.cls_token[...], self.pos_embed[...])
        x = self.dropout(x, deterministic=not train, rngs=rngs)
        for block in self.blocks:
            x = block_output(block(x, train, rngs))
        features = self.norm(x[:, 0].astype(jnp.float32))
        maps = as_grid(self.norm(x[:, 1:].astype(jnp.float32)))
        return Output(logits=self.head(features), features=features, maps=maps)


def _t2t_vit(
    name, token_layer, size, num_classes, dtype="float32", image_size=224, dropout=0.0, stochastic_depth=0.0,
    token_dropout=0.0,
):  # fmt: skip
    """Makes a T2T-ViT.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, LayerNorm, softmax, the
        kernel of the Performer, features and logits are always float32.
      image_size: height and width of the images in pixels, a multiple of 16.
      dropout: dropout rate of the embedded tokens and in the blocks of the backbone, in training.
      stochastic_depth: probability of skipping each half of the last block, in training. The released weights were
        trained with 0.1.
      token_dropout: dropout rate in the token layers, in training. By default 0.1 for t2t_vit_14, since the Performer
        of the released code always uses it, and 0 for t2t_vit_t_14.

    Raises:
      InputError: if an argument is invalid.
    """
    rates = {"dropout": dropout, "stochastic_depth": stochastic_depth, "token_dropout": token_dropout}
    return _build(name, token_layer, size, **check_arguments(name, STRIDE, num_classes, dtype, image_size, **rates))


@functools.cache
def _build(name, token_layer, size, num_classes, dtype, image_size, **rates) -> Net:
    def make_module(rngs: nnx.Rngs) -> T2TViT:
        return T2TViT(token_layer, size, TOKEN_DIM, image_size, num_classes, dtype=DTYPES[dtype], **rates, rngs=rngs)

    return make_net(
        name,
        make_module,
        num_classes=num_classes,
        feature_dim=size.dim,
        min_image_size=image_size,
        classifier=("head",),
    )


def _spec(name: str, token_layer: str, released_name: str, **defaults) -> Spec:
    return Spec(
        functools.partial(_t2t_vit, name, token_layer, Size(384, 14, 6), **defaults),
        min_image_size=224,
        patch=STRIDE,
        released={name: BICUBIC_248, released_name: BICUBIC_248},
        settings_from_shapes=functools.partial(image_size_from_shapes, STRIDE),
        timm_pools=("token",),
    )


t2t_vit_14 = _spec("t2t_vit_14", "performer", "81_5_t2t_vit_14", token_dropout=0.1)
t2t_vit_t_14 = _spec("t2t_vit_t_14", "transformer", "81_7_t2t_vitt_14")
