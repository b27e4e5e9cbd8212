"""Files that are not the requested checkpoint: a one-line error names the file, and no code in them runs."""

import json
import pathlib
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from helpers.checkpoint_files import DESCRIBED, TIMM_CONFIG, hub, saved, state, zeros
from jax_transfer.checkpoints import describes_itself, expand, load_checkpoint
from jax_transfer.models import MODELS
from jax_transfer.records import InputError


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


def _no_weights(path, tmp_path):
    safetensors.numpy.save_file({"bn1.num_batches_tracked": np.array(3)}, path)


def _claims_gigabytes(path, tmp_path):
    path.write_bytes(struct.pack("<Q", 5 << 30) + b"{}" * 99)


def _claims_a_large_tensor(path, tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [1000000000, 10], "data_offsets": [0, 40000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 99)


def _eight_bit(path, tmp_path):
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")


def _of_another_model(path, tmp_path):
    saved(path, {"encoder/layer.weight": np.ones((3, 3), np.float32), "lstm.bias": np.ones(3, np.float32)})


def _with_one_array_twice(path, tmp_path):
    names = ("encoder.layers.encoder_layer_0.ln_1.weight", "class_token", "cls_token")
    saved(path, {name: np.ones(3, np.float32) for name in names})


def _with_metadata(**fields):
    return lambda path, tmp_path: saved(path, metadata={"jax_transfer": json.dumps({**DESCRIBED, **fields})})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_claims_gigabytes, "not a safetensors file.*header too large"),
        (_claims_a_large_tensor, "not a safetensors file.*not fully covered"),
        (_eight_bit, "a has dtype F8_E4M3; save it as float32"),
        (_of_another_model, "resnet10: missing: bn1.bias .*missing: 57 more; unexpected: encoder:layer.weight"),
        (_with_one_array_twice, "holds cls_token under two names, one of them class_token"),
        (_with_metadata(model=["resnet10"]), "its metadata under 'jax_transfer' cannot be used"),
        (_with_metadata(source_accuracy="high"), "the source accuracy is 'high'"),
        (_with_metadata(notes="a sentence"), "the notes are 'a sentence'"),
        (_with_metadata(model={"name": 3}), "the name of its model is 3"),
        (_with_metadata(preprocessing={"size": 3}), "'jax_transfer' cannot be used .Preprocessing: unknown size"),
        (
            _with_metadata(model={"name": "resnet10", "depth": 3}),
            "resnet10 does not take all of these settings: .*'depth': 3",
        ),
        (_garbage, "not a safetensors file or is truncated"),
        (_truncated, "not a safetensors file or is truncated"),
        (_empty, "not a safetensors file or is truncated"),
        (_not_a_number, "bn1.bias holds values that are NaN"),
        (_no_weights, "holds no weights"),
        (lambda path, tmp_path: None, "no such checkpoint file"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, make, message):
    path = tmp_path / "bad.safetensors"
    make(path, tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(path, model="resnet10")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_metadata_must_match_the_image_size_of_the_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    net = MODELS["vit_tiny_patch4_32"](num_classes=3, image_size=8)
    described = {"model": {"name": "vit_tiny_patch4_32"}, "preprocessing": {"image_size": 32}}
    saved(path, zeros(net), {"jax_transfer": json.dumps(described)})
    with pytest.raises(InputError, match="weights take images of 8 pixels, but its metadata says 32"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["{", json.dumps({**TIMM_CONFIG, "pretrained_cfg": {"input_size": [3, 24, 24]}})])
def test_an_invalid_config_is_named(tmp_path, text):
    path = hub(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: .*repair or remove it") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "a.safetensors")
    monkeypatch.setattr(pathlib.Path, "open", refuse)  # not by permissions, since root may read every file
    with pytest.raises(InputError, match=r"^\S+a\.safetensors: cannot be opened \(Permission denied\)\.$"):
        load_checkpoint(path, model="resnet10")


def test_unknown_extensions_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "a.zip").touch()
    with pytest.raises(InputError, match=r"expected a \.safetensors"):
        load_checkpoint(tmp_path / "a.zip")
    (tmp_path / "2024").mkdir()
    for folder in (tmp_path, tmp_path / "2024"):
        with pytest.raises(InputError, match="not an epoch of a trajectory"):
            load_checkpoint(folder)
        assert not describes_itself(folder)
    (tmp_path / "2024").rmdir()
    with pytest.raises(InputError, match="holds no checkpoints"):
        expand(tmp_path)


# --- torch's own files


@pytest.mark.parametrize("extension", ["pth", "pt"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, extension):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "it_ran"
    hostile = Hostile()
    hostile.path = canary
    torch.save({"conv1.weight": torch.ones(3), "x": hostile}, tmp_path / f"new.{extension}")
    (tmp_path / f"old.{extension}").write_bytes(pickle.dumps({"x": hostile}))
    for name in (f"new.{extension}", f"old.{extension}"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name, model="resnet10")
    with pytest.raises(InputError, match="could run code when loaded: refused"):
        load_checkpoint(tmp_path / f"new.{extension}", model="resnet10")
    assert not canary.exists()


def test_modules_and_programs_are_refused_with_advice(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(2, 2)
    torch.save(layer, tmp_path / "module.pth")
    torch.jit.save(torch.jit.trace(layer, torch.ones(1, 2)), tmp_path / "program.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("module.pth", r"objects besides tensors \(torch\.nn\.modules\.linear\.Linear\).*save its state_dict"),
        ("program.pt", r"is a TorchScript program.*save its state_dict"),
        ("sparse.pth", "a is sparse, quantised or complex"),
        ("list.pth", "holds no weights"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(tmp_path / name, model="resnet10")
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_pth_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"conv1.weight": torch.ones(3000)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "a.pth").write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(InputError, match=r"a\.pth: is not a torch checkpoint or is truncated"):
            load_checkpoint(tmp_path / "a.pth", model="resnet10")
