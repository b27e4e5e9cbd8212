"""Wrapped checkpoints of training code: names with wrappers, the choice among several networks, and refused files."""

import argparse
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.checkpoint_files import TIMM_CONFIG, hub, saved, state, zeros
from helpers.torch_checkpoints import assert_holds_state, other_tensors, save_and_load, tensors
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.checkpoints.descriptions import architecture_in_options
from jax_transfer.checkpoints.released import is_release, released
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.models import MODELS
from jax_transfer.records import InputError

PARTS = ("", "conv1", "bn1", "layer1", "layer2.0", "layer4.0.downsample", "layer3.0.conv2", "fc")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
def test_wrappers_of_submodules_are_removed_from_names(tmp_path, wrapper, prefix):
    def wrapped(name, parts):
        for part in parts:
            if name.startswith(f"{part}." if part else ""):
                name = ".".join(filter(None, [part, wrapper, name.removeprefix(part).lstrip(".")]))
        return prefix + name

    first = len(wrapper + prefix) % 4
    for parts in ([part] for part in PARTS[first::4]):
        renamed = {wrapped(name, parts): x for name, x in state().items()}
        assert renamed.keys() != state().keys()
        saved(tmp_path / "a.safetensors", renamed)
        assert_holds_state(load_checkpoint(tmp_path / "a.safetensors", "resnet10"))


@pytest.mark.parametrize("larger", ["resnet18", "resnet34"])
def test_a_larger_network_with_all_names_is_not_loaded(tmp_path, larger):
    more = zeros(MODELS[larger](num_classes=5, stem="cifar", width=8))
    for teacher, student in (("teacher.", "student."), ("ema.", "model."), ("net_a.", "net_b.")):
        both = {teacher + name: x for name, x in more.items()} | {student + name: x for name, x in state().items()}
        saved(tmp_path / "a.safetensors", both)
        assert_holds_state(load_checkpoint(tmp_path / "a.safetensors", "resnet10"))


@pytest.mark.parametrize("updates", [0, 1, 250])
def test_an_average_without_updates_is_not_loaded(tmp_path, updates):
    torch = pytest.importorskip("torch")
    averaged, plain = (tensors, other_tensors) if updates else (other_tensors, tensors)
    counted = averaged(prefix="module.") | {
        "module.n_averaged" if updates == 1 else "n_averaged": torch.tensor(updates)
    }
    assert_holds_state(save_and_load(tmp_path, {"swa_model": counted, "model": plain()}))


@pytest.mark.parametrize("key", ["pretrained", "init_model", "old_weights", "previous", "last", "mu", "opt_state"])
def test_earlier_weights_and_optimizer_states_are_loaded_last(tmp_path, key):
    for contents in ({key: other_tensors(), "net": tensors()}, {"net": tensors(), key: other_tensors()}):
        assert_holds_state(save_and_load(tmp_path, contents))


@pytest.mark.parametrize("kind", ["int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_torch_weights_are_refused(tmp_path, kind):
    torch = pytest.importorskip("torch")
    weights = {name: x.to(getattr(torch, kind)) if x.ndim == 4 else x for name, x in tensors().items()}
    with pytest.raises(InputError, match=rf"conv1\.weight is quantised \(torch\.{kind}\); save it as"):
        save_and_load(tmp_path, {"model": weights})


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_eight_bit_safetensors_and_numpy_weights_are_refused(tmp_path, kind):
    weights = {name: x.astype(kind) if x.ndim == 4 else x for name, x in state().items()}
    saved(tmp_path / "a.safetensors", weights)
    with pytest.raises(InputError, match="quantised"):
        load_checkpoint(tmp_path / "a.safetensors", "resnet10")
    with pytest.raises(InputError, match="quantised"):
        save_and_load(tmp_path, {"params": weights})


@pytest.mark.parametrize("protocol", [4, 5])
def test_unsupported_pickle_protocols_are_named(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    for i, zipped in enumerate((True, False)):
        path = tmp_path / f"{i}.pth"
        torch.save({"m": tensors()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=f"is saved with pickle protocol {protocol}"):
                load_checkpoint(path, "resnet10")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no checkpoint" * 50,
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"GGUF" + bytes(9),
    ],
)
def test_other_files_are_not_torch_checkpoints(tmp_path, data):
    pytest.importorskip("torch")
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(InputError, match="is not a torch checkpoint or is truncated; download it again"):
        load_checkpoint(tmp_path / "a.pth", "resnet10")


@pytest.mark.filterwarnings("ignore")
def test_ragged_tensors_beside_the_weights_are_ignored(tmp_path):
    torch = pytest.importorskip("torch")
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert_holds_state(save_and_load(tmp_path, {"state_dict": tensors(), "x": ragged, "y": {"z": ragged}}))


@pytest.mark.parametrize("extension", ["safetensors", "bin", "pt"])
def test_parts_of_a_split_checkpoint_are_refused(tmp_path, extension):
    names = sorted(state())
    for i in (1, 2):
        saved(tmp_path / f"model-0000{i}-of-00002.{extension}", {name: state()[name] for name in names[i - 1 :: 2]})
    (tmp_path / f"model.{extension}.index.json").write_text("{}")
    for path in (tmp_path, *tmp_path.iterdir()):
        with pytest.raises(
            InputError, match="is part of a checkpoint that is split over several files; save it as one"
        ):
            load_checkpoint(path, "resnet10")


# --- options in files


@pytest.mark.parametrize("options", ["args", "config", "hparams"])
@pytest.mark.parametrize("key", ["model", "arch", "backbone"])
def test_options_name_the_model_despite_equal_keys(tmp_path, options, key):
    contents = {key: {}, options: {key: "resnet10", "lr": 0.1}}
    assert architecture_in_options(contents) == "resnet10"
    for kept in (argparse.Namespace(**{key: "resnet10"}), {key: "resnet10"}):
        found = save_and_load(tmp_path, {key: tensors(), options: kept}, name="epoch_7.pth", model=None)
        assert_holds_state(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gp": "max"}, "global_pool 'max'"),
        ({"global_pool": "catavgmax"}, "global_pool 'catavgmax'"),
        ({"model_kwargs": {"output_stride": 8}}, "output_stride"),
        ({"model_kwargs": {"aa_layer": "blurpool"}}, "aa_layer"),
        ({"model_kwargs": {"global_pool": "max"}}, "global_pool 'max'"),
        ({"model_kwargs": [1]}, "model_kwargs are"),
    ],
)
def test_options_that_change_the_network_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=rf"resnet10\.pth \(its options\): .*{message}"):
        save_and_load(tmp_path, {"state_dict": tensors(), "args": argparse.Namespace(**options)})


@pytest.mark.parametrize(
    "options", [{"gp": None}, {"gp": "avg"}, {"model_kwargs": {}}, {"model_kwargs": {"drop_rate": 0.1}}]
)
def test_options_that_keep_the_network_are_accepted(tmp_path, options):
    assert_holds_state(save_and_load(tmp_path, {"state_dict": tensors(), "args": argparse.Namespace(**options)}))


def test_only_convolutional_heads_are_noted_as_segmentation(tmp_path):
    torch = pytest.importorskip("torch")
    trunk = {name: x for name, x in tensors(prefix="backbone.").items() if ".fc." not in name}
    linear = {"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}
    maps = {"classifier.0.weight": torch.ones(5, 64, 3, 3), "classifier.0.bias": torch.ones(5)}
    for head, noted in ((linear, False), (maps, True)):
        found = save_and_load(tmp_path, trunk | head)
        assert any("segmentation" in note for note in found.notes) == noted


def test_a_head_on_other_features_is_noted(tmp_path):
    doubled = state() | {"fc.weight": np.zeros((5, 128), np.float32)}
    saved(tmp_path / "a.safetensors", doubled)
    found = load_checkpoint(tmp_path / "a.safetensors", "resnet10")
    assert not found.has_head and any("takes 128 features where resnet10 has 64" in note for note in found.notes)


@pytest.mark.parametrize("name", ["freqs_cis", "cls_pos", "ln_pre.weight", "adaptmlp.0.weight", "ssf_scale_1"])
def test_further_unknown_layers_before_the_features_are_refused(tmp_path, name):
    saved(tmp_path / "a.safetensors", state() | {name: np.ones(3, np.float32)})
    with pytest.raises(InputError, match=f"unexpected: {name}"):
        load_checkpoint(tmp_path / "a.safetensors", "resnet10")


@pytest.mark.parametrize("name", ["mask_token", "masked_embed"])
def test_mask_tokens_are_left_out(tmp_path, name):
    tiny = zeros(MODELS["vit_tiny_patch4_32"](num_classes=3, image_size=8))
    saved(
        tmp_path / "a.safetensors", {"backbone." + key: x for key, x in tiny.items()} | {"backbone." + name: np.ones(3)}
    )
    assert load_checkpoint(tmp_path / "a.safetensors", "vit_tiny_patch4_32").net.name == "vit_tiny_patch4_32"


@pytest.mark.parametrize(
    ("file", "side", "size", "interpolation"),
    [("resnet34-43635321.pth", 256, 224, "bicubic"), ("resnet34-b627a593.pth", 256, 224, "bilinear"),
     ("resnet50_a1h2_176-001a1197.pth", 195, 176, "bicubic"), ("resnet50_d-f39db8af.pth", 235, 224, "bicubic")],
)  # fmt: skip
def test_renamed_timm_releases_are_recognised(file, side, size, interpolation):
    found = released(file)[1]
    assert (found.host_size, found.image_size, found.interpolation) == (side, size, interpolation)
    assert is_release(file)
    assert not is_release("resnet34-20240131.pth") and not is_release("resnet34_00043635.pth")


def test_an_ordinary_hub_file_has_no_notes(tmp_path):
    standard = zeros(MODELS["resnet10"](num_classes=5, width=8))
    path = saved(tmp_path / "model.safetensors", standard)
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    assert load_checkpoint(path).notes == ()
    assert hub(tmp_path / "b").is_file()


# --- trajectories


def _cases():
    one = jnp.ones(1)
    return {
        "no numbers": jnp.zeros((0, 3)),
        "a slash": {"a/b": one},
        "the same name": {"a.b": one, "a": {"b": one}},
        "keys that do not sort": {1: one, "1": one},
        "other byte order": np.ones(2, ">f4" if np.little_endian else "<f4"),
        "long doubles": np.longdouble(1),
        "a shape": jax.ShapeDtypeStruct((1,), jnp.float32),
        "masked": np.ma.array(np.ones(2, np.float32), mask=[0, 1]),
    }


@pytest.mark.parametrize("kind", _cases())
@pytest.mark.parametrize("tree", ["queue", "params"])
def test_values_that_cannot_be_restored_are_refused_on_saving(tmp_path, kind, tree):
    model, training = {"params": {"w": jnp.ones(3)}, "stats": {}}, {"step": jnp.int32(1)}
    (model if tree == "params" else training)[tree] = {"w": jnp.ones(3), "x": _cases()[kind]}
    trajectory = Trajectory(tmp_path / "checkpoints")
    try:
        with pytest.raises(InputError, match="A checkpoint cannot hold") as caught:
            trajectory.save(0, model, training, {})
        assert "\n" not in str(caught.value) and trajectory.epochs() == []
    finally:
        trajectory.close()
