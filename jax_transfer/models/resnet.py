"""Residual networks v1 (He et al., 2016, arXiv:1512.03385), with torchvision's layout and parameter names.

In a bottleneck, the stride is in the 3x3 convolution ("v1.5", Goyal et al., 2017, arXiv:1706.02677), as in torchvision.
Padding is explicit and symmetric, as in torch, since "SAME" is asymmetric at stride 2.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import (
    DTYPES,
    BatchNorm,
    MaxPool,
    chain_blocks,
    check_batch_norm_eps,
    check_batch_norm_group,
    check_num_classes,
    conv,
    gaussian_head,
    in_groups,
    with_epsilon,
)
from jax_transfer.models.layers import he_normal_fan_out as he_normal_fan_out
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import BICUBIC, IMAGENET, TORCHVISION_V2, VIT, Spec
from jax_transfer.records import InputError


class Stem(NamedTuple):
    """Side and stride of the first convolution, and whether a 3x3 max pool with stride 2 follows.

    `zero_padding`: whether the pool sees zeros around the image, as in TensorFlow code that pads before it pools. torch
    ignores what lies outside, which differs where all values are negative.
    """

    size: int
    stride: int
    pool: bool
    zero_padding: bool = False

    def apply_pool(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j d"]:
        """Applies the max pool, if there is one."""
        if not self.pool:
            return x
        if self.zero_padding:
            return MaxPool(3, 2)(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
        return MaxPool(3, 2, padding=1)(x)

    @property
    def min_image_size(self) -> int:
        """Side in pixels of the smallest image that fills a pixel of the last stage; the stages' total stride is 8."""
        return 8 * self.stride * (2 if self.pool else 1)


# The shapes of weights show only the kernel size of the first convolution. "imagenet" is assumed for 7x7 and "cifar"
# for 3x3, since these are the most common stems.
STEMS = {
    "imagenet": Stem(7, 2, True),
    "cifar": Stem(3, 1, False),
    "3x3_pool": Stem(3, 1, True),
    "3x3_stride2": Stem(3, 2, False),
    "3x3_stride2_pool": Stem(3, 2, True),
    "7x7": Stem(7, 2, False),
    "7x7_zero_padded_pool": Stem(7, 2, True, zero_padding=True),
    "7x7_stride1_zero_padded_pool": Stem(7, 1, True, zero_padding=True),
}


def _downsample(features_in: int, features_out: int, stride: int, dtype, rngs: nnx.Rngs) -> nnx.List:
    """Returns the projection of the shortcut; empty if the shortcut is the identity."""
    if stride == 1 and features_in == features_out:
        return nnx.List([])
    return nnx.List([conv(features_in, features_out, 1, stride, dtype, rngs), BatchNorm(features_out, dtype=dtype)])


def _shortcut(downsample: nnx.List, x, train: bool):
    """Applies the projection of the shortcut, if there is one."""
    if not len(downsample):
        return x
    conv, norm = downsample
    return norm(conv(x), train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, features_in: int, width: int, stride: int, *, last_scale, dtype, rngs: nnx.Rngs):
        self.conv1 = conv(features_in, width, 3, stride, dtype, rngs)
        self.bn1 = BatchNorm(width, dtype=dtype)
        self.conv2 = conv(width, width, 3, 1, dtype, rngs)
        self.bn2 = BatchNorm(width, scale=last_scale, dtype=dtype)
        self.downsample = _downsample(features_in, width, stride, dtype, rngs)

    def __call__(self, x, train: bool):
        y = nnx.relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        return nnx.relu(y + _shortcut(self.downsample, x, train))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (with stride) and 1x1 convolutions (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, features_in: int, width: int, stride: int, *, last_scale, dtype, rngs: nnx.Rngs):
        features_out = self.expansion * width
        self.conv1 = conv(features_in, width, 1, 1, dtype, rngs)
        self.bn1 = BatchNorm(width, dtype=dtype)
        self.conv2 = conv(width, width, 3, stride, dtype, rngs)
        self.bn2 = BatchNorm(width, dtype=dtype)
        self.conv3 = conv(width, features_out, 1, 1, dtype, rngs)
        self.bn3 = BatchNorm(features_out, scale=last_scale, dtype=dtype)
        self.downsample = _downsample(features_in, features_out, stride, dtype, rngs)

    def __call__(self, x, train: bool):
        y = nnx.relu(self.bn1(self.conv1(x), train))
        y = nnx.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return nnx.relu(y + _shortcut(self.downsample, x, train))


class ResNet(nnx.Module):
    """Stem, four stages, global average pool (the features), linear head (the logits)."""

    def __init__(self, block, stage_sizes, num_classes, *, stem, width, zero_init_last, dtype, rngs: nnx.Rngs):
        last_scale = 0.0 if zero_init_last else 1.0
        self.stem = STEMS[stem]
        self.conv1 = conv(3, width, self.stem.size, self.stem.stride, dtype, rngs)
        self.bn1 = BatchNorm(width, dtype=dtype)
        features = width
        for stage, num_blocks in enumerate(stage_sizes):
            blocks = []
            for i in range(num_blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                stage_width = width * 2**stage
                blocks.append(block(features, stage_width, stride, last_scale=last_scale, dtype=dtype, rngs=rngs))
                features = block.expansion * stage_width
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = nnx.Linear(features, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        x = nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)), train))
        x = block_output(self.stem.apply_pool(x))
        for layer in (getattr(self, f"layer{i}") for i in (1, 2, 3, 4)):
            x = chain_blocks(layer, x, train)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return Output(logits=self.fc(features), features=features, maps=x)


def _resnet(
    name, stage_sizes, block, num_classes, dtype="float32", stem="imagenet", width=64, zero_init_last=False,
    batch_norm_group=None, batch_norm_eps=1e-5,
):  # fmt: skip
    """Makes a residual network.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, BatchNorm, features and
        logits are always float32.
      stem: a key of STEMS: "imagenet" (7x7 with stride 2 and a 3x3 max pool with stride 2; images of at least 32
        pixels), "cifar" (3x3 with stride 1; at least 8 pixels), or one of the less common stems.
      width: channels of the first stage; 64 in the paper.
      zero_init_last: initialise the last BatchNorm scale of each block to 0, so that each block starts as the identity
        (Goyal et al., 2017, section 5.1). torchvision's ImageNet weights were trained without this.
      batch_norm_group: images that BatchNorm normalises together in training; by default the global batch.
      batch_norm_eps: what BatchNorm adds to the variance; 1e-5 in torch, 1e-3 in networks of TensorFlow's layers.

    Raises:
      InputError: if an argument is invalid.
    """
    checked = check_arguments(name, num_classes, dtype, stem, width, batch_norm_group, batch_norm_eps)
    return _build(name, stage_sizes, block, *checked, bool(zero_init_last))


def check_arguments(
    name: str, num_classes, dtype, stem, width, batch_norm_group, batch_norm_eps
) -> tuple[int, str, str, int, int | None, float]:
    """Returns the arguments of a residual network, v1 or v2, in canonical form, so that equal ones give the same Net.

    Raises:
      InputError: if an argument is invalid, see `_resnet`.
    """
    dtype = getattr(dtype, "__name__", str(dtype))
    choose(DTYPES, dtype, f"dtype of {name}")
    choose(STEMS, stem, f"stem of {name}")
    num_classes = check_num_classes(name, num_classes)
    if width < 1 or width % 1:
        raise InputError(f"width of {name} is {width!r}; expected a whole number of channels, at least 1.")
    group, eps = check_batch_norm_group(name, batch_norm_group), check_batch_norm_eps(name, batch_norm_eps)
    return num_classes, dtype, stem, int(width), group, eps


@functools.cache
def _build(
    name, stage_sizes, block, num_classes, dtype, stem, width, batch_norm_group, batch_norm_eps, zero_init_last
) -> Net:
    def make_module(rngs: nnx.Rngs) -> ResNet:
        options = {"stem": stem, "width": width, "zero_init_last": zero_init_last, "dtype": DTYPES[dtype]}
        return ResNet(block, stage_sizes, num_classes, **options, rngs=rngs)

    return make_net(
        name,
        in_groups(with_epsilon(make_module, batch_norm_eps), batch_norm_group),
        num_classes=num_classes,
        feature_dim=width * 8 * block.expansion,
        min_image_size=STEMS[stem].min_image_size,
        classifier=("fc",),
    )


def width_and_stem_from_shapes(first: str, state: Mapping) -> dict:
    """Infers the width and the stem from the kernel [o, 3, h, w] of the first convolution, named `first` in `state`."""
    kernel = state.get(first)
    if kernel is None or kernel.ndim != 4:
        return {}
    return {"width": len(kernel), "stem": "cifar" if kernel.shape[2] == 3 else "imagenet"}


# timm's own ResNets by the tag in the name of the release: "a1" in resnet50.a1_in1k and resnet50_a1_0-14fe96d1.pth. The
# denominators are the sides of the resized images, as in `spec`.
TIMM_95 = Preprocessing(224, 224 / 235, interpolation="bicubic")
TIMM_A1H = Preprocessing(176, 176 / 195, interpolation="bicubic")
TIMM_A3 = Preprocessing(160, 160 / 168, interpolation="bicubic")
TIMM_TV2 = Preprocessing(176, 176 / 201)
TIMM_TAGS = {
    "a1": TIMM_95, "a1h": TIMM_95, "a2": TIMM_95, "a3": TIMM_A3, "am": BICUBIC, "b1k": TIMM_95, "b2k": TIMM_95,
    "bt": BICUBIC, "c1": TIMM_95, "c2": TIMM_95, "d_in1k": TIMM_95, "fb": IMAGENET, "gluon": BICUBIC, "ra": BICUBIC,
    "ram": BICUBIC, "ra4": VIT, "tv": IMAGENET, "tv2": TIMM_TV2,
}  # fmt: skip
# Names of some releases from before timm had tags; {} is the name of the model.
TIMM_BEFORE = {
    "gluon_{}_v1b": BICUBIC, "rw_{}": BICUBIC, "tv_{}": IMAGENET, "ssl_{}": IMAGENET, "swsl_{}": IMAGENET,
    "semi_supervised_{}": IMAGENET, "semi_weakly_supervised_{}": IMAGENET,
}  # fmt: skip


def _timm_releases(name: str) -> dict[str, Preprocessing]:
    """Returns {timm's name of a release: its preprocessing} for a ResNet."""
    tagged = {f"{name}_{tag}": preprocessing for tag, preprocessing in TIMM_TAGS.items()}
    return tagged | {before.format(name): preprocessing for before, preprocessing in TIMM_BEFORE.items()}


def _spec(name: str, stage_sizes: tuple[int, ...], block, released: Mapping[str, Preprocessing]) -> Spec:
    return Spec(
        functools.partial(_resnet, name, stage_sizes, block),
        STEMS["imagenet"].min_image_size,
        released={name: IMAGENET, **released},
        settings_from_shapes=functools.partial(width_and_stem_from_shapes, "conv1.weight"),
    )


resnet10 = _spec("resnet10", (1, 1, 1, 1), BasicBlock, {})  # for tests and quick starts
resnet18 = _spec("resnet18", (2, 2, 2, 2), BasicBlock, _timm_releases("resnet18"))
resnet34 = _spec("resnet34", (3, 4, 6, 3), BasicBlock, {**_timm_releases("resnet34"), "resnet34_43635321": BICUBIC})
resnet50 = _spec(
    "resnet50",
    (3, 4, 6, 3),
    Bottleneck,
    {
        **_timm_releases("resnet50"),
        "resnet50_11ad3fa6": TORCHVISION_V2,
        "resnet50_a1h": TIMM_A1H,
        "resnet50_a1h2_176": TIMM_A1H,
        "resnet50_d_f39db8af": TIMM_95,
        "resnet50_bamboo": Preprocessing(224, interpolation="bicubic"),
        "moco_v1": IMAGENET,
        "moco_v2": IMAGENET,
    },
)
resnet101 = _spec(
    "resnet101", (3, 4, 23, 3), Bottleneck, {**_timm_releases("resnet101"), "resnet101_cd907fc2": TORCHVISION_V2}
)
resnet152 = _spec(
    "resnet152", (3, 8, 36, 3), Bottleneck, {**_timm_releases("resnet152"), "resnet152_f82ba261": TORCHVISION_V2}
)
