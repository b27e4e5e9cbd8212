"""TensorFlow ResNet-50s: features equal TensorFlow's, and everything that is not known is refused or reported."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from helpers.checkpoint_files import state
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.checkpoints.from_tensorflow import OF_MODULES, OF_TRAINING, Contents, convert, main
from jax_transfer.checkpoints.tensorflow_names import REVISITING_V1, REVISITING_V2, S4L_V2
from jax_transfer.records import InputError

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
LAYOUTS = {"s4l": S4L_V2, "revisiting_v1": REVISITING_V1, "revisiting_v2": REVISITING_V2}


@pytest.fixture
def twins():
    pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install 'jax_transfer[prepare]'")
    from helpers import tensorflow_twins

    return tensorflow_twins


def variables(layout, width=8):
    """Returns random variables with the names and shapes of a layout."""
    from jax_transfer.checkpoints.torch_weights import expected_shapes
    from jax_transfer.models import MODELS

    shapes = expected_shapes(MODELS[layout.model](num_classes=0, width=width))
    names = {theirs: ours for layer in layout.layers for theirs, ours in layer.variables.items()}
    arrays = {theirs: np.ones(shapes[ours], np.float32) for theirs, ours in names.items()}
    return {name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x for name, x in arrays.items()}


@pytest.mark.parametrize("module", [True, False], ids=["module", "checkpoint"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_equal_those_of_tensorflow(tmp_path, twins, capsys, layout, module):
    path, features, arrays = twins.save(tmp_path, layout, IMAGES, module)
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 0
    found = load_checkpoint(tmp_path / "out.safetensors")
    output = found.net.apply(found.params, found.stats, IMAGES)
    np.testing.assert_allclose(output.features, features, rtol=1e-4, atol=1e-5)
    assert found.net.name == LAYOUTS[layout].model and found.settings["batch_norm_eps"] == 1e-3
    assert found.preprocessing == (OF_MODULES if module else OF_TRAINING)
    assert (found.has_head, found.net.num_classes) == ((True, 5) if layout == "s4l" else (False, 0))
    if found.has_head:
        expected = features @ arrays["classes/kernel"][0, 0] + arrays["classes/bias"]
        np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert all(note in printed for note in found.notes)
    assert ("Its graph shows stem" in printed) == module and ("are assumed, as in that code" in printed) != module
    assert "heads that do not classify: 2 variables such as" in printed
    assert module or "training state: 2 variables such as" in printed


def test_strides_are_read_from_the_graph(tmp_path, twins):
    path, features, _ = twins.save(tmp_path, "s4l", IMAGES, True, root_stride=1, last_stride=1)
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 0
    found = load_checkpoint(tmp_path / "out.safetensors")
    np.testing.assert_allclose(
        found.net.apply(found.params, found.stats, IMAGES).features, features, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": lambda x: 2 * x - 1}, r"changes the pixels before the first convolution \(Mul, Sub\)"),
        ({"last_stride": 3}, "block4/unit1/proj/conv2d has stride 3, where resnet50_v2 has 2"),
    ],
)
def test_graphs_of_other_networks_are_refused(tmp_path, twins, capsys, options, message):
    path, _, _ = twins.save(tmp_path, "s4l", IMAGES, True, **options)
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_a_graph_without_the_layers_of_the_weights_is_refused(tmp_path, twins, capsys):
    path, _, _ = twins.save(tmp_path, "s4l", IMAGES, True)
    (tmp_path / "other").mkdir()
    other, _, _ = twins.save(tmp_path / "other", "revisiting_v2", IMAGES, True)
    (path / "saved_model.pb").write_bytes((other / "saved_model.pb").read_bytes())
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 2
    assert "its graph has no root_block/conv2d/Conv2D" in capsys.readouterr().err
    assert main([str(path / "variables/variables"), str(tmp_path / "out.safetensors")]) == 0
    (path / "saved_model.pb").write_bytes(b"nothing")
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 2
    assert "cannot be read as a saved model" in capsys.readouterr().err


def test_files_that_are_no_checkpoints_are_refused(tmp_path, twins, capsys):
    (tmp_path / "model.index").write_bytes(b"nothing")
    for path, message in ((tmp_path / "none", "is neither a folder with variables"), (tmp_path / "model", "read")):
        assert main([str(path), str(tmp_path / "out.safetensors")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_cover_the_model(layout):
    checkpoint, notes = convert(Contents(variables(LAYOUTS[layout])), "model.ckpt")
    assert checkpoint.net.name == LAYOUTS[layout].model and checkpoint.settings["width"] == 8
    assert not checkpoint.has_head and "are assumed" in notes[1]
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(checkpoint.model))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope", ["", "module/"])
def test_scopes_and_training_state_are_ignored(layout, scope):
    weights = {scope + name: x for name, x in variables(LAYOUTS[layout]).items()}
    first = next(iter(weights))
    extra = (f"{first}/Momentum", f"{first}/EMA/biased", f"{first}/ExponentialMovingAverage", "global_step")
    checkpoint, notes = convert(Contents(weights | dict.fromkeys(extra, np.zeros(2, np.float32))), "model.ckpt")
    assert checkpoint.net.name == LAYOUTS[layout].model
    assert any(note.startswith("Left out, as training state: 4 variables such as ") for note in notes)


def test_a_classifier_of_imagenet_is_kept():
    for name, layout in (("conv2d_53", REVISITING_V2), ("conv2d_53", REVISITING_V1), ("classes", S4L_V2)):
        kernel = np.random.default_rng(0).normal(size=(1, 1, 256, 1000)).astype(np.float32)
        head = {f"{name}/kernel": kernel, f"{name}/bias": np.zeros(1000, np.float32)}
        checkpoint, _ = convert(Contents(variables(layout) | head), "model.ckpt")
        assert checkpoint.has_head and checkpoint.net.num_classes == 1000
        params = checkpoint.params
        for part in checkpoint.net.classifier:
            params = params[part]
        np.testing.assert_array_equal(params["kernel"], kernel[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "block1/unit1/a/conv2d/bias": np.ones(8)},
         "unknown: block1/unit1/a/conv2d/bias; missing: none"),
        (lambda w: {**w, "block5/unit1/a/conv2d/kernel": np.ones(8)},
         "unknown: block5/unit1/a/conv2d/kernel; missing: none"),
        (lambda w: {name: x for name, x in w.items() if "unit6" not in name},
         r"unknown: none; missing: block3/unit6/batch_normalization/gamma, .* and 12 more"),
        (lambda w: {"encoder/conv1/weights": np.ones(3)}, "unknown: encoder/conv1/weights; missing: root_block/conv2d"),
        (lambda w: {"resnet_v2_50/block1/unit_1/bottleneck_v2/conv1/weights": np.ones(3)}, "is a ResNet of TF-slim"),
        (lambda w: {**w, "block1/unit1/a/conv2d/kernel": np.ones((1, 1, 8, 9))},
         "differs: stages.0.blocks.0.conv1.weight"),
    ],
)  # fmt: skip
def test_other_variables_are_refused(change, message):
    with pytest.raises(InputError, match=message) as caught:
        convert(Contents(change(variables(S4L_V2))), "model.ckpt")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.ckpt")


def test_preprocessing_can_be_given(tmp_path, monkeypatch, capsys):
    contents = Contents(variables(S4L_V2))
    monkeypatch.setattr("jax_transfer.checkpoints.from_tensorflow.read", lambda path: contents)
    out = str(tmp_path / "out.safetensors")
    assert main(["model.ckpt", out, "--mean", "0.25", "--std", "2", "--image_size", "96", "--crop_fraction", "1"]) == 0
    found = load_checkpoint(out).preprocessing
    assert (found.mean, found.std, found.image_size, found.host_size) == ((0.25,) * 3, (2,) * 3, 96, 96)
    assert "Images of" not in capsys.readouterr().out
    assert main(["model.ckpt", out, "--std", "0"]) == 2 and "std" in capsys.readouterr().err
    assert main(["model.ckpt", "out.pth"]) == 2 and "ends with .safetensors" in capsys.readouterr().err


def test_reading_other_files_imports_no_tensorflow(tmp_path):
    safetensors.numpy.save_file(state(), tmp_path / "resnet10.safetensors")
    code = (
        "import sys; from jax_transfer.checkpoints import from_tensorflow, load_checkpoint; "
        f"load_checkpoint({str(tmp_path / 'resnet10.safetensors')!r}, 'resnet10'); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
