"""Inception-ResNet v2 (Szegedy et al., 2017, arXiv:1602.07261) without its auxiliary head, as in timm.

`width` multiplies all channels, with a minimum of 16.
"""

import functools
from typing import Any

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
    conv,
    gaussian_head,
    global_mean,
    in_groups,
)
from jax_transfer.models.net import Net, Output, block_output, make_net
from jax_transfer.models.spec import HALF, Spec

MIN_IMAGE_SIZE = 75
REPEATS = (10, 20, 9)  # blocks in each of the three stages; one more block, without ReLU, follows the last stage


def _set_branches(module: Any, branches) -> None:
    """Stores branches as branch0, branch1, ...; a branch is a layer or a list of layers."""
    for i, branch in enumerate(branches):
        setattr(module, f"branch{i}", nnx.List(branch) if isinstance(branch, list) else branch)
    module.num_branches = len(branches)


def _concatenated_branches(module: Any, x, train: bool):
    """Applies the branches to the same input and concatenates their outputs."""
    branches = [getattr(module, f"branch{i}") for i in range(module.num_branches)]
    layers = [branch if isinstance(branch, nnx.List) else [branch] for branch in branches]
    return jnp.concatenate([chain(branch, x, train) for branch in layers], axis=-1)


class Mixed(nnx.Module):
    """Parallel branches, concatenated."""

    def __init__(self, *branches):
        _set_branches(self, branches)

    def __call__(self, x, train: bool):
        return _concatenated_branches(self, x, train)


class Residual(nnx.Module):
    """x + scale * conv2d(concatenated branches): figures 16, 17 and 19, with the scaling of section 3.3."""

    def __init__(self, features: int, inner: int, scale: float, *branches, dtype, rngs: nnx.Rngs, relu: bool = True):
        _set_branches(self, branches)
        self.conv2d = conv(inner, features, 1, 1, dtype, rngs, use_bias=True)
        self.scale = scale
        self.relu = relu

    def __call__(self, x, train: bool):
        y = self.conv2d(_concatenated_branches(self, x, train)) * self.scale + x
        return nnx.relu(y) if self.relu else y


class InceptionResNetV2(nnx.Module):
    """Stem, three stages of residual blocks, 1x1 convolution, global average pool (the features), linear head."""

    def __init__(self, num_classes: int, *, repeats=REPEATS, width: float, dtype, rngs: nnx.Rngs):
        unit, c = functools.partial(ConvNorm, dtype=dtype, rngs=rngs), functools.partial(scaled, width=width)
        residual = functools.partial(Residual, dtype=dtype, rngs=rngs)
        self.conv2d_1a = unit(3, c(32), 3, 2, padding=0)
        self.conv2d_2a = unit(c(32), c(32), 3, padding=0)
        self.conv2d_2b = unit(c(32), c(64), 3)
        self.conv2d_3b = unit(c(64), c(80), 1)
        self.conv2d_4a = unit(c(80), c(192), 3, padding=0)

        self.mixed_5b = Mixed(
            unit(c(192), c(96), 1),
            [unit(c(192), c(48), 1), unit(c(48), c(64), 5)],
            [unit(c(192), c(64), 1), unit(c(64), c(96), 3), unit(c(96), c(96), 3)],
            [AvgPool(count_include_pad=False), unit(c(192), c(64), 1)],
        )
        n = 2 * c(96) + 2 * c(64)
        self.repeat = nnx.List([self._block35(n, c, unit, residual) for _ in range(repeats[0])])
        self.mixed_6a = Mixed(
            unit(n, c(384), 3, 2, padding=0),
            [unit(n, c(256), 1), unit(c(256), c(256), 3), unit(c(256), c(384), 3, 2, padding=0)],
            MaxPool(3, 2),
        )
        n = 2 * c(384) + n
        self.repeat_1 = nnx.List([self._block17(n, c, unit, residual) for _ in range(repeats[1])])
        self.mixed_7a = Mixed(
            [unit(n, c(256), 1), unit(c(256), c(384), 3, 2, padding=0)],
            [unit(n, c(256), 1), unit(c(256), c(288), 3, 2, padding=0)],
            [unit(n, c(256), 1), unit(c(256), c(288), 3), unit(c(288), c(320), 3, 2, padding=0)],
            MaxPool(3, 2),
        )
        n = c(384) + c(288) + c(320) + n
        self.repeat_2 = nnx.List([self._block8(n, 0.20, c, unit, residual) for _ in range(repeats[2])])
        self.block8 = self._block8(n, 1.0, c, unit, residual, relu=False)
        self.conv2d_7b = unit(n, c(1536), 1)
        self.classif = nnx.Linear(c(1536), num_classes, kernel_init=gaussian_head, rngs=rngs)
        self.dtype = dtype

    @staticmethod
    def _block35(n, c, unit, residual):
        two = [unit(n, c(32), 1), unit(c(32), c(32), 3)]
        three = [unit(n, c(32), 1), unit(c(32), c(48), 3), unit(c(48), c(64), 3)]
        return residual(n, 2 * c(32) + c(64), 0.17, unit(n, c(32), 1), two, three)

    @staticmethod
    def _block17(n, c, unit, residual):
        seven = [unit(n, c(128), 1), unit(c(128), c(160), (1, 7)), unit(c(160), c(192), (7, 1))]
        return residual(n, 2 * c(192), 0.10, unit(n, c(192), 1), seven)

    @staticmethod
    def _block8(n, scale, c, unit, residual, **options):
        three = [unit(n, c(192), 1), unit(c(192), c(224), (1, 3)), unit(c(224), c(256), (3, 1))]
        return residual(n, c(192) + c(256), scale, unit(n, c(192), 1), three, **options)

    def __call__(self, images: Float[Array, "b h w 3"], train: bool, rngs: nnx.Rngs | None = None) -> Output:
        pool = MaxPool(3, 2)
        stem = (self.conv2d_1a, self.conv2d_2a, self.conv2d_2b, pool, self.conv2d_3b, self.conv2d_4a, pool)
        x = chain(stem, images.astype(self.dtype), train)
        x = chain_blocks((self.mixed_5b, *self.repeat), block_output(x), train)
        x = chain_blocks((self.mixed_6a, *self.repeat_1), x, train)
        x = chain_blocks((self.mixed_7a, *self.repeat_2, self.block8), x, train)
        maps = self.conv2d_7b(x, train)
        features = global_mean(maps)
        return Output(logits=self.classif(features), features=features, maps=maps)


def _inception_resnet_v2(num_classes, dtype="float32", width=1.0, batch_norm_group=None) -> Net:
    """Makes Inception-ResNet v2.

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
    return _build(*check_scaled("inception_resnet_v2", num_classes, dtype, width, batch_norm_group))


@functools.cache
def _build(num_classes, dtype, width, batch_norm_group) -> Net:
    return make_net(
        "inception_resnet_v2",
        in_groups(
            lambda rngs: InceptionResNetV2(num_classes, width=width, dtype=DTYPES[dtype], rngs=rngs), batch_norm_group
        ),
        num_classes=num_classes,
        feature_dim=scaled(1536, width),
        min_image_size=MIN_IMAGE_SIZE,
        classifier=("classif",),
    )


inception_resnet_v2 = Spec(
    _inception_resnet_v2,
    MIN_IMAGE_SIZE,
    released={"inception_resnet_v2": Preprocessing(299, 299 / 333, HALF, HALF, "bicubic")},
)
