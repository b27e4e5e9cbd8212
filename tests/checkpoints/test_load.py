"""Checkpoints from files: outputs equal those of torch, names must match, and descriptions are read."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from helpers.checkpoint_files import (
    DESCRIBED,
    IMAGES,
    METADATA,
    NET,
    PARAMS,
    STATS,
    TIMM_CONFIG,
    hub,
    saved,
    state,
    zeros,
)
from jax_transfer.checkpoints import (
    Checkpoint,
    at_image_size,
    describes_itself,
    export,
    load_checkpoint,
    state_dicts,
    torch_files,
    torch_weights,
)
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.models.vit import resize_position_embedding
from jax_transfer.records import InputError


def read_state(path):
    """Returns the weights of NET in a file."""
    expected = frozenset(torch_weights.expected_shapes(NET))
    return state_dicts.find(torch_files.read(path), expected, "fc.", path, len)


def test_names_and_layouts_are_those_of_torch():
    found = state()
    assert found["conv1.weight"].shape == (8, 3, 3, 3) and found["fc.weight"].shape == (5, 64)
    assert found["layer2.0.downsample.1.running_var"].shape == (16,)
    kernel = np.asarray(PARAMS["conv1"]["kernel"])
    np.testing.assert_array_equal(found["conv1.weight"][2, 1], kernel[:, :, 1, 2])


def test_conversion_to_torch_and_back_is_the_identity():
    params, stats, note = torch_weights.from_torch(state(), NET, "x")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert note == ""
    np.testing.assert_array_equal(stats["bn1"]["var"], state()["bn1.running_var"])


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "module.encoder_q."])
def test_wrappers_counters_and_key_encoders_are_ignored(tmp_path, prefix):
    found = {prefix + name: value for name, value in state().items()}
    found |= {f"{prefix}bn1.num_batches_tracked": np.array(7), "module.queue": np.ones((3, 3), np.float32)}
    found["module.encoder_k.conv1.weight"] = np.zeros((8, 3, 3, 3), np.float32)
    if "encoder_q" not in prefix:
        del found["module.queue"], found["module.encoder_k.conv1.weight"]
    safetensors.numpy.save_file(found, tmp_path / "a.safetensors")
    read = read_state(tmp_path / "a.safetensors").state
    assert {name: value.shape for name, value in read.items()} == {name: value.shape for name, value in state().items()}


def test_an_unsuitable_head_is_left_out_and_noted(tmp_path):
    found = state()
    found["fc.weight"], found["fc.bias"] = np.ones((9, 64), np.float32), np.ones(9, np.float32)
    params, _, note = torch_weights.from_torch(found, NET, "x")
    assert "fc.weight [9, 64]" in note and params["fc"]["kernel"].shape == (64, 5)
    mlp = {name: value for name, value in state().items() if not name.startswith("fc.")}
    mlp |= {"fc.0.weight": np.ones((64, 64), np.float32), "fc.2.weight": np.ones((5, 64), np.float32)}
    assert "fc.0.weight" in torch_weights.from_torch(mlp, NET, "x")[2]
    headless = {name: value for name, value in state().items() if not name.startswith("fc.")}
    assert torch_weights.from_torch(headless, NET, "x")[2] == "the file has no head"
    params, _, note = torch_weights.from_torch(state(), NET, "x", contrastive=True)
    assert "belongs to a contrastive loss" in note and not np.array_equal(
        params["fc"]["kernel"], PARAMS["fc"]["kernel"]
    )


def test_missing_and_unexpected_weights_are_named():
    found = state()
    del found["layer1.0.conv1.weight"]
    found["layer9.weight"] = np.ones(3, np.float32)
    found["bn1.bias"] = np.ones(9, np.float32)
    with pytest.raises(InputError, match=r"x does not fit resnet10: missing: layer1\.0\.conv1\.weight") as caught:
        torch_weights.from_torch(found, NET, "x")
    message = str(caught.value)
    assert "unexpected: layer9.weight float32[3]" in message
    assert "differs: bn1.bias expected float32[8], found float32[9]" in message and "\n" not in message


def test_exported_checkpoints_are_restored(tmp_path):
    first = load_checkpoint(saved(tmp_path / "a.safetensors", metadata=METADATA))
    assert first.source_accuracy == 0.5 and first.preprocessing.image_size == 16
    export(first, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert again.net is first.net and again.preprocessing == first.preprocessing
    outputs = [found.net.apply(found.params, found.stats, IMAGES) for found in (first, again)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)


def test_the_model_is_named_by_the_file_or_by_the_caller(tmp_path):
    net = MODELS["resnet18"](num_classes=7)
    found = zeros(net)
    loaded = load_checkpoint(saved(tmp_path / "resnet18-f37072fd.safetensors", found))
    assert loaded.net is net and loaded.preprocessing.image_size == 224
    with pytest.raises(InputError, match="does not state its model"):
        load_checkpoint(saved(tmp_path / "mine.safetensors", found))
    assert load_checkpoint(tmp_path / "mine.safetensors", model="resnet18").net is net
    with pytest.raises(InputError, match=r"does not fit resnet34: missing: layer1\.2"):
        load_checkpoint(tmp_path / "mine.safetensors", model="resnet34")


def test_pth_files_equal_the_twin_that_wrote_them(tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from helpers import torch_twins

    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "cifar")
    logits, features = torch_twins.twin_output(twin, IMAGES)
    files = {"plain.pth": twin.state_dict(), "lightning.pt": {"state_dict": twin.state_dict(), "epoch": 3}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        found = read_state(tmp_path / name).state
        params, stats, note = torch_weights.from_torch(found, NET, name)
        output = NET.apply(params, stats, IMAGES)
        assert note == ""
        np.testing.assert_allclose(output.logits, logits, atol=1e-4)
        np.testing.assert_allclose(output.features, features, atol=1e-4)


def test_a_missing_head_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    found = {name: value for name, value in state().items() if not name.startswith("fc.")}
    with caplog.at_level(logging.WARNING):
        load_checkpoint(saved(tmp_path / "a.safetensors", found, METADATA))
    assert "the file has no head" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_read_as_float32(tmp_path, dtype):
    found = {name: value.astype(jnp.dtype(dtype)) for name, value in state().items()}
    read = read_state(saved(tmp_path / "a.safetensors", found)).state
    assert {value.dtype for value in read.values()} == {np.dtype("float32")}
    for name, value in read.items():
        np.testing.assert_array_equal(value, found[name].astype(np.float32))


def test_an_untrained_head_is_not_exported(tmp_path):
    found = {name: value for name, value in state().items() if not name.startswith("fc.")}
    loaded = load_checkpoint(saved(tmp_path / "a.safetensors", found, METADATA))
    export(loaded, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert not loaded.has_head and not again.has_head and again.net is NET


# --- descriptions in files


def trajectory(folder, params=PARAMS, described=DESCRIBED):
    """Saves a trajectory with one epoch; returns the folder of the epoch."""
    run = Trajectory(folder / "checkpoints")
    training = {
        "opt_state": {"count": jnp.zeros(())},
        "step": jnp.zeros(()),
        "key": jax.random.key_data(jax.random.key(0)),
    }
    run.save(3, {"params": params, "stats": STATS}, training, described)
    run.close()
    return folder / "checkpoints" / "3"


def test_a_checkpoint_without_a_head_is_restored_without_one(tmp_path):
    headless = MODELS["resnet10"](num_classes=0, stem="cifar", width=8)
    trunk = {name: value for name, value in PARAMS.items() if name != "fc"}
    expected = NET.apply(PARAMS, STATS, IMAGES).features
    described = {**DESCRIBED, "model": {**DESCRIBED["model"], "num_classes": 0}}
    epoch = load_checkpoint(trajectory(tmp_path, trunk, described))
    export(epoch, tmp_path / "a.safetensors")
    saved(tmp_path / "whole.safetensors")
    asked = load_checkpoint(tmp_path / "whole.safetensors", "resnet10?num_classes=0")  # a head in the file is left out
    np.testing.assert_array_equal(asked.params["conv1"]["kernel"], PARAMS["conv1"]["kernel"])
    for found in (epoch, load_checkpoint(tmp_path / "a.safetensors"), asked):
        assert found.net is headless and not found.has_head and "fc" not in found.params
    for found in (epoch, load_checkpoint(tmp_path / "a.safetensors")):
        output = found.net.apply(found.params, found.stats, IMAGES)
        np.testing.assert_array_equal(output.features, expected)
        assert output.logits.shape == (2, 0) and found.notes == () and found.preprocessing == epoch.preprocessing


def test_a_timm_config_gives_model_and_preprocessing(tmp_path):
    found = load_checkpoint(hub(tmp_path / "a1b2c3"))
    assert found.net is NET and found.preprocessing.host_size == 26  # 24 / 0.9 = 26.7, which timm rounds down
    assert dataclasses.replace(found.preprocessing, crop_fraction=1.0) == Preprocessing(
        24, 1.0, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic"
    )


def test_a_timm_config_applies_only_to_model_files(tmp_path):
    path = hub(tmp_path / "x", "resnet10_mine.safetensors", {**TIMM_CONFIG, "architecture": "resnet50"})
    assert load_checkpoint(path).net is NET and not describes_itself(path)


def test_metadata_of_an_export_override_the_config(tmp_path):
    path = hub(tmp_path / "x", config={**TIMM_CONFIG, "architecture": "resnet50"})
    saved(path, metadata=METADATA)
    assert load_checkpoint(path).net is NET and load_checkpoint(path).preprocessing.image_size == 16


def test_a_checkpoint_describes_itself_if_it_names_its_model(tmp_path):
    assert describes_itself(saved(tmp_path / "a.safetensors", metadata=METADATA))
    assert describes_itself(hub(tmp_path / "x")) and describes_itself(trajectory(tmp_path))
    assert not describes_itself(saved(tmp_path / "resnet10.safetensors"))
    assert not describes_itself(hub(tmp_path / "y", config={**TIMM_CONFIG, "architecture": "resnet50d"}))
    assert not describes_itself(hub(tmp_path / "z", config={"architectures": ["ViTModel"]}))
    (tmp_path / "garbage.safetensors").write_bytes(b"no checkpoint" * 99)
    for other in ("garbage.safetensors", "absent.safetensors", "."):
        assert not describes_itself(tmp_path / other)


def test_describes_itself_reads_only_the_header(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.safetensors", metadata=METADATA)
    monkeypatch.setattr(torch_files, "_read_safetensors", lambda path: pytest.fail("read the weights"))
    assert describes_itself(path)


def test_an_epoch_of_a_trajectory_is_exported(tmp_path):
    first = load_checkpoint(trajectory(tmp_path))
    export(first, tmp_path / "a.safetensors")
    again = load_checkpoint(tmp_path / "a.safetensors")
    assert again.net is first.net is NET and again.preprocessing == first.preprocessing == Preprocessing(16)
    assert again.source_accuracy == 0.5
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.stats), (PARAMS, STATS))


def test_contradicting_models_are_both_named(tmp_path):
    exported = saved(tmp_path / "a.safetensors", metadata=METADATA)
    for path, where in ((exported, "its metadata"), (hub(tmp_path / "x"), "config.json"), (trajectory(tmp_path), "")):
        with pytest.raises(InputError, match=f"is a resnet10.*{where}.*not a resnet18") as caught:
            load_checkpoint(path, model="resnet18")
        assert str(path) in str(caught.value)
        assert load_checkpoint(path, model="resnet10").net is NET


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet10", {"width": 8, "stem": "cifar"}),
        ("resnet18_v2", {"width": 4, "stem": "imagenet"}),
        ("vit_tiny_patch4_32", {"image_size": 8}),
        ("t2t_vit_t_14", {"image_size": 32}),
    ],
)
def test_missing_settings_follow_from_the_shapes(tmp_path, name, settings):
    net = MODELS[name](num_classes=3, **settings)
    found = load_checkpoint(saved(tmp_path / f"{name}.safetensors", zeros(net)))
    assert found.net is net and found.settings == {"num_classes": 3, **settings}
    assert found.preprocessing.image_size == settings.get("image_size", 32 if name == "resnet10" else 224)


def test_a_guessed_preprocessing_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    found = load_checkpoint(saved(tmp_path / "resnet10.safetensors"))
    assert found.preprocessing == Preprocessing(32) and "are a guess" in caplog.text


# --- other image sizes


@pytest.fixture(scope="module")
def transformers():
    """A ViT with patches of 4 pixels for images of 8, and a T2T-ViT for images of 32, with random weights."""
    rng, found = np.random.default_rng(0), {}
    for name, size in (("vit_tiny_patch4_32", 8), ("t2t_vit_14", 32)):
        net = MODELS[name](num_classes=3, image_size=size)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        weights = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)
        found[name] = Checkpoint(name, net, *weights, Preprocessing(size, 0.5), settings={"image_size": size})
    return found


@pytest.mark.parametrize(("name", "size", "grid"), [("vit_tiny_patch4_32", 12, (2, 3)), ("t2t_vit_14", 48, (2, 3))])
def test_position_embeddings_are_resized_for_another_image_size(transformers, name, size, grid, tmp_path):
    before = transformers[name]
    after = at_image_size(before, size)
    assert after.net is MODELS[name](num_classes=3, image_size=size) and after.settings["image_size"] == size
    assert after.preprocessing == Preprocessing(size, 0.5)
    old, new = (c.params.get("pos_embed", c.stats.get("pos_embed")) for c in (before, after))
    np.testing.assert_array_equal(new, resize_position_embedding(old, (grid[0],) * 2, (grid[1],) * 2))
    assert ("pos_embed" in after.stats) == (name == "t2t_vit_14")
    jax.tree.map(np.testing.assert_array_equal, after.params["blocks"], before.params["blocks"])
    shapes = jax.eval_shape(after.net.apply, after.params, after.stats, jnp.zeros((2, size, size, 3)))
    assert shapes.logits.shape == (2, 3)
    export(after, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").net is after.net


def test_the_same_image_size_changes_nothing(transformers):
    for before in transformers.values():
        after = at_image_size(before, before.preprocessing.image_size)
        assert after.net is before.net and after.params is before.params and after.stats is before.stats


def test_a_convolutional_net_accepts_another_image_size():
    before = Checkpoint("x", NET, PARAMS, STATS, Preprocessing(16, 0.5))
    after = at_image_size(before, 24)
    assert vars(after) == {**vars(before), "preprocessing": Preprocessing(24, 0.5)}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet10", 7, "x: image_size 7 is too small; resnet10 needs at least 8"),
        ("resnet10", 0, "x: image_size is 0; expected a number of pixels"),
        ("vit_tiny_patch4_32", 10, "image_size 10 is not a multiple of 4, the patch size of vit_tiny_patch4_32"),
        ("t2t_vit_14", 40, "image_size 40 is not a multiple of 16"),
        ("vit_tiny_patch4_32", 12.5, "image_size is 12.5"),
    ],
)
def test_unsuitable_image_sizes_are_refused(transformers, name, size, message):
    checkpoint = transformers.get(name, Checkpoint("x", NET, PARAMS, STATS, Preprocessing(16)))
    with pytest.raises(InputError, match=message):
        at_image_size(checkpoint, size)
