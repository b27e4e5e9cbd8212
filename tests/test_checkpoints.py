"""Checkpoints from files: equal to the torch twin that wrote them, strict about names, and nothing in them is run."""

import json
import logging
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_transfer.models import MODELS, export, load_checkpoint, torch_weights
from jax_transfer.models.checkpoints import expand
from jax_transfer.records import InputError

NET = MODELS["resnet10"](num_classes=5, stem="cifar", width=8)
PARAMS, STATS = NET.init(jax.random.key(3))
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def state():
    """A torch state dict of NET, with statistics that are not the initial ones."""
    rng = np.random.default_rng(1)
    stats = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32), STATS)
    return torch_weights.to_torch(PARAMS, stats)


def test_names_and_layouts_are_torchs():
    found = state()
    assert found["conv1.weight"].shape == (8, 3, 3, 3) and found["fc.weight"].shape == (5, 64)
    assert found["layer2.0.downsample.1.running_var"].shape == (16,)
    kernel = np.asarray(PARAMS["conv1"]["kernel"])
    np.testing.assert_array_equal(found["conv1.weight"][2, 1], kernel[:, :, 1, 2])


def test_there_and_back_is_the_identity():
    params, stats, note = torch_weights.from_torch(state(), NET, "x")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert note == ""
    np.testing.assert_array_equal(stats["bn1"]["var"], state()["bn1.running_var"])


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_wrappers_counters_and_the_other_encoder_do_not_matter(tmp_path, prefix):
    found = {prefix + name: value for name, value in state().items()}
    found |= {f"{prefix}bn1.num_batches_tracked": np.array(7), "module.queue": np.ones((3, 3), np.float32)}
    found["module.encoder_k.conv1.weight"] = np.zeros((8, 3, 3, 3), np.float32)
    if not prefix:
        del found["module.queue"], found["module.encoder_k.conv1.weight"]
    safetensors.numpy.save_file(found, tmp_path / "a.safetensors")
    read, _ = torch_weights.read_state(tmp_path / "a.safetensors")
    assert {name: value.shape for name, value in read.items()} == {n: v.shape for n, v in state().items()}


def test_a_head_of_another_size_is_left_out_and_said(tmp_path):
    found = state()
    found["fc.weight"], found["fc.bias"] = np.ones((9, 64), np.float32), np.ones(9, np.float32)
    params, _, note = torch_weights.from_torch(found, NET, "x")
    assert "fc.weight [9, 64]" in note and params["fc"]["kernel"].shape == (64, 5)
    mlp = {name: value for name, value in state().items() if not name.startswith("fc.")}
    mlp |= {"fc.0.weight": np.ones((64, 64), np.float32), "fc.2.weight": np.ones((5, 64), np.float32)}
    assert "fc.0.weight" in torch_weights.from_torch(mlp, NET, "x")[2]
    assert "(none)" in torch_weights.from_torch({n: v for n, v in state().items() if n[:3] != "fc."}, NET, "x")[2]


def test_what_does_not_fit_is_listed_by_name():
    found = state()
    del found["layer1.0.conv1.weight"]
    found["layer9.weight"] = np.ones(3, np.float32)
    found["bn1.bias"] = np.ones(9, np.float32)
    with pytest.raises(InputError, match=r"x does not fit resnet10: missing: layer1\.0\.conv1\.weight") as caught:
        torch_weights.from_torch(found, NET, "x")
    message = str(caught.value)
    assert "unexpected: layer9.weight float32[3]" in message
    assert "differs: bn1.bias expected float32[8], found float32[9]" in message and "\n" not in message


def saved(path, found=None, metadata=None):
    safetensors.numpy.save_file(found or state(), path, metadata=metadata)
    return path


DESCRIBED = {"model": {"name": "resnet10", "stem": "cifar", "width": 8, "num_classes": 5},
             "preprocessing": {"image_size": 16}, "source_accuracy": 0.5}  # fmt: skip


def test_exported_checkpoints_come_back_whole(tmp_path):
    first = load_checkpoint(saved(tmp_path / "a.safetensors", metadata={"jax_transfer": json.dumps(DESCRIBED)}))
    assert first.source_accuracy == 0.5 and first.preprocessing.image_size == 16
    export(first, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert again.net is first.net and again.preprocessing == first.preprocessing
    outputs = [c.net.apply(c.params, c.stats, IMAGES) for c in (first, again)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)


def test_the_model_is_named_by_the_file_or_by_the_caller(tmp_path):
    net = MODELS["resnet18"](num_classes=7)
    found = torch_weights.to_torch(*net.init(jax.random.key(0)))
    loaded = load_checkpoint(saved(tmp_path / "resnet18-f37072fd.safetensors", found))
    assert loaded.net is net and loaded.preprocessing.image_size == 224
    with pytest.raises(InputError, match="which model is it"):
        load_checkpoint(saved(tmp_path / "mine.safetensors", found))
    assert load_checkpoint(tmp_path / "mine.safetensors", model="resnet18").net is net
    with pytest.raises(InputError, match=r"does not fit resnet34: missing: layer1\.2"):
        load_checkpoint(tmp_path / "mine.safetensors", model="resnet34")


class Hostile:
    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def _garbage(path, tmp_path):
    path.write_bytes(b"\x07 no checkpoint" * 99)


def _truncated(path, tmp_path):
    whole = saved(tmp_path / "whole.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _empty(path, tmp_path):
    path.write_bytes(b"")


def _not_a_number(path, tmp_path):
    saved(path, {**state(), "bn1.bias": np.full(8, np.nan, np.float32)})


def _nothing(path, tmp_path):
    safetensors.numpy.save_file({"bn1.num_batches_tracked": np.array(3)}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_garbage, "no safetensors file, or is cut off"),
        (_truncated, "no safetensors file, or is cut off"),
        (_empty, "no safetensors file, or is cut off"),
        (_not_a_number, "bn1.bias holds values that are NaN"),
        (_nothing, "holds no weights"),
        (lambda path, tmp_path: None, "no such checkpoint file"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, make, message):
    path = tmp_path / "bad.safetensors"
    make(path, tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(path, model="resnet10")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_ending_and_a_folder_without_checkpoints_are_refused(tmp_path):
    (tmp_path / "a.zip").touch()
    with pytest.raises(InputError, match=r"expected a \.safetensors"):
        load_checkpoint(tmp_path / "a.zip")
    with pytest.raises(InputError, match="no epoch of a trajectory"):
        load_checkpoint(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoints"):
        expand(tmp_path)


# --- torch's own files


def test_pth_files_equal_the_twin_that_wrote_them(tmp_path, caplog):
    torch = pytest.importorskip("torch")
    import torch_twins

    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "cifar")
    images = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits, features = twin(images)
    files = {"plain.pth": twin.state_dict(), "lightning.pt": {"state_dict": twin.state_dict(), "epoch": 3}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        found, _ = torch_weights.read_state(tmp_path / name)
        params, stats, note = torch_weights.from_torch(found, NET, name)
        output = NET.apply(params, stats, IMAGES)
        assert note == ""
        np.testing.assert_allclose(output.logits, logits, atol=1e-4)
        np.testing.assert_allclose(output.features, features, atol=1e-4)


@pytest.mark.parametrize("ending", ["pth", "pt"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, ending):
    torch = pytest.importorskip("torch")
    witness = tmp_path / "it_ran"
    hostile = Hostile()
    hostile.path = witness
    torch.save({"conv1.weight": torch.ones(3), "x": hostile}, tmp_path / f"new.{ending}")
    (tmp_path / f"old.{ending}").write_bytes(pickle.dumps({"x": hostile}))
    for name in (f"new.{ending}", f"old.{ending}"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name, model="resnet10")
    with pytest.raises(InputError, match="could run code when loaded: refused"):
        load_checkpoint(tmp_path / f"new.{ending}", model="resnet10")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint" * 50])
def test_a_pth_file_that_is_none_is_refused(tmp_path, content):
    pytest.importorskip("torch")
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match="is no torch checkpoint, or is cut off"):
        load_checkpoint(tmp_path / "a.pth", model="resnet10")


def test_a_head_that_was_left_out_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    found = {name: value for name, value in state().items() if not name.startswith("fc.")}
    metadata = {"jax_transfer": json.dumps(DESCRIBED)}
    with caplog.at_level(logging.WARNING):
        load_checkpoint(saved(tmp_path / "a.safetensors", found, metadata))
    assert "was left out" in caplog.text
