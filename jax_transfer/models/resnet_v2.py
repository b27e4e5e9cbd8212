"""Residual networks v2 (He et al., 2016, arXiv:1603.05027): full pre-activation, with timm's parameter names.

BatchNorm and ReLU come before each convolution and once more before the global pool; the stem has neither. A projection
shortcut is applied to the activated input, whereas an identity shortcut adds the input itself. In a bottleneck, the
stride is in the 3x3 convolution. timm's `resnetv2_50` stores the head `head.fc` as a 1x1 convolution [s, d, 1, 1]; here
it is a matrix [d, s].
"""

import functools

from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import (
    DTYPES,
    BatchNorm,
    chain,
    chain_blocks,
    conv,
    gaussian_head,
    global_mean,
    in_groups,
    with_epsilon,
)
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.resnet import STEMS, check_arguments, width_and_stem_from_shapes
from jax_transfer.models.spec import HALF, VIT, Spec
from jax_transfer.records import InputError


class Conv(nnx.Module):
    """A convolution under the name `conv`, as in timm's stem and projections."""

    def __init__(self, features_in: int, features_out: int, size: int, stride: int, dtype, rngs: nnx.Rngs):
        self.conv = conv(features_in, features_out, size, stride, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b j k o"]:
        return self.conv(x)


class PreActBlock(nnx.Module):
    """Convolutions with kernels of `sizes`, each preceded by BatchNorm and ReLU, and a shortcut.

    The convolution at index `strided` has the stride; the others have stride 1.
    """

    def __init__(self, features_in, channels, sizes, strided, stride, dtype, rngs: nnx.Rngs):
        self.depth = len(sizes)
        features = features_in
        for i, (features_out, size) in enumerate(zip(channels, sizes, strict=True)):
            setattr(self, f"norm{i + 1}", BatchNorm(features, dtype=dtype))
            layer = conv(features, features_out, size, stride if i == strided else 1, dtype, rngs)
            setattr(self, f"conv{i + 1}", layer)
            features = features_out
        project = stride != 1 or features_in != features
        self.downsample = Conv(features_in, features, 1, stride, dtype, rngs) if project else None

    def __call__(self, x, train: bool):
        y = activated = nnx.relu(getattr(self, "norm1")(x, train))  # noqa: B009  set by name above
        for i in range(self.depth):
            y = y if i == 0 else nnx.relu(getattr(self, f"norm{i + 1}")(y, train))
            y = getattr(self, f"conv{i + 1}")(y)
        return y + (x if self.downsample is None else self.downsample(activated))


def basic_block(features_in: int, width: int, stride: int, dtype, rngs: nnx.Rngs) -> PreActBlock:
    """Returns a block of two 3x3 convolutions (ResNet-18 and 34)."""
    return PreActBlock(features_in, (width, width), (3, 3), 0, stride, dtype, rngs)


def bottleneck(features_in: int, width: int, stride: int, dtype, rngs: nnx.Rngs) -> PreActBlock:
    """Returns a block of 1x1, 3x3 (with stride) and 1x1 convolutions (ResNet-50 and deeper)."""
    return PreActBlock(features_in, (width, width, 4 * width), (1, 3, 1), 1, stride, dtype, rngs)


EXPANSION = {basic_block: 1, bottleneck: 4}


class Blocks(nnx.Module):
    """The blocks of a stage under the name `blocks`."""

    def __init__(self, blocks: list):
        self.blocks = nnx.List(blocks)

    def __call__(self, x, train: bool):
        return chain_blocks(self.blocks, x, train)


class Head(nnx.Module):
    """The linear head under the name `fc`."""

    def __init__(self, features: int, num_classes: int, rngs: nnx.Rngs):
        self.fc = nnx.Linear(features, num_classes, kernel_init=gaussian_head, rngs=rngs)


class ResNetV2(nnx.Module):
    """Stem, four stages, BatchNorm and ReLU, global average pool (the features), linear head (the logits)."""

    def __init__(self, block, stage_sizes, num_classes, *, stem, width, last_stride, dtype, rngs: nnx.Rngs):
        self.layout = STEMS[stem]
        self.stem = Conv(3, width, self.layout.size, self.layout.stride, dtype, rngs)
        strides = (1, 2, 2, last_stride)
        features, stages = width, []
        for stage, num_blocks in enumerate(stage_sizes):
            blocks = []
            for i in range(num_blocks):
                stride = strides[stage] if i == 0 else 1
                blocks.append(block(features, width * 2**stage, stride, dtype, rngs))
                features = EXPANSION[block] * width * 2**stage
            stages.append(Blocks(blocks))
        self.stages = nnx.List(stages)
        self.norm = BatchNorm(features, dtype=dtype)
        self.head = Head(features, num_classes, rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        x = self.stem(images.astype(self.dtype))
        x = block_output(self.layout.apply_pool(x))
        x = nnx.relu(self.norm(chain(self.stages, x, train), train))
        features = global_mean(x)
        return Output(logits=self.head.fc(features), features=features, maps=x)


def _resnet(
    name, stage_sizes, block, num_classes, dtype="float32", stem="imagenet", width=64, last_stride=2,
    batch_norm_group=None, batch_norm_eps=1e-5,
):  # fmt: skip
    """Makes a pre-activation residual network.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, BatchNorm, features and
        logits are always float32.
      stem: a key of `resnet.STEMS`: "imagenet" (7x7 with stride 2 and a 3x3 max pool with stride 2; images of at least
        32 pixels), "cifar" (3x3 with stride 1; at least 8 pixels), or one of the less common stems.
      width: channels of the first stage; 64 in the paper.
      last_stride: stride of the last stage, 1 or 2; networks trained on patches of images have 1.
      batch_norm_group: images that BatchNorm normalises together in training; by default the global batch.
      batch_norm_eps: what BatchNorm adds to the variance; 1e-5 in torch, 1e-3 in networks of TensorFlow's layers.

    Raises:
      InputError: if an argument is invalid.
    """
    if last_stride not in (1, 2):
        raise InputError(f"last_stride of {name} is {last_stride!r}; expected 1 or 2.")
    checked = check_arguments(name, num_classes, dtype, stem, width, batch_norm_group, batch_norm_eps)
    return _build(name, stage_sizes, block, *checked, int(last_stride))


@functools.cache
def _build(
    name, stage_sizes, block, num_classes, dtype, stem, width, batch_norm_group, batch_norm_eps, last_stride
) -> Net:
    def make_module(rngs: nnx.Rngs) -> ResNetV2:
        options = {"stem": stem, "width": width, "last_stride": last_stride, "dtype": DTYPES[dtype]}
        return ResNetV2(block, stage_sizes, num_classes, **options, rngs=rngs)

    return make_net(
        name,
        in_groups(with_epsilon(make_module, batch_norm_eps), batch_norm_group),
        num_classes=num_classes,
        feature_dim=width * 8 * EXPANSION[block],
        min_image_size=STEMS[stem].min_image_size,
        classifier=("head", "fc"),
    )


def _spec(name: str, stage_sizes: tuple[int, ...], block, timm_name: str, released: Preprocessing) -> Spec:
    return Spec(
        functools.partial(_resnet, name, stage_sizes, block),
        STEMS["imagenet"].min_image_size,
        released={name: released, timm_name: released},
        settings_from_shapes=functools.partial(width_and_stem_from_shapes, "stem.conv.weight"),
    )


TIMM_95 = Preprocessing(224, 224 / 235, HALF, HALF, "bicubic")
TIMM_875 = Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")

resnet18_v2 = _spec("resnet18_v2", (2, 2, 2, 2), basic_block, "resnetv2_18", VIT)
resnet34_v2 = _spec("resnet34_v2", (3, 4, 6, 3), basic_block, "resnetv2_34", VIT)
resnet50_v2 = _spec("resnet50_v2", (3, 4, 6, 3), bottleneck, "resnetv2_50", TIMM_95)
resnet101_v2 = _spec("resnet101_v2", (3, 4, 23, 3), bottleneck, "resnetv2_101", TIMM_95)
resnet152_v2 = _spec("resnet152_v2", (3, 8, 36, 3), bottleneck, "resnetv2_152", TIMM_875)
