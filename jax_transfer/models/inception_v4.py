"""Inception v4 (Szegedy et al., 2017, arXiv:1602.07261), with the layout and names of timm and pretrainedmodels.

Average pools divide by the number of pixels inside the image, as in TF-slim. `width` multiplies all channels, with a
minimum of 16.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.inception import scaled
from jax_transfer.models.inception_resnet_v2 import Mixed
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
REPEATS = (4, 7, 3)  # blocks A, B and C
WIDE, HIGH = (1, 7), (7, 1)


class PoolAndConv(nnx.Module):
    """A max pool and a convolution in parallel, which halve the height and width: the first and last fork of figure 3.

    Args:
      pool_first: whether the channels of the pool come before those of the convolution.
    """

    def __init__(self, features_in: int, features_out: int, pool_first: bool, unit):
        self.conv = unit(features_in, features_out, 3, 2, padding=0)
        self.pool_first = pool_first

    def __call__(self, x, train: bool):
        branches = MaxPool(3, 2)(x), self.conv(x, train)
        return jnp.concatenate(branches if self.pool_first else branches[::-1], axis=-1)


class BlockC(nnx.Module):
    """Block with 3x3 convolutions split into parallel 1x3 and 3x1 ones (figure 6)."""

    def __init__(self, n: int, c, unit):
        wide, high = (1, 3), (3, 1)
        self.branch0 = unit(n, c(256), 1)
        self.branch1_0 = unit(n, c(384), 1)
        self.branch1_1a = unit(c(384), c(256), wide)
        self.branch1_1b = unit(c(384), c(256), high)
        self.branch2_0 = unit(n, c(384), 1)
        self.branch2_1 = unit(c(384), c(448), high)
        self.branch2_2 = unit(c(448), c(512), wide)
        self.branch2_3a = unit(c(512), c(256), wide)
        self.branch2_3b = unit(c(512), c(256), high)
        self.branch3 = nnx.List([AvgPool(count_include_pad=False), unit(n, c(256), 1)])

    def __call__(self, x, train: bool):
        one = self.branch1_0(x, train)
        two = chain((self.branch2_0, self.branch2_1, self.branch2_2), x, train)
        ones, twos = (self.branch1_1a, self.branch1_1b), (self.branch2_3a, self.branch2_3b)
        split = [*(branch(one, train) for branch in ones), *(branch(two, train) for branch in twos)]
        return jnp.concatenate([self.branch0(x, train), *split, chain(self.branch3, x, train)], axis=-1)


def _stem(n, c, unit):
    """Returns the second fork of figure 3."""
    seven = [unit(n, c(64), 1), unit(c(64), c(64), WIDE), unit(c(64), c(64), HIGH), unit(c(64), c(96), 3, padding=0)]
    return Mixed([unit(n, c(64), 1), unit(c(64), c(96), 3, padding=0)], seven)


def _block_a(n, c, unit):
    """Returns a block for the 35x35 grid (figure 4)."""
    return Mixed(
        unit(n, c(96), 1),
        [unit(n, c(64), 1), unit(c(64), c(96), 3)],
        [unit(n, c(64), 1), unit(c(64), c(96), 3), unit(c(96), c(96), 3)],
        [AvgPool(count_include_pad=False), unit(n, c(96), 1)],
    )


def _reduction_a(n, c, unit):
    """Returns the block between the 35x35 and the 17x17 grid (figure 7)."""
    double = [unit(n, c(192), 1), unit(c(192), c(224), 3), unit(c(224), c(256), 3, 2, padding=0)]
    return Mixed(unit(n, c(384), 3, 2, padding=0), double, MaxPool(3, 2))


def _block_b(n, c, unit):
    """Returns a block for the 17x17 grid (figure 5)."""
    double = [unit(n, c(192), 1), unit(c(192), c(192), HIGH), unit(c(192), c(224), WIDE)]
    return Mixed(
        unit(n, c(384), 1),
        [unit(n, c(192), 1), unit(c(192), c(224), WIDE), unit(c(224), c(256), HIGH)],
        [*double, unit(c(224), c(224), HIGH), unit(c(224), c(256), WIDE)],
        [AvgPool(count_include_pad=False), unit(n, c(128), 1)],
    )


def _reduction_b(n, c, unit):
    """Returns the block between the 17x17 and the 8x8 grid (figure 8)."""
    seven = [unit(n, c(256), 1), unit(c(256), c(256), WIDE), unit(c(256), c(320), HIGH)]
    return Mixed(
        [unit(n, c(192), 1), unit(c(192), c(192), 3, 2, padding=0)],
        [*seven, unit(c(320), c(320), 3, 2, padding=0)],
        MaxPool(3, 2),
    )


def _trunk(c, unit, repeats):
    """Yields the layers before the global pool."""
    yield from (unit(3, c(32), 3, 2, padding=0), unit(c(32), c(32), 3, padding=0), unit(c(32), c(64), 3))
    yield PoolAndConv(c(64), c(96), True, unit)
    yield _stem(c(64) + c(96), c, unit)
    yield PoolAndConv(2 * c(96), c(192), False, unit)
    n = 2 * c(96) + c(192)
    for _ in range(repeats[0]):
        yield _block_a(n, c, unit)
        n = 4 * c(96)
    yield _reduction_a(n, c, unit)
    n += c(384) + c(256)
    for _ in range(repeats[1]):
        yield _block_b(n, c, unit)
        n = c(384) + 2 * c(256) + c(128)
    yield _reduction_b(n, c, unit)
    n += c(192) + c(320)
    for _ in range(repeats[2]):
        yield BlockC(n, c, unit)
        n = 6 * c(256)


class InceptionV4(nnx.Module):
    """Stem, three stages of blocks, global average pool (the features), dropout, linear head (figure 9)."""

    def __init__(self, num_classes: int, *, repeats=REPEATS, width: float, dtype, rngs: nnx.Rngs):
        unit, c = functools.partial(ConvNorm, dtype=dtype, rngs=rngs), functools.partial(scaled, width=width)
        self.features = nnx.List(_trunk(c, unit, repeats))
        self.dropout = nnx.Dropout(0.2)
        self.last_linear = nnx.Linear(6 * c(256), num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        stem, blocks = self.features[:6], self.features[6:]
        x = chain(stem, images.astype(self.dtype), train)
        maps = chain_blocks(blocks, block_output(x), train)
        features = global_mean(maps)
        logits = self.last_linear(self.dropout(features, deterministic=not train, rngs=rngs))
        return Output(logits=logits, features=features, maps=maps)


def _inception_v4(num_classes, dtype="float32", width=1.0, batch_norm_group=None) -> Net:
    """Makes Inception v4.

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
    return _build(*check_scaled("inception_v4", num_classes, dtype, width, batch_norm_group))


@functools.cache
def _build(num_classes, dtype, width, batch_norm_group) -> Net:
    return make_net(
        "inception_v4",
        in_groups(lambda rngs: InceptionV4(num_classes, width=width, dtype=DTYPES[dtype], rngs=rngs), batch_norm_group),
        num_classes=num_classes,
        feature_dim=6 * scaled(256, width),
        min_image_size=MIN_IMAGE_SIZE,
        classifier=("last_linear",),
    )


TIMM = Preprocessing(299, 299 / 341, HALF, HALF, "bicubic")

inception_v4 = Spec(
    _inception_v4,
    MIN_IMAGE_SIZE,
    released={
        "inception_v4": TIMM,
        "inceptionv4": Preprocessing(299, 299 / 341, HALF, HALF),  # of pretrainedmodels
        "inceptionv4_8e4777a0": TIMM,
    },
)
