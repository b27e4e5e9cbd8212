import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.conv_checks import (
    assert_bfloat16_is_close,
    assert_equals_twin,
    assert_gradients_reach_every_parameter,
    num_parameters,
    random_images,
)
from jax_transfer import trees
from jax_transfer.models import resnet_v2
from jax_transfer.models.resnet_v2 import resnet18_v2, resnet50_v2
from jax_transfer.records import InputError

# With 1,000 classes, as timm's resnetv2_18, _34, _50, _101 and _152.
PUBLISHED = {
    "resnet18_v2": 11_687_720,
    "resnet34_v2": 21_795_880,
    "resnet50_v2": 25_549_352,
    "resnet101_v2": 44_541_480,
    "resnet152_v2": 60_185_128,
}


def small(make, **options):
    return make(**{"num_classes": 5, "stem": "cifar", "width": 8} | options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name):
    assert num_parameters(getattr(resnet_v2, name)(num_classes=1000)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("make", "stage_sizes", "stem"),
    [
        (resnet18_v2, (2, 2, 2, 2), "imagenet"),
        (resnet18_v2, (2, 2, 2, 2), "cifar"),
        (resnet50_v2, (3, 4, 6, 3), "cifar"),
    ],
)
def test_output_equals_the_torch_twin(make, stage_sizes, stem):
    pytest.importorskip("torch")
    from helpers import torch_twins_conv

    twin = torch_twins_conv.ResNetV2(make is resnet50_v2, stage_sizes, num_classes=5, width=8, stem=stem)
    size = 64 if stem == "imagenet" else 16
    assert_equals_twin(small(make, stem=stem), torch_twins_conv.randomised(twin), random_images(size))


def test_strides_pool_and_epsilon_of_tensorflow_equal_those_of_a_torch_twin():
    torch = pytest.importorskip("torch")
    from helpers import torch_twins_conv

    twin = torch_twins_conv.ResNetV2(True, (3, 4, 6, 3), num_classes=5, width=8, stem="imagenet")
    for module in torch_twins_conv.randomised(twin).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    for name, module in twin.named_modules():
        if name == "stem.conv" or (name.startswith("stages.3.") and getattr(module, "stride", 0) == (2, 2)):
            module.stride = (1, 1)
    twin.pool = torch.nn.Sequential(torch.nn.ConstantPad2d(1, 0.0), torch.nn.MaxPool2d(3, 2))
    stem = "7x7_stride1_zero_padded_pool"
    net = small(resnet50_v2, stem=stem, last_stride=1, batch_norm_eps=1e-3)
    assert_equals_twin(net, twin, random_images(32))


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet18_v2, resnet50_v2], ids=["resnet18_v2", "resnet50_v2"])
def test_gradients_are_finite_and_reach_every_parameter(make):
    assert_gradients_reach_every_parameter(small(make), random_images(16))


def test_evaluation_is_deterministic_and_bfloat16_is_close_to_float32():
    assert_bfloat16_is_close(small(resnet18_v2), small(resnet18_v2, dtype="bfloat16"), random_images(16))


def test_identity_shortcuts_do_not_change_the_input():
    """If its last convolution is zero, a block without a projection is the identity."""
    net = small(resnet18_v2)
    params = jax.eval_shape(net.init, jax.random.key(0))[0]
    projected = sorted(name for name in trees.flatten(params) if "downsample" in name)
    assert projected == [f"stages/{i}/blocks/0/downsample/conv/kernel" for i in (1, 2, 3)]
    block = resnet_v2.basic_block(4, 4, 1, jnp.float32, nnx.Rngs(0))
    block.conv2.kernel.set_value(jnp.zeros_like(block.conv2.kernel[...]))
    x = -jnp.ones((1, 3, 3, 4))  # negative, so that a ReLU on the shortcut would change it
    np.testing.assert_array_equal(block(x, train=False), x)


def test_equal_arguments_return_the_identical_net():
    default = resnet18_v2(num_classes=5)
    assert resnet18_v2(np.int64(5), dtype=jnp.float32, stem="imagenet", width=64) is default
    assert len({default, resnet18_v2(6), resnet18_v2(5, stem="cifar"), resnet18_v2(5, dtype="bfloat16")}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cifr"}, "stem of resnet18_v2.*'cifr'.*Did you mean 'cifar'"),
        ({"dtype": "float8"}, "dtype of resnet18_v2.*'float8'.*bfloat16"),
        ({"num_classes": -1}, "num_classes of resnet18_v2 is -1"),
        ({"width": -1}, "width of resnet18_v2 is -1"),
        ({"last_stride": 3}, "last_stride of resnet18_v2 is 3; expected 1 or 2"),
        ({"batch_norm_eps": -1e-3}, "batch_norm_eps of resnet18_v2 is -0.001"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(InputError, match=message):
        small(resnet18_v2, **options)
