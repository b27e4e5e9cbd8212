"""Inception v3 (Szegedy et al., 2016, arXiv:1512.00567) without its auxiliary head, as in torchvision.

Average pools divide by 9 at the edges too, as in torchvision (TF-slim does not count the padding). `width` multiplies
all channels, with a minimum of 16.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.inception import scaled
from jax_transfer.models.layers import (
    DTYPES,
    AvgPool,
    ConvNorm,
    MaxPool,
    chain,
    chain_blocks,
    check_scaled,
    gaussian_head,
    global_mean,
    in_groups,
)
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import HALF, Spec

MIN_IMAGE_SIZE = 75


def _concatenate(*branches):
    return jnp.concatenate(branches, axis=-1)


class BlockA(nnx.Module):
    """Block with a 5x5 convolution factorised into two 3x3 ones (figure 5).

    As in torchvision, another branch keeps a 5x5 convolution.
    """

    def __init__(self, features_in, pool, c, unit):
        self.branch1x1 = unit(features_in, c(64), 1)
        self.branch5x5_1 = unit(features_in, c(48), 1)
        self.branch5x5_2 = unit(c(48), c(64), 5)
        self.branch3x3dbl_1 = unit(features_in, c(64), 1)
        self.branch3x3dbl_2 = unit(c(64), c(96), 3)
        self.branch3x3dbl_3 = unit(c(96), c(96), 3)
        self.branch_pool = unit(features_in, c(pool), 1)
        self.features = 2 * c(64) + c(96) + c(pool)

    def __call__(self, x, train: bool):
        one = self.branch1x1(x, train)
        five = chain((self.branch5x5_1, self.branch5x5_2), x, train)
        double = chain((self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3), x, train)
        pooled = self.branch_pool(AvgPool(count_include_pad=True)(x), train)
        return _concatenate(one, five, double, pooled)


class BlockB(nnx.Module):
    """Block that halves the height and width (figure 10)."""

    def __init__(self, features_in, c, unit):
        self.branch3x3 = unit(features_in, c(384), 3, 2, padding=0)
        self.branch3x3dbl_1 = unit(features_in, c(64), 1)
        self.branch3x3dbl_2 = unit(c(64), c(96), 3)
        self.branch3x3dbl_3 = unit(c(96), c(96), 3, 2, padding=0)
        self.features = c(384) + c(96) + features_in

    def __call__(self, x, train: bool):
        double = chain((self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3), x, train)
        return _concatenate(self.branch3x3(x, train), double, MaxPool(3, 2)(x))


class BlockC(nnx.Module):
    """Block with 7x7 convolutions factorised into 1x7 and 7x1 ones (figure 6)."""

    def __init__(self, features_in, middle, c, unit):
        wide, high = (1, 7), (7, 1)
        self.branch1x1 = unit(features_in, c(192), 1)
        self.branch7x7_1 = unit(features_in, c(middle), 1)
        self.branch7x7_2 = unit(c(middle), c(middle), wide)
        self.branch7x7_3 = unit(c(middle), c(192), high)
        self.branch7x7dbl_1 = unit(features_in, c(middle), 1)
        self.branch7x7dbl_2 = unit(c(middle), c(middle), high)
        self.branch7x7dbl_3 = unit(c(middle), c(middle), wide)
        self.branch7x7dbl_4 = unit(c(middle), c(middle), high)
        self.branch7x7dbl_5 = unit(c(middle), c(192), wide)
        self.branch_pool = unit(features_in, c(192), 1)
        self.features = 4 * c(192)

    def __call__(self, x, train: bool):
        seven = chain((self.branch7x7_1, self.branch7x7_2, self.branch7x7_3), x, train)
        double = chain((self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3), x, train)
        double = chain((self.branch7x7dbl_4, self.branch7x7dbl_5), double, train)
        pooled = self.branch_pool(AvgPool(count_include_pad=True)(x), train)
        return _concatenate(self.branch1x1(x, train), seven, double, pooled)


class BlockD(nnx.Module):
    """Block that halves the height and width a second time."""

    def __init__(self, features_in, c, unit):
        self.branch3x3_1 = unit(features_in, c(192), 1)
        self.branch3x3_2 = unit(c(192), c(320), 3, 2, padding=0)
        self.branch7x7x3_1 = unit(features_in, c(192), 1)
        self.branch7x7x3_2 = unit(c(192), c(192), (1, 7))
        self.branch7x7x3_3 = unit(c(192), c(192), (7, 1))
        self.branch7x7x3_4 = unit(c(192), c(192), 3, 2, padding=0)
        self.features = c(320) + c(192) + features_in

    def __call__(self, x, train: bool):
        three = chain((self.branch3x3_1, self.branch3x3_2), x, train)
        seven = (self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return _concatenate(three, chain(seven, x, train), MaxPool(3, 2)(x))


class BlockE(nnx.Module):
    """Block with 3x3 convolutions split into parallel 1x3 and 3x1 ones (figure 7)."""

    def __init__(self, features_in, c, unit):
        wide, high = (1, 3), (3, 1)
        self.branch1x1 = unit(features_in, c(320), 1)
        self.branch3x3_1 = unit(features_in, c(384), 1)
        self.branch3x3_2a = unit(c(384), c(384), wide)
        self.branch3x3_2b = unit(c(384), c(384), high)
        self.branch3x3dbl_1 = unit(features_in, c(448), 1)
        self.branch3x3dbl_2 = unit(c(448), c(384), 3)
        self.branch3x3dbl_3a = unit(c(384), c(384), wide)
        self.branch3x3dbl_3b = unit(c(384), c(384), high)
        self.branch_pool = unit(features_in, c(192), 1)
        self.features = c(320) + 4 * c(384) + c(192)

    def __call__(self, x, train: bool):
        three = self.branch3x3_1(x, train)
        three = _concatenate(self.branch3x3_2a(three, train), self.branch3x3_2b(three, train))
        double = chain((self.branch3x3dbl_1, self.branch3x3dbl_2), x, train)
        double = _concatenate(self.branch3x3dbl_3a(double, train), self.branch3x3dbl_3b(double, train))
        pooled = self.branch_pool(AvgPool(count_include_pad=True)(x), train)
        return _concatenate(self.branch1x1(x, train), three, double, pooled)


class InceptionV3(nnx.Module):
    """Stem, eleven blocks, global average pool (the features), dropout, linear head."""

    def __init__(self, num_classes: int, *, width: float, dtype, rngs: nnx.Rngs):
        unit, c = functools.partial(ConvNorm, dtype=dtype, rngs=rngs), functools.partial(scaled, width=width)
        self.Conv2d_1a_3x3 = unit(3, c(32), 3, 2, padding=0)
        self.Conv2d_2a_3x3 = unit(c(32), c(32), 3, padding=0)
        self.Conv2d_2b_3x3 = unit(c(32), c(64), 3)
        self.Conv2d_3b_1x1 = unit(c(64), c(80), 1)
        self.Conv2d_4a_3x3 = unit(c(80), c(192), 3, padding=0)
        self.Mixed_5b = BlockA(c(192), 32, c, unit)
        self.Mixed_5c = BlockA(self.Mixed_5b.features, 64, c, unit)
        self.Mixed_5d = BlockA(self.Mixed_5c.features, 64, c, unit)
        self.Mixed_6a = BlockB(self.Mixed_5d.features, c, unit)
        self.Mixed_6b = BlockC(self.Mixed_6a.features, 128, c, unit)
        self.Mixed_6c = BlockC(self.Mixed_6b.features, 160, c, unit)
        self.Mixed_6d = BlockC(self.Mixed_6c.features, 160, c, unit)
        self.Mixed_6e = BlockC(self.Mixed_6d.features, 192, c, unit)
        self.Mixed_7a = BlockD(self.Mixed_6e.features, c, unit)
        self.Mixed_7b = BlockE(self.Mixed_7a.features, c, unit)
        self.Mixed_7c = BlockE(self.Mixed_7b.features, c, unit)
        self.dropout = nnx.Dropout(0.5)
        self.fc = nnx.Linear(self.Mixed_7c.features, num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        pool = MaxPool(3, 2)
        stem = (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, pool)
        x = chain((*stem, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, pool), images.astype(self.dtype), train)
        x = chain_blocks((self.Mixed_5b, self.Mixed_5c, self.Mixed_5d), block_output(x), train)
        x = chain_blocks((self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e), x, train)
        x = chain_blocks((self.Mixed_7a, self.Mixed_7b, self.Mixed_7c), x, train)
        features = global_mean(x)
        logits = self.fc(self.dropout(features, deterministic=not train, rngs=rngs))
        return Output(logits=logits, features=features, maps=x)


def _inception_v3(num_classes, dtype="float32", width=1.0, batch_norm_group=None) -> Net:
    """Makes Inception v3.

    Calls with equal arguments return the same Net object, so that they share compiled code.

    Args:
      num_classes: columns of the logits; 0 for a net without a head.
      dtype: dtype of the computation, "float32" or "bfloat16" (or the jnp type). Parameters, BatchNorm, features and
        logits are always float32.
      width: positive multiplier of the channels; 1.0 in the paper.
      batch_norm_group: images that BatchNorm normalises together in training; by default the global batch.

    Raises:
      InputError: if an argument is invalid.
    """
    return _build(*check_scaled("inception_v3", num_classes, dtype, width, batch_norm_group))


@functools.cache
def _build(num_classes, dtype, width, batch_norm_group) -> Net:
    return make_net(
        "inception_v3",
        in_groups(lambda rngs: InceptionV3(num_classes, width=width, dtype=DTYPES[dtype], rngs=rngs), batch_norm_group),
        num_classes=num_classes,
        feature_dim=scaled(320, width) + 4 * scaled(384, width) + scaled(192, width),
        min_image_size=MIN_IMAGE_SIZE,
        classifier=("fc",),
    )


# torchvision's model takes images normalised with ImageNet's mean and std, and converts them to a mean and std of 0.5
# ("transform_input"). Here images are normalised with 0.5 directly.
TORCHVISION = Preprocessing(299, 299 / 342, HALF, HALF)
TIMM = Preprocessing(299, 299 / 341, HALF, HALF, "bicubic")

inception_v3 = Spec(
    _inception_v3,
    MIN_IMAGE_SIZE,
    released={
        "inception_v3": TORCHVISION,
        "inception_v3_gluon": Preprocessing(299, 299 / 341, interpolation="bicubic"),
        "inception_v3_tf": TIMM,
        "inception_v3_tv": TIMM,
    },
)
