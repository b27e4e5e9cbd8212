"""Inception v1 and v2, each with the layout and the parameter names of a released torch checkpoint.

- v1: GoogLeNet (Szegedy et al., 2015, arXiv:1409.4842) with BatchNorm and without auxiliary heads, as in
  torchvision's `googlenet`. The "5x5" branch has 3x3 kernels, as in the released weights.
- v2: BN-Inception (Ioffe and Szegedy, 2015, arXiv:1502.03167), as in `bninception` of the package pretrainedmodels
  (weights converted from Caffe): the first convolution is a plain 7x7 one (separable in TF-slim), convolutions have a
  bias, and BatchNorm has eps 1e-5.

`width` multiplies all channels, with a minimum of 16, like depth_multiplier and min_depth in TF-slim.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import (
    DTYPES,
    AvgPool,
    BatchNorm,
    ConvNorm,
    MaxPool,
    chain,
    check_scaled,
    conv,
    gaussian_head,
    global_mean,
    in_groups,
)
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import HALF, Spec


def scaled(features: int, width: float) -> int:
    """Returns the number of channels after applying the width multiplier; at least 16, TF-slim's min_depth.

    >>> scaled(64, 0.5), scaled(64, 0.1)
    (32, 16)
    """
    return max(16, int(features * width))


# Channels of the branches: 1x1; 3x3 reduction, 3x3; "5x5" reduction, "5x5"; pool projection (table 1 of the paper).
V1_BLOCKS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
# Channels of the branches: 1x1; 3x3 reduction, 3x3; double 3x3 reduction, double 3x3; pool projection. Blocks without a
# 1x1 branch and pool projection have stride 2.
V2_BLOCKS = {
    "inception_3a": (64, 64, 64, 64, 96, 32),
    "inception_3b": (64, 64, 96, 64, 96, 64),
    "inception_3c": (0, 128, 160, 64, 96, 0),
    "inception_4a": (224, 64, 96, 96, 128, 128),
    "inception_4b": (192, 96, 128, 96, 128, 128),
    "inception_4c": (160, 128, 160, 128, 160, 128),
    "inception_4d": (96, 128, 192, 160, 192, 128),
    "inception_4e": (0, 128, 192, 192, 256, 0),
    "inception_5a": (352, 192, 320, 160, 224, 128),
    "inception_5b": (352, 192, 320, 192, 224, 128),
}
# Side in pixels of the smallest image that leaves one pixel in the last stage of the published network.
MIN_IMAGE_SIZES = {"inception_v1": 15, "inception_v2": 31}


class V1Block(nnx.Module):
    """Four parallel branches, concatenated."""

    def __init__(self, features_in, one, three_in, three, five_in, five, pool, unit):
        self.branch1 = unit(features_in, one, 1)
        self.branch2 = nnx.List([unit(features_in, three_in, 1), unit(three_in, three, 3)])
        self.branch3 = nnx.List([unit(features_in, five_in, 1), unit(five_in, five, 3)])
        self.branch4 = nnx.List([MaxPool(3, 1, padding=1), unit(features_in, pool, 1)])

    def __call__(self, x, train: bool):
        branches = ([self.branch1], self.branch2, self.branch3, self.branch4)
        return jnp.concatenate([chain(branch, x, train) for branch in branches], axis=-1)


class InceptionV1(nnx.Module):
    """Stem, nine blocks with pools before 4a and 5a, global average pool (the features), linear head."""

    def __init__(self, num_classes: int, *, width: float, dtype, rngs: nnx.Rngs):
        unit, c = functools.partial(ConvNorm, dtype=dtype, rngs=rngs), functools.partial(scaled, width=width)
        self.conv1 = unit(3, c(64), 7, 2)
        self.conv2 = unit(c(64), c(64), 1)
        self.conv3 = unit(c(64), c(192), 3)
        features = c(192)
        for name, channels in V1_BLOCKS.items():
            channels = [c(n) for n in channels]
            one, three_in, three, five_in, five, pool = channels
            setattr(self, name, V1Block(features, one, three_in, three, five_in, five, pool, unit))
            features = one + three + five + pool
        self.dropout = nnx.Dropout(0.2)
        self.fc = nnx.Linear(features, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        pools = {"inception4a": MaxPool(3, 2, ceil_mode=True), "inception5a": MaxPool(2, 2, ceil_mode=True)}
        pool = MaxPool(3, 2, ceil_mode=True)
        x = pool(self.conv1(images.astype(self.dtype), train))
        x = block_output(pool(chain((self.conv2, self.conv3), x, train)))
        for name in V1_BLOCKS:
            x = block_output(getattr(self, name)(pools[name](x) if name in pools else x, train))
        features = global_mean(x)
        logits = self.fc(self.dropout(features, deterministic=not train, rngs=rngs))
        return Output(logits=logits, features=features, maps=x)


class InceptionV2(nnx.Module):
    """Stem, ten blocks, global average pool (the features), linear head.

    All layers are attributes of this module, since the parameter names in the checkpoint are flat.
    """

    def __init__(self, num_classes: int, *, width: float, dtype, rngs: nnx.Rngs):
        def add(name, features_in, features_out, size, stride=1):
            setattr(self, name, conv(features_in, features_out, size, stride, dtype, rngs, use_bias=True))
            setattr(self, f"{name}_bn", BatchNorm(features_out, dtype=dtype))

        c = functools.partial(scaled, width=width)
        add("conv1_7x7_s2", 3, c(64), 7, 2)
        add("conv2_3x3_reduce", c(64), c(64), 1)
        add("conv2_3x3", c(64), c(192), 3)
        features = c(192)
        for name, channels in V2_BLOCKS.items():
            strided = not channels[0]
            one, three_in, three, double_in, double, pool = (c(n) if n else 0 for n in channels)
            if not strided:
                add(f"{name}_1x1", features, one, 1)
                add(f"{name}_pool_proj", features, pool, 1)
            add(f"{name}_3x3_reduce", features, three_in, 1)
            add(f"{name}_3x3", three_in, three, 3, 2 if strided else 1)
            add(f"{name}_double_3x3_reduce", features, double_in, 1)
            add(f"{name}_double_3x3_1", double_in, double, 3)
            add(f"{name}_double_3x3_2", double, double, 3, 2 if strided else 1)
            features = one + three + double + (features if strided else pool)
        self.last_linear = nnx.Linear(features, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        def unit(name, x):
            return nnx.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x), train))

        pool = MaxPool(3, 2, ceil_mode=True)
        x = pool(unit("conv1_7x7_s2", images.astype(self.dtype)))
        x = block_output(pool(unit("conv2_3x3", unit("conv2_3x3_reduce", x))))
        for name, (one, *_) in V2_BLOCKS.items():
            three = unit(f"{name}_3x3", unit(f"{name}_3x3_reduce", x))
            double = unit(f"{name}_double_3x3_1", unit(f"{name}_double_3x3_reduce", x))
            double = unit(f"{name}_double_3x3_2", double)
            if one:
                # The last block has a max pool, as in the released model.
                pooled = MaxPool(3, 1, padding=1)(x) if name == "inception_5b" else AvgPool(count_include_pad=True)(x)
                branches = [unit(f"{name}_1x1", x), three, double, unit(f"{name}_pool_proj", pooled)]
            else:
                # Equals ceil_mode at even sizes. At odd sizes the released model fails, because the outputs of its
                # branches differ by a pixel; here the pool has as many windows as the strided convolutions.
                pads: Any = [(0, 1 + n % 2) for n in x.shape[1:3]]  # flax's annotation allows only strings
                branches = [three, double, nnx.max_pool(x, (3, 3), strides=(2, 2), padding=pads)]
            x = block_output(jnp.concatenate(branches, axis=-1))
        features = global_mean(x)
        return Output(logits=self.last_linear(features), features=features, maps=x)


def _inception(name, num_classes, dtype="float32", width=1.0, batch_norm_group=None) -> Net:
    """Makes Inception v1 (GoogLeNet with BatchNorm) or v2 (BN-Inception).

    Calls with equal arguments return the same Net object, so that they share compiled code.

    The released weights of v2 expect channels in the order blue, green, red. When they are loaded, `renamings` reverses
    the input channels of the first convolution, so that the net takes RGB images.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, BatchNorm, features and
        logits are always float32.
      width: positive multiplier of the channels; 1.0 in the paper.
      batch_norm_group: images that BatchNorm normalises together in training; by default the global batch.

    Raises:
      InputError: if an argument is invalid.
    """
    return _build(name, *check_scaled(name, num_classes, dtype, width, batch_norm_group))


@functools.cache
def _build(name, num_classes, dtype, width, batch_norm_group) -> Net:
    module, last_block, head = {
        "inception_v1": (InceptionV1, V1_BLOCKS["inception5b"], "fc"),
        "inception_v2": (InceptionV2, V2_BLOCKS["inception_5b"], "last_linear"),
    }[name]
    one, _, second, _, third, pool = last_block
    return make_net(
        name,
        in_groups(lambda rngs: module(num_classes, width=width, dtype=DTYPES[dtype], rngs=rngs), batch_norm_group),
        num_classes=num_classes,
        feature_dim=sum(scaled(n, width) for n in (one, second, third, pool)),
        min_image_size=MIN_IMAGE_SIZES[name],
        classifier=(head,),
    )


# torchvision's model takes images normalised with ImageNet's mean and std, and converts them to a mean and std of 0.5
# ("transform_input"). Here images are normalised with 0.5 directly.
GOOGLENET = Preprocessing(224, 224 / 256, HALF, HALF)
# Pixels from 0 to 255, minus the mean. The released model takes the channels as blue, green, red; see `renamings`.
BN_INCEPTION = Preprocessing(224, 224 / 256, (128 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255))

inception_v1 = Spec(
    functools.partial(_inception, "inception_v1"),
    MIN_IMAGE_SIZES["inception_v1"],
    released={"inception_v1": GOOGLENET, "googlenet": GOOGLENET},
)
inception_v2 = Spec(
    functools.partial(_inception, "inception_v2"),
    MIN_IMAGE_SIZES["inception_v2"],
    released={"inception_v2": BN_INCEPTION, "bninception": BN_INCEPTION, "bn_inception": BN_INCEPTION},
)
