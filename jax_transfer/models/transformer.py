"""Layers and argument checks that the transformers share, with timm's layout and parameter names.

Matrix products run in `dtype`; LayerNorm, softmax and all parameters are float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.choose import choose
from jax_transfer.models.attention import attention
from jax_transfer.models.layers import DTYPES, check_num_classes
from jax_transfer.models.net import gaussian
from jax_transfer.records import InputError


class Size(NamedTuple):
    """Width of the tokens, number of blocks, and heads of each attention layer."""

    dim: int
    depth: int
    num_heads: int


def gaussian_002(key, shape, dtype=jnp.float32) -> Array:
    """Draws from N(0, 0.02^2), like timm's truncated normal, whose bounds of +-2 are 100 standard deviations away."""
    return gaussian(key, shape, 0.02).astype(dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al., 2016) over the last axis, in float32; the output has the dtype of x."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        return (y * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


def linear(features_in: int, features_out: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear layer that computes in `dtype` with float32 parameters."""
    options = {"use_bias": use_bias, "kernel_init": gaussian_002, "dtype": dtype, "param_dtype": jnp.float32}
    return nnx.Linear(features_in, features_out, **options, rngs=rngs)


def gelu(x: Array) -> Array:
    """Computes x Phi(x) exactly, in float32.

    Like torch, it uses erf; `jax.nn.gelu` uses erfc, which is several times slower on a CPU.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def split_heads(x: Float[Array, "b n e"], parts: int, num_heads: int) -> Float[Array, "p b heads n d"]:
    """Splits the last axis into parts (such as q, k and v), heads and channels, in this order."""
    b, n, _ = x.shape
    return jnp.transpose(x.reshape(b, n, parts, num_heads, -1), (2, 0, 3, 1, 4))


def attend(q, k, v: Float[Array, "b heads n d"], scale: float, causal: bool = False) -> Float[Array, "b n e"]:
    """Computes attention and joins the heads."""
    b, heads, n, d = v.shape
    return jnp.swapaxes(attention(q, k, v, scale, causal), 1, 2).reshape(b, n, heads * d)


class Attention(nnx.Module):
    """Multi-head self-attention with dropout on its output; if `causal`, a token sees none that follows it."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dropout: float, dtype, rngs, causal: bool = False):
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.causal = causal

    def __call__(self, x: Float[Array, "b n d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.proj(attend(q, k, v, self.scale, self.causal))
        return self.dropout(x, deterministic=not train, rngs=rngs)


class Mlp(nnx.Module):
    """Two linear layers with gelu in between, and dropout after gelu and after the second layer."""

    def __init__(self, dim: int, hidden: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "*b d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "*b d"]:
        x = self.dropout(gelu(self.fc1(x)), deterministic=not train, rngs=rngs)
        return self.dropout(self.fc2(x), deterministic=not train, rngs=rngs)


class Block(nnx.Module):
    """Attention and an MLP, each preceded by a LayerNorm and with its output added to its input.

    Stochastic depth (Huang et al., 2016, arXiv:1603.09382): in training, the attention and the MLP are each skipped
    for an image with probability `drop_path`; otherwise, their output is scaled by 1 / (1 - drop_path).
    """

    def __init__(self, dim, num_heads, hidden, *, qkv_bias, eps, dropout, drop_path, dtype, rngs, causal=False):
        self.norm1 = LayerNorm(dim, eps=eps)
        options = {"dropout": dropout, "dtype": dtype, "rngs": rngs}
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, causal=causal, **options)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, **options)
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))

    def __call__(self, x: Float[Array, "b n d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x), train, rngs), deterministic=not train, rngs=rngs)
        return x + self.drop_path(self.mlp(self.norm2(x), train, rngs), deterministic=not train, rngs=rngs)


def blocks(size: Size, mlp_ratio: float, *, stochastic_depth: float, **options) -> nnx.List:
    """Returns the blocks of an encoder; their `drop_path` grows linearly from 0 to `stochastic_depth`."""
    hidden = int(size.dim * mlp_ratio)
    rates = [stochastic_depth * i / max(size.depth - 1, 1) for i in range(size.depth)]
    return nnx.List([Block(size.dim, size.num_heads, hidden, drop_path=rate, **options) for rate in rates])


def join_class_token(tokens: Float[Array, "b n d"], cls_token, pos_embed) -> Float[Array, "b n+1 d"]:
    """Prepends the class token and adds the position embedding, in float32; the result has the dtype of `tokens`."""
    cls = jnp.broadcast_to(cls_token + pos_embed[:, :1], (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([cls.astype(tokens.dtype), (tokens + pos_embed[:, 1:]).astype(tokens.dtype)], axis=1)


def as_grid(tokens: Float[Array, "b n d"]) -> Float[Array, "b i i d"]:
    """Arranges the tokens of the patches of square images, which are numbered row by row, as a map."""
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(len(tokens), side, side, tokens.shape[-1])


def check_images(images, image_size: int) -> None:
    """Checks that the images have the size of the position embedding.

    Raises:
      InputError: if they have another size.
    """
    if images.shape[1:] != (image_size, image_size, 3):
        raise InputError(
            f"images have shape {list(images.shape)}, expected [b, {image_size}, {image_size}, 3]: resize them, or "
            "make the net with their size as image_size."
        )


def check_arguments(name: str, step: int, num_classes, dtype, image_size, **rates) -> dict:
    """Returns the arguments of a transformer in canonical form, so that equal ones give the same Net.

    Raises:
      InputError: if an argument is invalid, see `vit._vit`; image_size must be a multiple of `step`.
    """
    dtype = getattr(dtype, "__name__", str(dtype))
    choose(DTYPES, dtype, f"dtype of {name}")
    num_classes = check_num_classes(name, num_classes)
    if image_size < 1 or image_size % step:
        raise InputError(
            f"image_size of {name} is {image_size!r}; expected a multiple of the patch size, {step}, "
            f"such as {step * max(1, round(image_size / step))}."
        )
    for field, rate in rates.items():
        if not 0 <= rate < 1:
            raise InputError(f"{field} of {name} is {rate!r}; expected a probability of at least 0 and less than 1.")
    rates = {field: float(rate) for field, rate in rates.items()}
    return {"num_classes": num_classes, "dtype": dtype, "image_size": int(image_size), **rates}
