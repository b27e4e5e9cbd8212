"""Checkpoints of training code: weights are found in any container, omissions are noted, and no code runs."""

import argparse
import collections
import contextlib
import datetime
import logging
import pathlib
import pickle
import types

import jax
import numpy as np
import pytest

from helpers.checkpoint_files import NET, saved, state, zeros
from helpers.torch_checkpoints import assert_holds_state, other_tensors, save_and_load, tensors
from jax_transfer.checkpoints import load_checkpoint, torch_files, torch_weights
from jax_transfer.models import MODELS
from jax_transfer.records import InputError

torch = pytest.importorskip("torch")

HEADLESS = {name: x for name, x in state().items() if not name.startswith("fc.")}
TINY = MODELS["vit_tiny_patch4_32"](num_classes=3, image_size=8)


PREFIXES = (
    "",
    "module.",
    "net.",
    "encoder.",
    "visual.trunk.",
    "timm_model.",
    "model.model.",
    "student.",
    "0.",
    "_orig_mod.",
    "feature_extractor.",
    "backbone.body.",
    "module._orig_mod.base.cnn.",
)
CONTAINERS = (
    (),
    ("state_dict",),
    ("model_state_dict",),
    ("net",),
    ("ema",),
    ("module",),
    ("weights",),
    ("model", "state_dict"),
    ("checkpoint", "network", "params"),
    ("a", "0", "b", "c"),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_are_found_in_any_container_and_prefix(tmp_path, prefix):
    first = PREFIXES.index(prefix)
    for keys in (*CONTAINERS, *CONTAINERS)[first % 10 : first % 10 + 3]:
        contents = tensors(prefix=prefix)
        for key in reversed(keys):
            contents = {key: contents, "epoch": 3, "acc": 95.0, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
        assert_holds_state(save_and_load(tmp_path, contents))
    saved(tmp_path / "a.safetensors", {prefix + name: x for name, x in state().items()})
    assert_holds_state(load_checkpoint(tmp_path / "a.safetensors", "resnet10"))


def test_weights_are_found_in_lists_of_mappings(tmp_path):
    assert_holds_state(save_and_load(tmp_path, [7, {"x": [tensors()]}]))


@pytest.mark.parametrize("extension", torch_files.ENDINGS)
def test_all_extensions_are_read(tmp_path, extension):
    path = saved(tmp_path / f"resnet10{extension}")
    if extension != ".safetensors":
        torch.save({"model": tensors()}, path)
    assert_holds_state(load_checkpoint(path))


AVERAGED = (
    ({"model": 0, "ema": 1}, ""), ({"net": 0, "net_ema": 1}, "module."), ({"state_dict": 0, "state_dict_ema": 1}, ""),
    ({"params": 0, "swa_state": 1}, ""), ({"model": 0, "averaged_model": 1}, "module."),
    ({"student": 0, "teacher": 1}, "backbone."), ({"model": 0, "EMA": {"weights": 1, "decay": 0.99}}, ""),
    ({"best": 0, "moving_average": 1}, ""), ({"target_network": 0, "online_network": 1}, "encoder."),
    ({"optimizer": {"exp_avg": 0}, "weights": 1}, ""), ({"momentum_encoder": 0, "net": 1}, ""),
)  # fmt: skip


@pytest.mark.parametrize(("layout", "prefix"), AVERAGED)
def test_averaged_weights_are_preferred_and_noted(tmp_path, layout, prefix):
    def filled(x):
        if isinstance(x, dict):
            return {key: filled(value) for key, value in x.items()}
        return x if isinstance(x, float) else tensors(prefix=prefix) if x else other_tensors(prefix)

    for contents in (filled(layout), dict(reversed(filled(layout).items()))):
        found = save_and_load(tmp_path, contents)
        head = "online_network" not in layout
        assert_holds_state(found, head)
        assert any("would fit as well and was left out" in note for note in found.notes)


def test_averaged_weights_are_preferred_within_a_mapping(tmp_path):
    for good, bad in (
        ("teacher.backbone.", "student.backbone."),
        ("ema_model.module.", "model."),
        ("encoder_q.", "encoder_k."),
    ):
        found = save_and_load(tmp_path, {"state_dict": other_tensors(bad) | tensors(prefix=good)})
        assert_holds_state(found, head=good != "encoder_q.")
        assert good in found.notes[0] and bad in found.notes[0]
    counted = tensors(prefix="copy.") | {"copy.n_averaged": torch.tensor(3)}
    assert_holds_state(save_and_load(tmp_path, other_tensors("net.") | counted))


@pytest.mark.parametrize("key", ["ema", "model_ema", "teacher"])
def test_an_average_without_weights_is_ignored(tmp_path, key):
    for found in ({"decay": 0.99}, {}, {"updates": torch.tensor(3)}, None, 0.5, [1, 2]):
        assert_holds_state(save_and_load(tmp_path, {key: found, "model": tensors()}))


def test_an_incomplete_average_is_ignored(tmp_path):
    part = {name: x for name, x in other_tensors().items() if not name.startswith("layer4")}
    assert_holds_state(save_and_load(tmp_path, {"ema": part, "model": tensors()}))


def test_the_network_with_matching_shapes_is_loaded(tmp_path):
    wider = zeros(MODELS["resnet10"](num_classes=5, stem="cifar", width=16))
    found = save_and_load(tmp_path, {"teacher": tensors(wider), "student": tensors()}, settings={"width": 8})
    assert_holds_state(found)


# Arrays beside the weights, below the prefix of the wrapper or of the network.
ASIDE = (
    "criterion.weight",
    "loss_fn.margin",
    "train_acc.correct",
    "val_f1.tp",
    "metrics.auroc.preds",
    "n_averaged",
    "projection_head.0.weight",
    "projector.bn.weight",
    "prototypes.weight",
    "predictor.layers.0.weight",
    "queue",
    "mlp_head.2.bias",
    "decoder_blocks.0.norm1.weight",
    "decoder.conv1.weight",
    "arcface.kernel",
    "log_temperature",
    "momentum_buffer",
    "class_weights",
    "pos_weight",
    "normalize.mean",
)


@pytest.mark.parametrize("name", ASIDE)
def test_weights_outside_the_network_are_left_out_and_noted(tmp_path, name):
    for prefix, wrapper in (
        ("", ""),
        ("model.", ""),
        ("module.encoder.", "module."),
        ("module.encoder.", "module.encoder."),
    ):
        found = save_and_load(tmp_path, {"state_dict": tensors(prefix=prefix) | {wrapper + name: torch.ones(7)}})
        assert_holds_state(found)
        assert any(note.startswith("Left out") and name.split(".")[0] in note for note in found.notes)


BEFORE_FEATURES = (
    "layer1.0.se.fc1.weight",
    "layer3.0.ls1.gamma",
    "layer5.0.conv1.weight",
    "bn2.weight",
    "norm_pre.weight",
    "maxpool.1.filt",
    "layer2.0.aa.filt",
    "attnpool.q_proj.weight",
    "conv_head.weight",
    "fc_norm.bias",
    "stem.0.weight",
)


@pytest.mark.parametrize("name", BEFORE_FEATURES)
def test_unknown_layers_before_the_features_are_refused(tmp_path, name):
    prefix = "net." if "." in name[:7] else ""
    with pytest.raises(InputError, match=f"unexpected: {name}"):
        save_and_load(tmp_path, tensors(prefix=prefix) | {prefix + name: torch.ones(7)})


@pytest.mark.parametrize(
    "name", ["reg_token", "dist_token", "blocks.3.ls1.gamma", "blocks.0.attn.q_norm.weight", "head_dist.weight"]
)
def test_transformers_with_additional_weights_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"unexpected: {name}"):
        save_and_load(tmp_path, tensors(zeros(TINY)) | {name: torch.ones(7)}, model="vit_tiny_patch4_32")


@pytest.mark.parametrize("missing", [1, 7, 30])
def test_missing_weights_and_the_keys_of_the_file_are_named(tmp_path, missing):
    names = sorted(HEADLESS)
    part = {name: x for name, x in tensors(prefix="net.").items() if name != "net." + names[missing]}
    with pytest.raises(InputError) as caught:
        save_and_load(tmp_path, {"weights": part, "epoch": 3})
    assert f"missing: {names[missing]}" in str(caught.value) and "'weights', 'epoch'" in str(caught.value)


def test_a_file_without_suitable_weights_lists_its_keys(tmp_path):
    lstm = {"lstm.bias": torch.ones(3), "lstm.kernel": torch.ones(3, 3)}
    for contents, expected in (
        ({"net": lstm, "epoch": 3}, "'net', 'epoch', with arrays such as lstm.bias"),
        (lstm, "'lstm.bias'"),
        ({"decay": 0.9, "note": "x"}, "holds no weights; the file's keys are 'decay', 'note'"),
        ([1, 2], "holds no weights; the file is a list"),
    ):
        with pytest.raises(InputError) as caught:
            save_and_load(tmp_path, contents)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


# --- self-supervised methods


def test_heads_of_swav_simsiam_and_byol_are_left_out(tmp_path):
    one = torch.ones(4, 4)
    swav = tensors(HEADLESS, "module.") | {
        "module.projection_head.0.weight": one,
        "module.projection_head.1.running_mean": one[0],
        "module.prototypes.weight": one,
    }
    heads = {f"module.encoder.fc.{i}.weight": one for i in (0, 3, 6)} | {"module.predictor.0.weight": one}
    simsiam = tensors(HEADLESS, "module.encoder.") | heads
    byol = {"online_network.projetion.net.0.weight": one, "predictor.net.0.weight": one}
    byol |= other_tensors("target_network.encoder.") | tensors(HEADLESS, "online_network.encoder.")
    byol = {name: x for name, x in byol.items() if not name.startswith("target_network.encoder.fc.")}
    for contents, expected in (
        (swav, "prototypes"),
        ({"arch": "resnet10", "state_dict": simsiam}, "predictor"),
        (byol, "target_network"),
    ):
        found = save_and_load(tmp_path, contents, model=None)
        assert_holds_state(found, head=False)
        assert expected in " ".join(found.notes)


def test_decoder_of_mae_and_student_of_dino_are_left_out(tmp_path):
    trunk = {name: x for name, x in zeros(TINY).items() if not name.startswith("head.")}
    trunk["norm.bias"] = np.full(192, 2, np.float32)
    decoder = {
        f"decoder_{name}": torch.ones(2)
        for name in ("pos_embed", "embed.weight", "blocks.0.norm1.bias", "norm.bias", "pred.bias")
    }
    mae = {"model": tensors(trunk) | decoder | {"mask_token": torch.ones(2)}, "optimizer": {}, "epoch": 1}
    student = {"module.backbone." + name: torch.ones(x.shape) for name, x in trunk.items()}
    teacher = tensors(trunk, "backbone.") | {
        "head.mlp.0.weight": torch.ones(2),
        "head.last_layer.weight_g": torch.ones(2),
    }
    for contents, expected in ((mae, "decoder"), ({"student": student, "teacher": teacher}, "student")):
        found = save_and_load(tmp_path, contents, model="vit_tiny_patch4_32")
        assert (found.params["norm"]["bias"] == 2).all() and not found.has_head
        assert expected in " ".join(found.notes)


def test_a_lightning_checkpoint_is_read(tmp_path):
    weights = tensors(prefix="model.") | {
        "criterion.weight": torch.ones(5),
        "train_acc.tp": torch.zeros(5, dtype=torch.int64),
    }
    contents = {
        "state_dict": weights,
        "callbacks": {"ModelCheckpoint": {"best": torch.ones(())}},
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.5",
        "optimizer_states": [{"state": {}}],
        "loops": None,
    }
    found = save_and_load(tmp_path, contents, name="epoch=3-step=9.ckpt")
    assert_holds_state(found)
    assert "criterion" in found.notes[0] and "train_acc" in found.notes[0]


# --- objects


INERT = {
    "namespace": argparse.Namespace(
        lr=0.1, inner=argparse.Namespace(path=pathlib.Path("/data"), shape=torch.Size([2]))
    ),
    "path": pathlib.PurePosixPath("a/b"),
    "real path": pathlib.Path("a/b"),
    "numpy scalars": [np.float64(95.0), np.float32(1), np.int64(3), np.bool_(True), np.str_("x")],
    "numpy arrays": [
        np.arange(6.0).reshape(2, 3),
        np.ones((2, 2), order="F"),
        np.array(["a"]),
        np.array(3),
        np.zeros(0),
    ],
    "array of objects": np.array([None, "x", {}], dtype=object),
    "structured array": np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "dtypes": [np.dtype("float32"), np.float32, np.dtype(">i4"), torch.float16],
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, a=[1]),
    "default dict": collections.defaultdict(dict, a={"b": 1}),
    "counter": collections.Counter("aab"),
    "dates": [datetime.datetime(2024, 1, 2), datetime.timedelta(3), datetime.date(2024, 1, 2)],
    "set": {1, 2},
    "complex": 2j,
    "bytes": bytearray(b"x"),
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("kind", INERT)
def test_inert_objects_are_read(tmp_path, kind):
    assert_holds_state(
        save_and_load(tmp_path, {"state_dict": tensors(), "args": INERT[kind], "more": [{"x": INERT[kind]}]})
    )


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f4", "int64"])
def test_weights_as_numpy_arrays_are_read(tmp_path, kind):
    arrays = {name: np.asfortranarray(np.round(8 * x).astype(kind)) for name, x in state().items()}
    found = save_and_load(tmp_path, {"params": arrays})
    expected = torch_weights.from_torch({name: x.astype(np.float32) for name, x in arrays.items()}, NET, "x")[:2]
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.stats), expected)


class Options(argparse.Namespace):
    pass


class Attributes(dict):
    pass


class Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "make",
    [
        lambda canary: Options(lr=0.1),
        lambda canary: Attributes(lr=0.1),
        lambda canary: types.SimpleNamespace(lr=0.1),
        lambda canary: collections.deque([1]),
        lambda canary: slice(3),
        lambda canary: range(5),
        lambda canary: torch.nn.ReLU(),
        lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"),
        lambda canary: Calls(getattr, "x", "upper"),
        lambda canary: Calls(pathlib.Path.touch, canary),
        lambda canary: Calls(np.load, str(canary)),
        lambda canary: argparse.Namespace(inner=Calls(exec, f"open({str(canary)!r}, 'w')")),
        lambda canary: np.array([Calls(eval, f"open({str(canary)!r}, 'w')")], dtype=object),
        lambda canary: collections.defaultdict(eval),
        lambda canary: np.random.default_rng(0),
        lambda canary: print,
    ],
)
def test_other_objects_are_refused_and_not_executed(tmp_path, make):
    canary = tmp_path / "it_ran"
    with pytest.raises(
        InputError, match=r"resnet10\.pth: holds Python objects besides tensors.*refused.*state_dict\(\)"
    ) as caught:
        save_and_load(tmp_path, {"state_dict": tensors(), "x": make(canary)})
    assert "\n" not in str(caught.value) and not canary.exists()


def test_a_refused_class_is_named(tmp_path):
    with pytest.raises(InputError, match=r"\([\w.]*test_training_checkpoints\.Attributes\)"):
        save_and_load(tmp_path, {"state_dict": tensors(), "hyper_parameters": Attributes(lr=0.1)})


def write_pickle(path, program):
    """Writes a pickle as a zip file of torch."""
    with torch.serialization._open_zipfile_writer(str(path)) as archive:
        archive.write_record("data.pkl", program, len(program))
        archive.write_record("byteorder", b"little", 6)


def test_an_array_with_a_forged_dtype_is_not_read(tmp_path):
    """NumPy would interpret these bytes as the address of an object."""
    array = Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")
    address = (0x4141414141414141).to_bytes(8, "little")
    for kind, flags in (("O8", 0), ("O8", 63), ("f8", 63), ("V8", 63), ("U2", 0)):
        program = pickle.dumps({"x": array}, 2)
        dtype = pickle.dumps(Calls(np.dtype, kind, False, True), 2)[2:-1]
        dtype_state = b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK" + bytes([flags]) + b"tb"
        array_state = b"(K\x01K\x01\x85" + dtype + dtype_state + b"\x89" + pickle.dumps(address, 2)[2:-1] + b"tb"
        write_pickle(tmp_path / "resnet10.pth", program[:-2] + array_state + program[-2:])
        with contextlib.suppress(InputError):
            read = torch_files.read(tmp_path / "resnet10.pth")
            assert read["x"] is None or read["x"].dtype.kind in "fiub"


def test_a_file_that_contains_itself_is_read(tmp_path):
    contents = {"model": tensors()}
    contents["self"], contents["model"]["up"] = contents, contents
    assert_holds_state(save_and_load(tmp_path, contents))


# --- descriptions in files


def test_options_in_a_file_name_the_model(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    for options in (
        {"arch": "resnet10"},
        {"args": argparse.Namespace(arch="resnet10", lr=0.1)},
        {"hyper_parameters": {"model_name": "resnet10"}},
        {"config": {"model": "resnet10"}},
        {"opt": argparse.Namespace(backbone="resnet10")},
    ):
        found = save_and_load(tmp_path, {"state_dict": tensors(), **options}, name="last.ckpt", model=None)
        assert_holds_state(found)
    with pytest.raises(InputError, match=r"is a resnet10 according to its options \(resnet10\), not a resnet18"):
        save_and_load(tmp_path, {"state_dict": tensors(), **options}, model="resnet18")
    found = save_and_load(tmp_path, {"state_dict": tensors(), "arch": "resnet50"}, model=None)
    assert_holds_state(found)
    assert "Its options name a resnet50" in found.notes[0] and found.notes[0] in caplog.text
    assert save_and_load(
        tmp_path, {"model": tensors(zeros(TINY)), "arch": "visiontransformer"}, model="vit_tiny_patch4_32"
    ).has_head


def test_anti_aliased_and_dilated_networks_are_refused(tmp_path):
    for name in (
        "resnetaa50-4cf422b3.pth",
        "resnetblur50-84f4748f.pth",
        "antialiased_resnet10.pth",
        "resnet10_lpf3-a4e868d2.pth",
    ):
        with pytest.raises(InputError, match="is anti-aliased, which no model here is"):
            save_and_load(tmp_path, tensors(), name=name)
    with pytest.raises(InputError, match="is anti-aliased"):
        save_and_load(tmp_path, {"arch": "resnetblur18", "state_dict": tensors()})
    with pytest.raises(InputError, match="dilated stages"):
        save_and_load(
            tmp_path, {"args": argparse.Namespace(replace_stride_with_dilation=[False, True, True]), "model": tensors()}
        )
    assert_holds_state(
        save_and_load(tmp_path, {"args": {"replace_stride_with_dilation": [False] * 3}, "model": tensors()})
    )
    segmentation = tensors(prefix="backbone.") | {
        "classifier.0.weight": torch.ones(2, 64, 1, 1),
        "classifier.1.weight": torch.ones(2),
    }
    assert any("often dilated" in note for note in save_and_load(tmp_path, segmentation).notes)


def test_notes_are_sentences_and_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    found = save_and_load(tmp_path, tensors(criterion=np.ones(3)))
    assert len(found.notes) == 3 and found.preprocessing_is_guess
    for note in found.notes:
        assert caplog.text.count(note) == 1 and note.endswith(".") and note[0].isupper() and "\n" not in note
