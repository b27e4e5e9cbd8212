"""Vision Transformers (Dosovitskiy et al., 2021, arXiv:2010.11929), with timm's layout and parameter names.

DeiT (Touvron et al., 2021, arXiv:2012.12877) without distillation is the same network, trained differently. The
features are the class token after the last LayerNorm. Matrix products run in `dtype`; LayerNorm, softmax, features,
logits and all parameters are float32.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import DTYPES
from jax_transfer.models.net import Net, Output, block_output, gaussian, make_net
from jax_transfer.models.spec import BICUBIC_248, HALF, IMAGENET, VIT, Spec
from jax_transfer.models.transformer import (
    LayerNorm,
    Size,
    as_grid,
    blocks,
    check_arguments,
    check_images,
    gaussian_002,
    join_class_token,
    linear,
)
from jax_transfer.records import InputError

TINY, SMALL, BASE = Size(192, 12, 3), Size(384, 12, 6), Size(768, 12, 12)


def uniform_fan_in(key, shape, dtype=jnp.float32) -> Float[Array, "h w i o"]:
    """Draws from U(-1, 1) / sqrt(h w i): torch's default for convolutions, which timm keeps for patch projections."""
    bound = 1 / math.sqrt(math.prod(shape[:3]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _patchwise(x: Float[Array, "b h w i"], kernel: Float[Array, "p p i o"], strides, padding, **options):
    """Computes a convolution of non-overlapping patches as a matrix product; see `layers._pointwise`."""
    b, h, w, c = x.shape
    p, _, _, features_out = kernel.shape
    patches = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)
    return patches @ kernel.reshape(p * p * c, features_out)


class PatchEmbed(nnx.Module):
    """Splits images into patches, row by row, and projects each patch to a token."""

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
        x = self._blocks(self._embed(images), train, rngs)
        features = self.norm(x[:, 0].astype(jnp.float32))
        maps = as_grid(self.norm(x[:, 1:].astype(jnp.float32)))
        return Output(logits=self.head(features), features=features, maps=maps)

    def encode(
        self, images: Float[Array, "b h w 3"], kept: Int[Array, "b m"], train: bool, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b 1+m d"]:
        """Returns the class token and the tokens of the patches `kept`, which see no others, after the LayerNorm."""
        x = self._embed(images)
        x = jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], kept[..., None], axis=1)], axis=1)
        return self.norm(self._blocks(x, train, rngs).astype(jnp.float32))

    def _embed(self, images):
        check_images(images, self.image_size)
        return join_class_token(self.patch_embed(images.astype(self.dtype)), self.cls_token[...], self.pos_embed[...])

    def _blocks(self, x, train, rngs):
        x = self.dropout(x, deterministic=not train, rngs=rngs)
        for block in self.blocks:
            x = block_output(block(x, train, rngs))
        return x


def resize_position_embedding(
    pos_embed: Float[Array, "1 n+1 d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "1 m+1 d"]:
    """Resizes a position embedding for images of another size; the row of the class token is kept.

    The interpolation is bicubic with antialiasing and equals `timm.layers.resample_abs_pos_embed` (torch's
    `interpolate(mode="bicubic", antialias=True)`) up to rounding.

    Args:
      pos_embed: `params["pos_embed"]`: the row of the class token, then the patches, row by row.
      grid, new_grid: old and new number of (rows, columns) of patches: (image_size // patch,) * 2.

    Raises:
      InputError: if pos_embed does not have this grid.

    >>> import jax.numpy as jnp
    >>> resize_position_embedding(jnp.zeros((1, 1 + 4 * 4, 8)), (4, 4), (6, 6)).shape
    (1, 37, 8)
    """
    rows, columns = grid
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, rows * columns + 1):
        raise InputError(
            f"pos_embed has shape {list(pos_embed.shape)}; expected [1, {rows * columns + 1}, d] for a class token and "
            f"a grid of {rows}x{columns} patches: pass the grid that it was trained on."
        )
    d = pos_embed.shape[-1]
    resized = jax.image.resize(pos_embed[0, 1:].reshape(rows, columns, d), (*new_grid, d), "cubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :1], resized.reshape(1, -1, d)], axis=1)


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
    """Makes a Vision Transformer.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, LayerNorm, softmax,
        features and logits are always float32.
      image_size: height and width of the images in pixels, a multiple of the patch size; by default the size in the
        name of the model. To use weights for another size, apply `resize_position_embedding` to them.
      dropout: dropout rate of the embedded tokens and in the blocks, in training.
      stochastic_depth: probability of skipping each half of the last block, in training; see `blocks`.
      num_heads: heads of each attention layer, a divisor of the width of the tokens; by default as in timm. It cannot
        be inferred from weights, whose shapes do not depend on it: ViT-S has 12 heads in MoCo v3 and 6 in timm.

    Raises:
      InputError: if an argument is invalid.
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


def image_size_from_shapes(patch: int, state: Mapping) -> dict:
    """Infers {"image_size": pixels} from the position embedding; {} if there is none or its grid is not square."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[1] < 2:
        return {}
    side = math.isqrt(table.shape[1] - 1)
    return {"image_size": side * patch} if side**2 == table.shape[1] - 1 else {}


def _spec(name: str, size: Size, patch: int, image_size: int, released: Mapping[str, Preprocessing], **known) -> Spec:
    return Spec(
        functools.partial(_vit, name, size, patch, image_size),
        image_size,
        patch,
        {name: VIT, **released},
        settings_from_shapes=functools.partial(image_size_from_shapes, patch),
        timm_pools=("token",),
        **known,
    )


VIT_384 = Preprocessing(384, 1.0, HALF, HALF, "bicubic")
CLIP = Preprocessing(224, 1.0, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic")

# The keys below are names of files released by timm, torchvision, Bamboo, DeiT, DINO, MAE and MoCo v3.
vit_tiny_patch4_32 = _spec(  # CIFAR
    "vit_tiny_patch4_32",
    TINY,
    4,
    32,
    {"vit_tiny_patch4_32": Preprocessing(32, 1.0, HALF, HALF, "bicubic")},
)
vit_tiny_patch8_64 = _spec(  # Tiny ImageNet
    "vit_tiny_patch8_64",
    TINY,
    8,
    64,
    {"vit_tiny_patch8_64": Preprocessing(64, 1.0, HALF, HALF, "bicubic")},
)
vit_tiny_patch16_224 = _spec(
    "vit_tiny_patch16_224",
    TINY,
    16,
    224,
    {"vit_tiny_patch16": VIT, "vit_tiny_patch16_384": VIT_384},
    architectures=("vit_tiny",),
)
vit_small_patch16_224 = _spec(
    "vit_small_patch16_224",
    SMALL,
    16,
    224,
    {
        "vit_small_patch16": VIT,
        "vit_small_patch16_384": VIT_384,
        "vit_small_patch16_224_dino": BICUBIC_248,
        "dino_deitsmall16": BICUBIC_248,
        "vit_s_300ep": IMAGENET,
        "linear_vit_s_300ep": IMAGENET,
    },
    architectures=("vit_small",),
)
vit_base_patch16_224 = _spec(
    "vit_base_patch16_224",
    BASE,
    16,
    224,
    {
        "vit_base_patch16": VIT,
        "vit_base_patch16_384": VIT_384,
        "vit_base_patch16_224_dino": BICUBIC_248,
        "dino_vitbase16": BICUBIC_248,
        "vit_base_patch16_224_mae": BICUBIC_248,
        "mae_pretrain_vit_base": BICUBIC_248,
        "vit_base_patch16_224_bamboo": CLIP,
        "vit_b_300ep": IMAGENET,
        "linear_vit_b_300ep": IMAGENET,
        "vit_b_16": IMAGENET,
        "vit_b_16_swag": Preprocessing(384, interpolation="bicubic"),
        "vit_b_16_lc_swag": Preprocessing(224, interpolation="bicubic"),
    },
    architectures=("vit_base", "mae_vit_base_patch16"),
)
vit_base_patch32_224 = _spec(
    "vit_base_patch32_224",
    BASE,
    32,
    224,
    {"vit_base_patch32": VIT, "vit_base_patch32_384": VIT_384, "vit_b_32": IMAGENET},
)
deit_tiny_patch16_224 = _spec(
    "deit_tiny_patch16_224",
    TINY,
    16,
    224,
    {"deit_tiny_patch16_224": BICUBIC_248, "deit_tiny_patch16": BICUBIC_248},
    network="vit_tiny_patch16_224",
)
deit_small_patch16_224 = _spec(
    "deit_small_patch16_224",
    SMALL,
    16,
    224,
    {"deit_small_patch16_224": BICUBIC_248, "deit_small_patch16": BICUBIC_248},
    network="vit_small_patch16_224",
)
deit_base_patch16_224 = _spec(
    "deit_base_patch16_224",
    BASE,
    16,
    224,
    {
        "deit_base_patch16_224": BICUBIC_248,
        "deit_base_patch16": BICUBIC_248,
        "deit_base_patch16_384": Preprocessing(384, interpolation="bicubic"),
    },
    network="vit_base_patch16_224",
)
