import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.conv_checks import (
    assert_bfloat16_is_close,
    assert_equals_twin,
    assert_gradients_reach_every_parameter,
    num_parameters,
    random_images,
    short_inception_resnet_v2,
)
from jax_transfer.models import MODELS
from jax_transfer.models.inception import inception_v1, inception_v2
from jax_transfer.models.inception_resnet_v2 import inception_resnet_v2
from jax_transfer.models.inception_v3 import inception_v3
from jax_transfer.models.inception_v4 import inception_v4
from jax_transfer.models.layers import AvgPool, MaxPool
from jax_transfer.records import InputError

NAMES = {spec: name for name, spec in MODELS.items()}
# With 1,000 classes and without auxiliary heads: torchvision's googlenet and inception_v3, timm's inception_v4 and
# inception_resnet_v2.
# BN-Inception's 11.3 million are counted in the twin.
PUBLISHED = {
    inception_v1: 6_624_904,
    inception_v2: 11_295_240,
    inception_v3: 23_834_568,
    inception_v4: 42_679_816,
    inception_resnet_v2: 55_843_464,
}
TWINS = {
    inception_v1: ("GoogLeNet", 52),  # the edge truncates the last window of three of its four pools
    inception_v2: ("BNInception", 64),
    inception_v3: ("Inception3", 75),
    inception_v4: ("InceptionV4", 107),  # 2x2 pixels in the last stage
    inception_resnet_v2: ("InceptionResnetV2", 75),
}
by_model = functools.partial(pytest.mark.parametrize, "make", ids=NAMES.get)


@by_model(PUBLISHED)
def test_number_of_parameters_is_the_published_one(make):
    assert num_parameters(make(num_classes=1000)) == PUBLISHED[make]


def test_bn_inception_has_as_many_parameters_as_its_twin():
    pytest.importorskip("torch")
    from helpers import torch_twins_inception

    twin = torch_twins_inception.BNInception(1000, width=1.0)
    assert PUBLISHED[inception_v2] == sum(parameter.numel() for parameter in twin.parameters())


@by_model(TWINS)
def test_output_equals_the_torch_twin(make):
    pytest.importorskip("torch")
    from helpers import torch_twins_conv, torch_twins_inception

    twin_name, size = TWINS[make]
    twin = torch_twins_conv.randomised(getattr(torch_twins_inception, twin_name)(5, width=0.1))
    assert_equals_twin(make(num_classes=5, width=0.1), twin, random_images(size, count=2))


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_parameter():
    assert_gradients_reach_every_parameter(short_inception_resnet_v2(num_classes=5, width=0.1), random_images(95))


@pytest.mark.slow
@by_model(PUBLISHED)
def test_gradients_are_finite_and_reach_every_parameter_in_full_depth(make):
    net = make(num_classes=5, width=0.1)
    assert_gradients_reach_every_parameter(net, random_images(net.min_image_size + 20))


def test_evaluation_is_deterministic_and_bfloat16_is_close_to_float32():
    make = functools.partial(short_inception_resnet_v2, num_classes=5, width=0.1)
    assert_bfloat16_is_close(make(), make(dtype="bfloat16"), random_images(75, count=2))


@pytest.mark.slow
@by_model(PUBLISHED)
def test_bfloat16_is_close_to_float32_in_full_depth(make):
    exact, rough = make(num_classes=5, width=0.1), make(num_classes=5, width=0.1, dtype="bfloat16")
    assert_bfloat16_is_close(exact, rough, random_images(exact.min_image_size, count=2))


@by_model([inception_v1, inception_v2])
@pytest.mark.parametrize("size", [31, 107])
def test_odd_image_sizes_give_features_of_the_declared_shape(make, size):
    net = make(num_classes=5, width=0.1)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    output = jax.eval_shape(net.apply, *jax.eval_shape(net.init, jax.random.key(0)), images)
    assert output.features.shape == (2, net.feature_dim) and output.logits.shape == (2, 5)


@by_model(PUBLISHED)
def test_equal_arguments_return_the_identical_net(make):
    default = make(num_classes=1000)
    assert make(np.int64(1000), dtype=jnp.float32, width=1) is default
    assert make(num_classes=5, width=0.1) is not default


def test_other_arguments_return_another_net():
    nets = (inception_v1(5), inception_v2(5), inception_v1(6), inception_v1(5, "bfloat16"), inception_v1(5, width=0.5))
    assert len(set(nets)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype of {}.*'float8'.*bfloat16"),
        ({"num_classes": -1}, "num_classes of {} is -1"),
        ({"width": -0.5}, "width of {} is -0.5; expected a positive multiplier"),
    ],
)
@by_model(PUBLISHED)
def test_a_wrong_argument_is_named(make, options, message):
    with pytest.raises(InputError, match=message.format(NAMES[make])):
        make(**{"num_classes": 5} | options)


def test_average_pool_can_count_or_ignore_padding():
    ones = jnp.ones((1, 3, 3, 1))
    corner, edge = 4 / 9, 6 / 9
    padded = [[corner, edge, corner], [edge, 1, edge], [corner, edge, corner]]
    np.testing.assert_allclose(AvgPool(count_include_pad=True)(ones)[0, :, :, 0], padded, rtol=1e-6)
    np.testing.assert_allclose(AvgPool(count_include_pad=False)(ones), ones, rtol=1e-6)


def test_max_pool_in_ceil_mode_keeps_the_last_window():
    x = jnp.arange(6.0).reshape(1, 1, 6, 1).repeat(6, axis=1) - 10.0  # negative, so that 0 would win
    np.testing.assert_array_equal(MaxPool(3, 2)(x)[0, 0, :, 0], [-8.0, -6.0])
    np.testing.assert_array_equal(MaxPool(3, 2, ceil_mode=True)(x)[0, 0, :, 0], [-8.0, -6.0, -5.0])
