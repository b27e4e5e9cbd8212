import functools

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.conv_checks import (
    assert_bfloat16_is_close,
    assert_equals_twin,
    assert_gradients_reach_every_parameter,
    num_parameters,
    random_images,
)
from jax_transfer.models.mobilenet import mobilenet_v1, mobilenet_v2
from jax_transfer.records import InputError

MODELS = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}


# With 1,000 classes: v1 has 0.5, 1.3, 2.6 and 4.2 million in the paper (table 7); v2 is as in torchvision.
@pytest.mark.parametrize(
    ("make", "width", "expected"),
    [
        (mobilenet_v1, 0.25, 470_072),
        (mobilenet_v1, 0.5, 1_331_592),
        (mobilenet_v1, 0.75, 2_585_560),
        (mobilenet_v1, 1.0, 4_231_976),
        (mobilenet_v2, 1.0, 3_504_872),
    ],
)
def test_number_of_parameters_is_the_published_one(make, width, expected):
    assert num_parameters(make(num_classes=1000, width=width)) == expected


@pytest.mark.parametrize("width", [0.35, 1.4])
@pytest.mark.parametrize(("name", "twin_name"), [("mobilenet_v1", "MobileNetV1"), ("mobilenet_v2", "MobileNetV2")])
def test_channels_are_rounded_like_the_twin(name, twin_name, width):
    pytest.importorskip("torch")
    from helpers import torch_twins_conv

    twin = getattr(torch_twins_conv, twin_name)(7, width)
    net = MODELS[name](num_classes=7, width=width)
    assert num_parameters(net) == sum(parameter.numel() for parameter in twin.parameters())


@pytest.mark.parametrize(("name", "twin_name"), [("mobilenet_v1", "MobileNetV1"), ("mobilenet_v2", "MobileNetV2")])
def test_output_equals_the_torch_twin(name, twin_name):
    pytest.importorskip("torch")
    from helpers import torch_twins_conv

    twin = torch_twins_conv.randomised(getattr(torch_twins_conv, twin_name)(5, width=0.25))
    assert_equals_twin(MODELS[name](num_classes=5, width=0.25), twin, random_images(64))


@pytest.mark.parametrize(("name", "twin_name"), [("mobilenet_v1", "MobileNetV1"), ("mobilenet_v2", "MobileNetV2")])
def test_the_padding_and_epsilon_of_keras_equal_those_of_a_torch_twin(name, twin_name):
    pytest.importorskip("torch")
    from helpers import torch_twins_conv

    twin = torch_twins_conv.padded_as_keras(torch_twins_conv.randomised(getattr(torch_twins_conv, twin_name)(5, 0.25)))
    net = MODELS[name](num_classes=5, width=0.25, padding="same", batch_norm_eps=1e-3)
    assert_equals_twin(net, twin, random_images(64))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_and_reach_every_parameter(name):
    assert_gradients_reach_every_parameter(MODELS[name](num_classes=5, width=0.25), random_images(64))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_deterministic_and_bfloat16_is_close_to_float32(name):
    make = functools.partial(MODELS[name], num_classes=5, width=0.25)
    assert_bfloat16_is_close(make(), make(dtype="bfloat16"), random_images(64))


@pytest.mark.parametrize("name", MODELS)
def test_equal_arguments_return_the_identical_net(name):
    default = MODELS[name](num_classes=5)
    assert MODELS[name](np.int64(5), dtype=jnp.float32, width=1) is default
    assert len({default, MODELS[name](6), MODELS[name](5, dtype="bfloat16"), MODELS[name](5, width=0.5)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype of {}.*'float8'.*bfloat16"),
        ({"num_classes": -1}, "num_classes of {} is -1"),
        ({"width": 0.0}, "width of {} is 0.0; expected a positive multiplier"),
        ({"padding": "valid"}, "padding of {}.*'valid'.*same"),
        ({"batch_norm_eps": 0}, "batch_norm_eps of {} is 0; expected a small positive number"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_argument_is_named(name, options, message):
    with pytest.raises(InputError, match=message.format(name)):
        MODELS[name](**{"num_classes": 5} | options)
