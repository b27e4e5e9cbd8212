"""Layers and argument checks that the convolutional nets share. Padding is explicit, as in torch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer.choose import choose
from jax_transfer.models.net import block_output, gaussian
from jax_transfer.records import InputError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def he_normal_fan_out(key, shape, dtype=jnp.float32) -> Float[Array, "h w i o"]:
    """Draws from N(0, 2 / (h w o)), as in torchvision (He et al., 2015, arXiv:1502.01852, equation 14)."""
    height, width, _, features_out = shape
    return gaussian(key, shape, math.sqrt(2 / (height * width * features_out))).astype(dtype)


def gaussian_head(key, shape, dtype=jnp.float32) -> Float[Array, "d s"]:
    """Draws from N(0, 0.01^2) (Goyal et al., 2017, section 5.1)."""
    return gaussian(key, shape, 0.01).astype(dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy, 2015) over all axes but the last, with torch's conventions.

    Momentum is 0.9 (0.1 in torch's convention) and eps 1e-5. The running variance averages the unbiased batch variance,
    as in torch (flax averages the biased variance). Arithmetic and statistics are float32 for every input dtype.

    In training, `group` consecutive images of the global batch are normalised together, whatever the number of devices;
    with None, the whole global batch. The running statistics average those of all groups.

    Mean and variance come from one pass over x, and under jit with a sharded batch from one all-reduce, as the first
    two moments of x - r, with r the running mean:

        mean = r + E[x - r],  var = E[(x - r)^2] - E[x - r]^2.

    The relative error of var is at most about 2^-18 (1 + (mean - r)^2 / var): like that of two passes, unless the mean
    has just moved by a hundred standard deviations. It then shrinks by 0.81 with every step, as r follows.
    """

    def __init__(self, features: int, *, scale: float = 1.0, eps: float = 1e-5, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.full(features, scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.eps = eps
        self.dtype = dtype
        self.group: int | None = None  # set by `in_groups`

    def __call__(self, x: Float[Array, "b *p d"], train: bool) -> Float[Array, "b *p d"]:
        if not train:
            return self._normalised(x, self.mean[...], self.var[...])
        if not self.group:
            return self._normalised(x, *self._batch_statistics(x))
        if len(x) % self.group:
            raise InputError(
                f"batch_norm_group = {self.group} does not divide a batch of {len(x)} images: use a divisor."
            )
        groups = x.reshape(-1, self.group, *x.shape[1:])
        return self._normalised(groups, *self._batch_statistics(groups)).reshape(x.shape)

    def _batch_statistics(self, x: Float[Array, "*b d"]):
        """Returns the mean and the variance of each group, broadcastable to x, and updates the running statistics."""
        axes = tuple(range(1 if self.group else 0, x.ndim - 1))
        n = math.prod(x.shape[axis] for axis in axes)
        running_mean, running_var = self.mean[...], self.var[...]
        shifted = x.astype(jnp.float32) - running_mean
        first, second = (jnp.mean(moment, axes, keepdims=True) for moment in (shifted, jnp.square(shifted)))
        mean, var = running_mean + first, jnp.maximum(second - jnp.square(first), 0)
        new_mean, new_var = (jnp.mean(jax.lax.stop_gradient(s), range(x.ndim - 1)) for s in (mean, var))
        # Not `self.mean[...] = `, which looks up a sharding and makes tracing of deep nets several times slower.
        self.mean.set_value(0.9 * running_mean + 0.1 * new_mean)
        self.var.set_value(0.9 * running_var + 0.1 * new_var * (n / max(n - 1, 1)))
        return mean, var

    def _normalised(self, x, mean, var):
        y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)


def in_groups(make_module: Callable[[nnx.Rngs], nnx.Module], group: int | None) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns `make_module` with `group` set in every BatchNorm of its module.

    >>> module = in_groups(lambda rngs: ConvNorm(3, 8, 3, dtype=jnp.float32, rngs=rngs), 32)(nnx.Rngs(0))
    >>> module.bn.group
    32
    """
    return _with_batch_norm(make_module, "group", group)


def with_epsilon(make_module: Callable[[nnx.Rngs], nnx.Module], eps: float) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns `make_module` with `eps` set in every BatchNorm of its module.

    >>> module = with_epsilon(lambda rngs: ConvNorm(3, 8, 3, dtype=jnp.float32, rngs=rngs), 1e-5)(nnx.Rngs(0))
    >>> module.bn.eps
    1e-05
    """
    return _with_batch_norm(make_module, "eps", eps)


def _with_batch_norm(make_module, attribute: str, value) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns `make_module` with an attribute set in every BatchNorm of its module."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = make_module(rngs)
        for _, part in nnx.iter_modules(module):
            if isinstance(part, BatchNorm):
                setattr(part, attribute, value)
        return module

    return make


def _pointwise(x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], strides, padding, **options):
    """Computes a 1x1 convolution as a matrix product.

    XLA's CPU backend would transpose all images to compute the gradient of a convolution.
    """
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def conv(features_in, features_out, size, stride, dtype, rngs, *, padding=None, groups=1, use_bias=False) -> nnx.Conv:
    """Returns a convolution that computes in `dtype` with float32 parameters.

    Args:
      size: side of the kernel in pixels, or (height, width).
      padding: pixels on each side; by default half the kernel, which keeps the image size at stride 1. "SAME" pads as
        TensorFlow does: at stride 2, an even image gets one pixel less before than after it.
      groups: number of channel groups; groups=features_in makes a depthwise convolution.
    """
    height, width = (size, size) if isinstance(size, int) else size
    pad_height, pad_width = (height // 2, width // 2) if padding in (None, "SAME") else (padding, padding)
    pointwise = (height, width) == (1, 1) and groups == 1
    return nnx.Conv(
        features_in,
        features_out,
        kernel_size=(height, width),
        strides=(stride, stride),
        padding="SAME" if padding == "SAME" else ((pad_height, pad_height), (pad_width, pad_width)),
        feature_group_count=groups,
        use_bias=use_bias,
        conv_general_dilated=_pointwise if pointwise else jax.lax.conv_general_dilated,
        kernel_init=he_normal_fan_out,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """Convolution, BatchNorm (eps 1e-3) and ReLU: the unit of the Inception nets, with torchvision's names."""

    def __init__(self, features_in, features_out, size, stride=1, padding=None, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(features_in, features_out, size, stride, dtype, rngs, padding=padding)
        self.bn = BatchNorm(features_out, eps=1e-3, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> Float[Array, "b h w o"]:
        return nnx.relu(self.bn(self.conv(x), train))


class MaxPool(nnx.Module):
    """Maximum over square windows; `ceil_mode` keeps a last window that extends beyond the edge, as in torch."""

    def __init__(self, size: int, stride: int, padding: int = 0, ceil_mode: bool = False):
        self.size, self.stride, self.padding, self.ceil_mode = size, stride, padding, ceil_mode

    def __call__(self, x: Float[Array, "b h w d"], train: bool = False) -> Float[Array, "b i j d"]:
        pads: Any = [self._pads(n) for n in x.shape[1:3]]  # flax's annotation allows only strings
        return nnx.max_pool(x, (self.size, self.size), strides=(self.stride, self.stride), padding=pads)

    def _pads(self, n: int) -> tuple[int, int]:
        """Returns the padding before and after an axis of length n."""
        rest = (n + 2 * self.padding - self.size) % self.stride
        return self.padding, self.padding + (self.stride - rest if self.ceil_mode and rest else 0)


class AvgPool(nnx.Module):
    """Mean over 3x3 windows with stride 1; with `count_include_pad`, sums are divided by 9 at the edges too."""

    def __init__(self, count_include_pad: bool):
        self.count_include_pad = count_include_pad

    def __call__(self, x: Float[Array, "b h w d"], train: bool = False) -> Float[Array, "b h w d"]:
        include = self.count_include_pad
        pads: Any = ((1, 1), (1, 1))
        # In float32, since summing nine bfloat16 values would round eight times.
        y = nnx.avg_pool(x.astype(jnp.float32), (3, 3), strides=(1, 1), padding=pads, count_include_pad=include)
        return y.astype(x.dtype)


def chain(layers, x, train: bool):
    """Applies layers in sequence, like torch's Sequential."""
    for layer in layers:
        x = layer(x, train)
    return x


def chain_blocks(blocks, x, train: bool):
    """Applies the blocks of a net in sequence; see `block_output`."""
    for block in blocks:
        x = block_output(block(x, train))
    return x


def global_mean(x: Float[Array, "b h w d"]) -> Float[Array, "b d"]:
    """Returns the mean over all pixels, in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def check_num_classes(name: str, num_classes) -> int:
    """Returns `num_classes` as an int; 0 means a net without a head.

    Raises:
      InputError: if it is negative.
    """
    if num_classes < 0:
        raise InputError(
            f"num_classes of {name} is {num_classes!r}; expected the number of classes, or 0 for a net without a head."
        )
    return int(num_classes)


def check_batch_norm_group(name: str, group) -> int | None:
    """Returns the number of images that BatchNorm normalises together; None means the global batch.

    Raises:
      InputError: if it is not positive.
    """
    if group is not None and group < 1:
        raise InputError(
            f"batch_norm_group of {name} is {group!r}; expected the number of images that BatchNorm normalises "
            "together, such as 32, or nothing for the global batch."
        )
    return group and int(group)


def check_batch_norm_eps(name: str, eps) -> float:
    """Returns the number that BatchNorm adds to the variance: 1e-5 in torch, 1e-3 in TensorFlow's layers.

    Raises:
      InputError: if it does not lie between 0 and 1.
    """
    if not 0 < eps < 1:
        raise InputError(f"batch_norm_eps of {name} is {eps!r}; expected a small positive number, such as 1e-5.")
    return float(eps)


def check_scaled(name: str, num_classes, dtype, width, batch_norm_group) -> tuple[int, str, float, int | None]:
    """Returns the arguments of a model with a width multiplier in canonical form, so that equal ones give the same Net.

    Raises:
      InputError: if `num_classes` is negative, `dtype` is not a key of DTYPES, or `width` or `batch_norm_group` is not
        positive.
    """
    dtype = getattr(dtype, "__name__", str(dtype))
    choose(DTYPES, dtype, f"dtype of {name}")
    num_classes = check_num_classes(name, num_classes)
    if not 0 < width < math.inf:
        raise InputError(f"width of {name} is {width!r}; expected a positive multiplier of the channels, such as 0.5.")
    return num_classes, dtype, float(width), check_batch_norm_group(name, batch_norm_group)
