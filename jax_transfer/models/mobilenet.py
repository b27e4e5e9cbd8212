"""MobileNets, each with the layout and the parameter names of a released torch checkpoint.

- v1 (Howard et al., 2017, arXiv:1704.04861), with ReLU6 and the parameter names of timm's `mobilenetv1_100`.
- v2 (Sandler et al., 2018, arXiv:1801.04381), with the parameter names of torchvision's `mobilenet_v2`.

Padding is symmetric, as in torch, or with `padding="same"` as in Keras and TF-slim.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import (
    DTYPES,
    BatchNorm,
    chain_blocks,
    check_batch_norm_eps,
    check_scaled,
    conv,
    gaussian_head,
    global_mean,
    in_groups,
    with_epsilon,
)
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import BICUBIC, HALF, IMAGENET, TORCHVISION_V2, VIT, Spec

# Stages of v1: (channels, blocks, stride of the first block); table 1 of the paper.
V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
# Stages of v2: (expansion, channels, blocks, stride of the first block); table 2 of the paper.
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _make_divisible(features: float, divisor: int = 8) -> int:
    """Returns the multiple of `divisor` nearest to `features`, but not below 0.9 * features, as in torchvision."""
    nearest = max(divisor, int(features + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * features else nearest


# How 3x3 convolutions pad: "symmetric" by one pixel on each side, as in torch; "same" as in TensorFlow, which pads an
# even image only at the bottom and on the right where the stride is 2. The weights do not show it.
PADDINGS = {"symmetric": None, "same": "SAME"}


class SeparableBlock(nnx.Module):
    """Depthwise 3x3 convolution and pointwise convolution, each followed by BatchNorm and ReLU6."""

    def __init__(self, features_in: int, features_out: int, stride: int, *, padding, dtype, rngs: nnx.Rngs):
        self.conv_dw = conv(features_in, features_in, 3, stride, dtype, rngs, padding=padding, groups=features_in)
        self.bn1 = BatchNorm(features_in, dtype=dtype)
        self.conv_pw = conv(features_in, features_out, 1, 1, dtype, rngs)
        self.bn2 = BatchNorm(features_out, dtype=dtype)

    def __call__(self, x, train: bool):
        x = jax.nn.relu6(self.bn1(self.conv_dw(x), train))
        return jax.nn.relu6(self.bn2(self.conv_pw(x), train))


class MobileNetV1(nnx.Module):
    """Stem, thirteen separable blocks, global average pool (the features), linear head."""

    def __init__(self, num_classes: int, *, width: float, padding, dtype, rngs: nnx.Rngs):
        features = _make_divisible(32 * width)
        self.conv_stem = conv(3, features, 3, 2, dtype, rngs, padding=padding)
        options = {"padding": padding, "dtype": dtype, "rngs": rngs}
        self.bn1 = BatchNorm(features, dtype=dtype)
        stages = []
        for channels, num_blocks, stride in V1_STAGES:
            blocks = []
            for i in range(num_blocks):
                features_out = _make_divisible(channels * width)
                blocks.append(SeparableBlock(features, features_out, 1 if i else stride, **options))
                features = features_out
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.classifier = nnx.Linear(features, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        x = jax.nn.relu6(self.bn1(self.conv_stem(images.astype(self.dtype)), train))
        x = block_output(x)
        for stage in self.blocks:
            x = chain_blocks(stage, x, train)
        features = global_mean(x)
        return Output(logits=self.classifier(features), features=features, maps=x)


def _conv_norm(features_in, features_out, size, stride, dtype, rngs, padding=None, groups=1) -> nnx.List:
    """Returns [convolution, BatchNorm], whose names in a checkpoint are 0 and 1; `_relu6` applies them."""
    layer = conv(features_in, features_out, size, stride, dtype, rngs, padding=padding, groups=groups)
    return nnx.List([layer, BatchNorm(features_out, dtype=dtype)])


def _relu6(conv_norm, x, train: bool):
    """Applies a convolution, BatchNorm and ReLU6."""
    layer, norm = conv_norm
    return jax.nn.relu6(norm(layer(x), train))


class InvertedResidual(nnx.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection without activation; a shortcut if the shape is unchanged."""

    def __init__(self, features_in, features_out, stride, expansion, *, padding, dtype, rngs: nnx.Rngs):
        inner = features_in * expansion
        expand = [] if expansion == 1 else [_conv_norm(features_in, inner, 1, 1, dtype, rngs)]
        depthwise = _conv_norm(inner, inner, 3, stride, dtype, rngs, padding, groups=inner)
        project = _conv_norm(inner, features_out, 1, 1, dtype, rngs)
        self.conv = nnx.List([*expand, depthwise, *project])
        self.shortcut = stride == 1 and features_in == features_out

    def __call__(self, x, train: bool):
        *units, project, norm = self.conv
        y = x
        for unit in units:
            y = _relu6(unit, y, train)
        y = norm(project(y), train)
        return x + y if self.shortcut else y


class MobileNetV2(nnx.Module):
    """Stem, seventeen inverted residuals, 1x1 convolution, global average pool (the features), linear head."""

    def __init__(self, num_classes: int, *, width: float, padding, dtype, rngs: nnx.Rngs):
        features = _make_divisible(32 * width)
        layers: list[nnx.Module] = [_conv_norm(3, features, 3, 2, dtype, rngs, padding)]
        options = {"padding": padding, "dtype": dtype, "rngs": rngs}
        for expansion, channels, num_blocks, stride in V2_STAGES:
            for i in range(num_blocks):
                features_out = _make_divisible(channels * width)
                layers.append(InvertedResidual(features, features_out, 1 if i else stride, expansion, **options))
                features = features_out
        last = _make_divisible(1280 * max(1.0, width))
        layers.append(_conv_norm(features, last, 1, 1, dtype, rngs))
        self.features = nnx.List(layers)
        head = nnx.Linear(last, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.classifier = nnx.List([nnx.Dropout(0.2), head])
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        stem, *blocks, last = self.features
        x = block_output(_relu6(stem, images.astype(self.dtype), train))
        maps = _relu6(last, chain_blocks(blocks, x, train), train)
        features = global_mean(maps)
        dropout: Any = self.classifier[0]
        head = self.classifier[1]
        logits = head(dropout(features, deterministic=not train, rngs=rngs))
        return Output(logits=logits, features=features, maps=maps)


def width_of(name: str, channels: Mapping[str, int]) -> float | None:
    """Returns the width multiplier for which a MobileNet has the given channels; None if there is none.

    Several multipliers can give the same channels after rounding, and thus the same network. The result is the first
    one that fits among 1 and the multiples of 1/4, 1/20, 1/100 and 1/1000, in this order, up to 4.

    Args:
      name: "mobilenet_v1" or "mobilenet_v2".
      channels: name of a weight -> output channels; names other than those of `_channels` are ignored.

    >>> width_of("mobilenet_v1", {"conv_stem.weight": 16, "blocks.0.0.conv_pw.weight": 32})
    0.5
    """
    names = [layer for layer in _channels(name, 1.0) if layer in channels]
    widths = (1.0, *(k / steps for steps in (4, 20, 100, 1000) for k in range(1, 4 * steps + 1)))

    def fits(width: float) -> bool:
        expected = _channels(name, width)
        return all(channels[layer] == expected[layer] for layer in names)

    return next((width for width in widths if fits(width)), None) if names else None


def _channels(name: str, width: float) -> dict[str, int]:
    """Returns {name of a weight: output channels} for the stem, each stage and the last convolution."""
    if name == "mobilenet_v1":
        stages = {f"blocks.{i}.0.conv_pw.weight": channels for i, (channels, _, _) in enumerate(V1_STAGES)}
        return {layer: _make_divisible(c * width) for layer, c in {"conv_stem.weight": 32, **stages}.items()}
    layers, block = {"features.0.0.weight": 32}, 1
    for expansion, channels, num_blocks, _ in V2_STAGES:
        layers[f"features.{block}.conv.{1 if expansion == 1 else 2}.weight"] = channels
        block += num_blocks
    rounded = {layer: _make_divisible(channels * width) for layer, channels in layers.items()}
    return {**rounded, f"features.{block}.0.weight": _make_divisible(1280 * max(1.0, width))}


def width_from_shapes(name: str, state: Mapping) -> dict:
    """Returns {"width": multiplier}, inferred from the convolutions of a MobileNet; {} if it is 1 or unknown."""
    width = width_of(name, {layer: len(x) for layer, x in state.items() if x.ndim == 4})
    return {"width": width} if width not in (None, 1.0) else {}


MIN_IMAGE_SIZE = 32


def _mobilenet(
    name, num_classes, dtype="float32", width=1.0, padding="symmetric", batch_norm_group=None, batch_norm_eps=1e-5
) -> Net:
    """Makes a MobileNet.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, BatchNorm, features and
        logits are always float32.
      width: positive multiplier of the channels; 0.25, 0.5, 0.75 and 1.0 in the v1 paper. Channels are rounded to
        multiples of 8. In v2 a width below 1 does not reduce the 1,280 features (section 4.1).
      padding: a key of PADDINGS: "symmetric" as in torch, or "same" as in Keras and TF-slim.
      batch_norm_group: images that BatchNorm normalises together in training; by default the global batch.
      batch_norm_eps: what BatchNorm adds to the variance; 1e-5 in torch, 1e-3 in Keras and TF-slim.

    Raises:
      InputError: if an argument is invalid.
    """
    choose(PADDINGS, padding, f"padding of {name}")
    checked = check_scaled(name, num_classes, dtype, width, batch_norm_group)
    return _build(name, *checked, padding, check_batch_norm_eps(name, batch_norm_eps))


@functools.cache
def _build(name, num_classes, dtype, width, batch_norm_group, padding, batch_norm_eps) -> Net:
    module, feature_dim, classifier = {
        "mobilenet_v1": (MobileNetV1, _make_divisible(1024 * width), ("classifier",)),
        "mobilenet_v2": (MobileNetV2, _make_divisible(1280 * max(1.0, width)), ("classifier", "1")),
    }[name]
    options = {"width": width, "padding": PADDINGS[padding], "dtype": DTYPES[dtype]}
    make_module = with_epsilon(lambda rngs: module(num_classes, **options, rngs=rngs), batch_norm_eps)
    return make_net(
        name,
        in_groups(make_module, batch_norm_group),
        num_classes=num_classes,
        feature_dim=feature_dim,
        min_image_size=MIN_IMAGE_SIZE,
        classifier=classifier,
    )


def _spec(name: str, released: Mapping[str, Preprocessing]) -> Spec:
    return Spec(
        functools.partial(_mobilenet, name),
        MIN_IMAGE_SIZE,
        released=released,
        settings_from_shapes=functools.partial(width_from_shapes, name),
    )


TIMM_V1 = Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")

mobilenet_v1 = _spec("mobilenet_v1", {"mobilenet_v1": TIMM_V1, "mobilenetv1_100": TIMM_V1, "mobilenetv1_125": VIT})
mobilenet_v2 = _spec(
    "mobilenet_v2",
    {
        "mobilenet_v2": IMAGENET,
        "mobilenet_v2_7ebf99e0": TORCHVISION_V2,
        "mobilenetv2_050": BICUBIC,
        "mobilenetv2_100": BICUBIC,
        "mobilenetv2_140": BICUBIC,
    },
)
