"""Vision Transformers (Dosovitskiy et al., 2021, arXiv:2010.11929), with timm's layout and names.

DeiT (Touvron et al., 2021, arXiv:2012.12877) without distillation is the same network, trained otherwise. The features
are the class token after the last LayerNorm. Products of matrices run in `dtype`; LayerNorm, softmax, features, logits
and all parameters are float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.choose import choose
from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Net, Output, gaussian, make_net
from jax_transfer.records import InputError


class Size(NamedTuple):
    """Width of the tokens, number of blocks, heads of each attention."""

    dim: int
    depth: int
    num_heads: int


TINY, SMALL, BASE = Size(192, 12, 3), Size(384, 12, 6), Size(768, 12, 12)


def gaussian_002(key, shape, dtype=jnp.float32) -> Array:
    """N(0, 0.02^2): timm's truncated normal, whose bounds of +-2 lie a hundred standard deviations out."""
    return gaussian(key, shape, 0.02).astype(dtype)


def uniform_fan_in(key, shape, dtype=jnp.float32) -> Float[Array, "h w i o"]:
    """U(-1, 1) / sqrt(h w i), as torch draws a convolution: timm leaves the patches' projection at that."""
    bound = 1 / math.sqrt(math.prod(shape[:3]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al., 2016) over the last axis, in float32; the result has the dtype of x."""

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
    options = {"use_bias": use_bias, "kernel_init": gaussian_002, "dtype": dtype, "param_dtype": jnp.float32}
    return nnx.Linear(features_in, features_out, **options, rngs=rngs)


def gelu(x: Array) -> Array:
    """Exact: x Phi(x), in float32. By erf, as torch; `jax.nn.gelu` goes by erfc, several times slower on a CPU."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def split_heads(x: Float[Array, "b n e"], parts: int, num_heads: int) -> Float[Array, "p b heads n d"]:
    """Cuts the last axis, which runs over parts, heads and channels."""
    b, n, _ = x.shape
    return jnp.transpose(x.reshape(b, n, parts, num_heads, -1), (2, 0, 3, 1, 4))


def attend(q, k, v: Float[Array, "b heads n d"], scale: float) -> Float[Array, "b n e"]:
    """softmax(scale q k^T) v, heads joined. Heads before tokens: products over other axes are slower on a CPU."""
    weights = jax.nn.softmax(((q * scale) @ jnp.swapaxes(k, 2, 3)).astype(jnp.float32)).astype(v.dtype)
    b, heads, n, d = v.shape
    return jnp.swapaxes(weights @ v, 1, 2).reshape(b, n, heads * d)


class Attention(nnx.Module):
    """Multi-head self-attention; dropout on its output."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dropout: float, dtype, rngs: nnx.Rngs):
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5

    def __call__(self, x: Float[Array, "b n d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        x = self.proj(attend(*split_heads(self.qkv(x), 3, self.num_heads), self.scale))
        return self.dropout(x, deterministic=not train, rngs=rngs)


class Mlp(nnx.Module):
    """Two layers with gelu between; dropout after each."""

    def __init__(self, dim: int, hidden: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "*b d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "*b d"]:
        x = self.dropout(gelu(self.fc1(x)), deterministic=not train, rngs=rngs)
        return self.dropout(self.fc2(x), deterministic=not train, rngs=rngs)


class Block(nnx.Module):
    """Attention and MLP, each after a LayerNorm, each added to its input.

    Stochastic depth (Huang et al., 2016, arXiv:1603.09382): in training either is left out of an image with
    probability `drop_path`, and weighs 1 / (1 - drop_path) where it stays.
    """

    def __init__(self, dim, num_heads, hidden, *, qkv_bias, eps, dropout, drop_path, dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, dropout=dropout, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, dropout=dropout, dtype=dtype, rngs=rngs)
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))

    def __call__(self, x: Float[Array, "b n d"], train: bool, rngs: nnx.Rngs | None) -> Float[Array, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x), train, rngs), deterministic=not train, rngs=rngs)
        return x + self.drop_path(self.mlp(self.norm2(x), train, rngs), deterministic=not train, rngs=rngs)


def blocks(size: Size, mlp_ratio: float, *, stochastic_depth: float, **options) -> nnx.List:
    """The blocks of an encoder; the probability of leaving one out grows linearly from 0 to `stochastic_depth`."""
    hidden = int(size.dim * mlp_ratio)
    rates = [stochastic_depth * i / max(size.depth - 1, 1) for i in range(size.depth)]
    return nnx.List([Block(size.dim, size.num_heads, hidden, drop_path=rate, **options) for rate in rates])


def join_class_token(tokens: Float[Array, "b n d"], cls_token, pos_embed) -> Float[Array, "b n+1 d"]:
    """Puts the class token first and adds the position embedding, in float32; the result has the dtype of `tokens`."""
    cls = jnp.broadcast_to(cls_token + pos_embed[:, :1], (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([cls.astype(tokens.dtype), (tokens + pos_embed[:, 1:]).astype(tokens.dtype)], axis=1)


def check_images(images, image_size: int) -> None:
    """Raises InputError if the images are not of the size that a position embedding was made for."""
    if images.shape[1:] != (image_size, image_size, 3):
        raise InputError(
            f"images are {list(images.shape)}; this net takes [b, {image_size}, {image_size}, 3]: build it with their "
            "size as image_size, or resize them."
        )


def _patchwise(x: Float[Array, "b h w i"], kernel: Float[Array, "p p i o"], strides, padding, **options):
    """A convolution of patches that do not overlap, as a matrix product: see `resnet`'s 1x1 convolutions."""
    b, h, w, c = x.shape
    p, _, _, features_out = kernel.shape
    patches = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)
    return patches @ kernel.reshape(p * p * c, features_out)


class PatchEmbed(nnx.Module):
    """Cuts images into patches and projects each, row by row."""

    def __init__(self, patch: int, dim: int, *, dtype, rngs: nnx.Rngs):
        self.proj = nnx.Conv(
            3,
            dim,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            conv_general_dilated=_patchwise,
            kernel_init=uniform_fan_in,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        tokens = self.proj(images)
        return tokens.reshape(len(images), -1, tokens.shape[-1])


class VisionTransformer(nnx.Module):
    """Patches, class token, learned position embedding, blocks, LayerNorm of the class token, linear head."""

    def __init__(self, size: Size, patch, image_size, num_classes, *, dropout, stochastic_depth, dtype, rngs: nnx.Rngs):
        options = {"dropout": dropout, "dtype": dtype, "rngs": rngs}
        self.patch_embed = PatchEmbed(patch, size.dim, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(gaussian(rngs.params(), (1, 1, size.dim), 1e-6))
        self.pos_embed = nnx.Param(gaussian_002(rngs.params(), (1, 1 + (image_size // patch) ** 2, size.dim)))
        self.dropout = nnx.Dropout(dropout)
        self.blocks = blocks(size, 4.0, stochastic_depth=stochastic_depth, qkv_bias=True, eps=1e-6, **options)
        self.norm = LayerNorm(size.dim, eps=1e-6)
        self.head = linear(size.dim, num_classes, dtype=jnp.float32, rngs=rngs)
        self.image_size = image_size
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        check_images(images, self.image_size)
        x = join_class_token(self.patch_embed(images.astype(self.dtype)), self.cls_token[...], self.pos_embed[...])
        x = self.dropout(x, deterministic=not train, rngs=rngs)
        for block in self.blocks:
            x = block(x, train, rngs)
        features = self.norm(x[:, 0].astype(jnp.float32))
        return Output(logits=self.head(features), features=features)


def resize_position_embedding(
    pos_embed: Float[Array, "1 n+1 d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "1 m+1 d"]:
    """Fits a position embedding to images of another size; the first row, the class token's, is kept.

    Bicubic with antialiasing, the same as `timm.layers.resample_abs_pos_embed` (torch's `interpolate(mode="bicubic",
    antialias=True)`) to rounding.

    Args:
      pos_embed: `params["pos_embed"]`, rows of the grid one after the other.
      grid, new_grid: (rows, columns) of patches, before and after: (image_size // patch,) * 2.

    Raises:
      InputError: if pos_embed is not of that grid.
    """
    rows, columns = grid
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, rows * columns + 1):
        raise InputError(
            f"pos_embed is {list(pos_embed.shape)}; a grid of {rows}x{columns} patches and a class token have "
            f"[1, {rows * columns + 1}, d]: pass the grid that it was trained on."
        )
    d = pos_embed.shape[-1]
    resized = jax.image.resize(pos_embed[0, 1:].reshape(rows, columns, d), (*new_grid, d), "cubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :1], resized.reshape(1, -1, d)], axis=1)


def check_arguments(name: str, step: int, num_classes, dtype, image_size, **rates) -> dict:
    """The arguments of a transformer in one form each, so that equal ones are equal keys of a cache.

    Raises:
      InputError: if one is not what `_vit` says; image_size must be a multiple of `step`.
    """
    dtype = getattr(dtype, "__name__", str(dtype))
    choose(DTYPES, dtype, f"dtype of {name}")
    if num_classes < 1:
        raise InputError(f"num_classes of {name} is {num_classes!r}; expected a whole number of at least 1.")
    if image_size < 1 or image_size % step:
        raise InputError(
            f"image_size of {name} is {image_size!r}; expected a multiple of its patches' {step} pixels, "
            f"such as {step * max(1, round(image_size / step))}."
        )
    for field, rate in rates.items():
        if not 0 <= rate < 1:
            raise InputError(f"{field} of {name} is {rate!r}; expected a probability of at least 0 and less than 1.")
    rates = {field: float(rate) for field, rate in rates.items()}
    return {"num_classes": int(num_classes), "dtype": dtype, "image_size": int(image_size), **rates}


def _vit(
    name,
    size,
    patch,
    default,
    num_classes,
    dtype="float32",
    image_size=None,
    dropout=0.0,
    stochastic_depth=0.0,
    num_heads=None,
):
    """A Vision Transformer as a Net. Equal arguments give the identical Net, so compiled code is shared.

    Args:
      num_classes: columns of the logits.
      dtype: of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, LayerNorm, softmax, features
        and logits are float32 either way.
      image_size: height and width of the images, in pixels, a multiple of the patch; by default that of the name.
        Weights of another size fit after `resize_position_embedding`.
      dropout: of the embedded tokens and in the blocks, in training.
      stochastic_depth: probability of leaving out the last block's halves, in training; see `blocks`.
      num_heads: of each attention, a divisor of the tokens' width; by default as in timm. The weights have the same
        shapes for any number: MoCo v3's ViT-S has 12 where timm's has 6.

    Raises:
      InputError: if an argument is not one of the above.
    """
    num_heads = size.num_heads if num_heads is None else num_heads
    if type(num_heads) is not int or num_heads < 1 or size.dim % num_heads:
        raise InputError(
            f"num_heads of {name} is {num_heads!r}; expected a divisor of {size.dim}, such as {size.num_heads}."
        )
    size = size._replace(num_heads=num_heads)
    image_size = default if image_size is None else image_size
    rates = {"dropout": dropout, "stochastic_depth": stochastic_depth}
    return _build(name, size, patch, **check_arguments(name, patch, num_classes, dtype, image_size, **rates))


@functools.cache
def _build(name, size, patch, num_classes, dtype, image_size, dropout, stochastic_depth) -> Net:
    def make_module(rngs: nnx.Rngs) -> VisionTransformer:
        rates = {"dropout": dropout, "stochastic_depth": stochastic_depth}
        return VisionTransformer(size, patch, image_size, num_classes, dtype=DTYPES[dtype], **rates, rngs=rngs)

    return make_net(
        name,
        make_module,
        num_classes=num_classes,
        feature_dim=size.dim,
        min_image_size=image_size,
        classifier=("head",),
    )


vit_tiny_patch4_32 = functools.partial(_vit, "vit_tiny_patch4_32", TINY, 4, 32)  # CIFAR
vit_tiny_patch8_64 = functools.partial(_vit, "vit_tiny_patch8_64", TINY, 8, 64)  # Tiny ImageNet
vit_tiny_patch16_224 = functools.partial(_vit, "vit_tiny_patch16_224", TINY, 16, 224)
vit_small_patch16_224 = functools.partial(_vit, "vit_small_patch16_224", SMALL, 16, 224)
vit_base_patch16_224 = functools.partial(_vit, "vit_base_patch16_224", BASE, 16, 224)
vit_base_patch32_224 = functools.partial(_vit, "vit_base_patch32_224", BASE, 32, 224)
deit_tiny_patch16_224 = functools.partial(_vit, "deit_tiny_patch16_224", TINY, 16, 224)
deit_small_patch16_224 = functools.partial(_vit, "deit_small_patch16_224", SMALL, 16, 224)
deit_base_patch16_224 = functools.partial(_vit, "deit_base_patch16_224", BASE, 16, 224)
