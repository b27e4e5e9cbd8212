"""Descriptions of checkpoints from names, folders, configs and shapes, and what is assumed without them."""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from helpers.conv_checks import apply
from jax_transfer.checkpoints import describes_itself, expand, export, load_checkpoint, torch_weights
from jax_transfer.checkpoints.descriptions import released_as
from jax_transfer.checkpoints.released import is_release, named, released
from jax_transfer.checkpoints.torch_files import ENDINGS
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.models import MODELS, mobilenet, vit
from jax_transfer.models.resnet import STEMS
from jax_transfer.records import InputError

TINY = MODELS["vit_tiny_patch4_32"](num_classes=3, image_size=8)

# --- folders


def test_files_with_supported_extensions_are_listed(tmp_path):
    names = sorted([f"net{i}{ending}" for i, ending in enumerate(ENDINGS)] + ["LOUD.PTH"])
    for name in (
        *names,
        "notes.txt",
        "images.tar",
        "optimizer.pt",
        "training_args.bin",
        "scheduler.pt",
        "rng_state_0.pth",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in expand(tmp_path)] == names
    assert {".ckpt", ".pth.tar", ".bin"} < set(ENDINGS)


def test_a_hub_snapshot_is_one_checkpoint(tmp_path):
    path = hub(tmp_path / "x")
    for name in ("pytorch_model.bin", "model.pth"):
        (tmp_path / "x" / name).touch()
    assert expand(tmp_path / "x") == [path]
    assert load_checkpoint(tmp_path / "x").net is NET
    saved(tmp_path / "x" / "another.safetensors")
    with pytest.raises(InputError, match=r"holds 2 checkpoints; name one, such as .*another"):
        load_checkpoint(tmp_path / "x")


def test_a_model_is_recognised_through_links_of_a_hub_cache(tmp_path):
    repository = tmp_path / "models--timm--resnet10.a1_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    blob = saved(repository / "blobs" / "abc.safetensors")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    found = load_checkpoint(snapshot / "model.safetensors")
    assert found.net is NET and released_as(snapshot / "pytorch_model.bin")[0] == "resnet10"
    assert expand(repository) == [snapshot / "model.safetensors"] == expand(snapshot)
    assert load_checkpoint(repository).net is NET


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "nets").mkdir()
    path = saved(tmp_path / "nets" / "a.safetensors", metadata=METADATA)
    found = load_checkpoint("~/nets/a.safetensors")
    assert found.net is NET and describes_itself("~/nets/a.safetensors")
    assert expand("~/nets") == [path] and expand(pathlib.Path("~/nets/a.safetensors")) == [path]
    export(found, "~/nets/b.safetensors")
    assert (tmp_path / "nets" / "b.safetensors").is_file()
    with pytest.raises(InputError, match="~nobody"):
        load_checkpoint("~nobody-of-this-name/a.safetensors")


# --- names of releases

# name -> (image size, side after resizing, interpolation, red mean), from timm's configurations
TAGS = {
    "resnet50.a1_in1k": (224, 235, "bicubic", 0.485),
    "resnet50_a1_0-14fe96d1.pth": (224, 235, "bicubic", 0.485),
    "resnet18.a2_in1k": (224, 235, "bicubic", 0.485),
    "resnet34.a3_in1k": (160, 168, "bicubic", 0.485),
    "resnet152.a1h_in1k": (224, 235, "bicubic", 0.485),
    "resnet50.a1h_in1k": (176, 195, "bicubic", 0.485),
    "resnet50.ra_in1k": (224, 256, "bicubic", 0.485),
    "resnet50_ram-a26f946b.pth": (224, 256, "bicubic", 0.485),
    "resnet50.tv_in1k": (224, 256, "bilinear", 0.485),
    "resnet101.tv2_in1k": (176, 201, "bilinear", 0.485),
    "resnet50-11ad3fa6.pth": (224, 232, "bilinear", 0.485),
    "resnet50.gluon_in1k": (224, 256, "bicubic", 0.485),
    "gluon_resnet50_v1b-0ebe02e2.pth": (224, 256, "bicubic", 0.485),
    "resnet50.c1_in1k": (224, 235, "bicubic", 0.485),
    "resnet50.b2k_in1k": (224, 235, "bicubic", 0.485),
    "resnet50.d_in1k": (224, 235, "bicubic", 0.485),
    "resnet18.fb_swsl_ig1b_ft_in1k": (224, 256, "bilinear", 0.485),
    "resnet50.am_in1k": (224, 256, "bicubic", 0.485),
    "semi_supervised_resnet50-08389792.pth": (224, 256, "bilinear", 0.485),
    "resnet34.bt_in1k": (224, 256, "bicubic", 0.485),
    "resnet34.ra4_e3600_r224_in1k": (224, 248, "bicubic", 0.5),
    "inception_v3.tf_in1k": (299, 341, "bicubic", 0.5),
    "inception_v3.gluon_in1k": (299, 341, "bicubic", 0.485),
    "inception_v4.tf_in1k": (299, 341, "bicubic", 0.5),
    "mobilenetv1_125.ra4_e3600_r224_in1k": (224, 248, "bicubic", 0.5),
    "mobilenetv2_050.lamb_in1k": (224, 256, "bicubic", 0.485),
    "vit_small_patch16_224.dino": (224, 248, "bicubic", 0.485),
    "vit_base_patch16_384.augreg_in1k": (384, 384, "bicubic", 0.5),
    "deit_base_patch16_384.fb_in1k": (384, 384, "bicubic", 0.485),
    "vit-s-300ep.pth.tar": (224, 256, "bilinear", 0.485),
    "resnet50.bamboo": (224, 224, "bicubic", 0.485),
}


@pytest.mark.parametrize("name", TAGS)
def test_the_tag_of_a_release_determines_its_preprocessing(name):
    found = released(name)[1]
    assert (found.image_size, found.host_size, found.interpolation, found.mean[0]) == TAGS[name]


@pytest.mark.parametrize(
    "name",
    ["resnet50.a1_in1k", "resnet50-0676ba61.pth", "vit_base_patch16_224.augreg_in21k", "resnet50_ram-a26f946b.pth"],
)
def test_names_of_releases_are_recognised(name):
    assert is_release(name)


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.pth",
        "resnet50_mine.pth",
        "resnet18_20240131.pth",
        "resnet50_epoch_10.pth",
        "my_in1k.pth",
        "vgg16-397923af.pth",
    ],
)
def test_similar_names_are_not_releases(name):
    assert not is_release(name)


def test_preprocessing_from_a_similar_name_is_a_guess(tmp_path):
    found = zeros(MODELS["resnet18"](num_classes=3, width=4))
    for name, guessed in (
        ("resnet18-f37072fd", False),
        ("resnet18.a3_in1k", False),
        ("resnet18_run7", True),
        ("run7", True),
    ):
        checkpoint = load_checkpoint(saved(tmp_path / f"{name}.safetensors", found), "resnet18")
        assert checkpoint.preprocessing_is_guess == guessed
        assert any("are a guess from" in note for note in checkpoint.notes) == guessed
    described = load_checkpoint(saved(tmp_path / "a.safetensors", metadata=METADATA))
    assert not described.preprocessing_is_guess and described.notes == ()
    timms = load_checkpoint(hub(tmp_path / "x"))
    assert not timms.preprocessing_is_guess and not any("guess" in note for note in timms.notes)


# --- timm's config.json


def test_an_older_flat_config_is_read(tmp_path):
    flat = {"architecture": "resnet10", "num_classes": 5, **TIMM_CONFIG["pretrained_cfg"]}
    expected = load_checkpoint(hub(tmp_path / "new")).preprocessing
    found = load_checkpoint(hub(tmp_path / "old", config=flat))
    assert found.preprocessing == expected and not found.preprocessing_is_guess


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        ("resnet10", {"global_pool": "max"}, "global_pool 'max'"),
        ("resnet10", {"global_pool": "catavgmax"}, "the features of resnet10 here are 'avg'"),
        ("resnet10", {"model_args": {"output_stride": 8}}, "change the network by output_stride"),
        ("resnet10", {"model_args": {"aa_layer": "blurpool", "stem_type": "deep"}}, "by aa_layer, stem_type"),
        ("vit", {"global_pool": "avg"}, "the features of vit_tiny_patch4_32 here are 'token'"),
        ("vit", {"model_args": {"global_pool": "map"}}, "'map'"),
        ("vit", {"model_args": {"num_heads": 7}}, "expected a divisor of 192"),
        ("resnet10", {"model_args": 3}, "model_args are 3"),
    ],
)
def test_a_config_of_a_different_network_is_refused(tmp_path, model, changed, message):
    config = {**TIMM_CONFIG, **changed} | ({"architecture": "vit_tiny_patch4_32"} if model == "vit" else {})
    path = hub(tmp_path / "x", config=config)
    saved(path, zeros(TINY) if model == "vit" else state())
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_config_with_equivalent_settings_is_accepted(tmp_path):
    plain = {"global_pool": "avg", "model_args": {"output_stride": 32, "drop_rate": 0.1, "num_classes": 5}}
    assert load_checkpoint(hub(tmp_path / "x", config={**TIMM_CONFIG, **plain})).net is NET
    config = {
        "architecture": "vit_tiny_patch4_32",
        "global_pool": "token",
        "model_args": {"num_heads": 6, "img_size": 8},
    }
    path = hub(tmp_path / "y", config=config)
    assert load_checkpoint(saved(path, zeros(TINY))).settings["num_heads"] == 6


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_another_crop_mode_is_noted(tmp_path, mode):
    config = {**TIMM_CONFIG, "pretrained_cfg": {**TIMM_CONFIG["pretrained_cfg"], "crop_mode": mode}}
    note, *_ = load_checkpoint(hub(tmp_path / "x", config=config)).notes
    assert f"crop_mode {mode!r}" in note and "config.json" in note


# --- shapes


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2"])
def test_the_width_of_a_mobilenet_follows_from_its_channels(model):
    for width in (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1, 1.2, 1.25, 1.3, 1.4, 2.0, 3.0):
        channels = mobilenet._channels(model, width)
        assert mobilenet._channels(model, mobilenet.width_of(model, channels)) == channels
    assert mobilenet.width_of(model, {**channels, next(iter(channels)): 11}) is None
    assert mobilenet.width_of(model, {"conv1.weight": 64}) is None


@pytest.mark.parametrize(("model", "width"), [("mobilenet_v1", 0.25), ("mobilenet_v2", 0.35), ("mobilenet_v2", 1.4)])
def test_a_mobilenet_of_another_width_is_read(tmp_path, model, width):
    net = MODELS[model](num_classes=3, width=width)
    weights = {name: np.zeros(shape, np.float32) for name, shape in torch_weights.expected_shapes(net).items()}
    found = load_checkpoint(saved(tmp_path / "a.safetensors", weights), model)
    assert found.net is net and found.settings["width"] == width
    stem = next(name for name, x in weights.items() if x.ndim == 4 and x.shape[1] == 3)
    with pytest.raises(InputError, match=f"does not fit {model}: differs: "):
        load_checkpoint(saved(tmp_path / "a.safetensors", weights | {stem: np.zeros((11, 3, 3, 3), np.float32)}), model)


# --- settings that weights do not show


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem not in ("imagenet", "cifar")])
def test_rare_stems_equal_their_twins_if_requested(tmp_path, stem):
    torch = pytest.importorskip("torch")
    from helpers import torch_twins

    size, stride, pool, _ = STEMS[stem]
    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "imagenet" if size == 7 else "cifar")
    twin.conv1.stride, twin.maxpool = (stride, stride), torch.nn.MaxPool2d(3, 2, 1) if pool else torch.nn.Identity()
    images = np.tile(IMAGES, (1, 2, 2, 1))
    logits, features = torch_twins.twin_output(twin, images)
    torch.save(twin.state_dict(), tmp_path / "mine.pth")
    found = load_checkpoint(tmp_path / "mine.pth", "resnet10", settings={"stem": stem})
    assert found.net is load_checkpoint(tmp_path / "mine.pth", f"resnet10?stem={stem}").net
    output = apply(found.net, found.params, found.stats, images)
    np.testing.assert_allclose(output.features, features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4)
    assert found.net.min_image_size == 8 * stride * (1 + pool)
    assumed = load_checkpoint(tmp_path / "mine.pth", "resnet10").notes
    assert any("assumed" in note and "settings={'stem'" in note for note in assumed)
    assert not any("assumed" in note for note in found.notes)
    export(found, tmp_path / "again.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")
    assert again.net is found.net and again.notes == ()


@pytest.fixture
def shallow(monkeypatch):
    """ViT-S with 2 blocks; the original has 12."""
    small = functools.partial(vit._vit, "vit_small_patch16_224", vit.Size(384, 2, 6), 16, 224)
    spec = dataclasses.replace(MODELS["vit_small_patch16_224"], make=small)
    monkeypatch.setitem(MODELS, "vit_small_patch16_224", spec)


def moco_v3(heads, arch="vit_small", **more):
    torch = pytest.importorskip("torch")
    from helpers import torch_twins_vit

    twin = torch_twins_vit.random(torch_twins_vit.VisionTransformer(384, 2, heads, 16, 32, 5))
    trunk = {name: x for name, x in twin.state_dict().items() if not name.startswith("head.")}
    weights = {f"module.base_encoder.{name}": x for name, x in trunk.items()} | {
        "module.base_encoder.head.0.weight": torch.ones(4, 4)
    }
    weights |= {f"module.momentum_encoder.{name}": torch.zeros_like(x) for name, x in trunk.items()}
    return twin, {"arch": arch, "state_dict": weights | {"module.predictor.0.weight": torch.ones(4, 4)}, **more}


@pytest.mark.parametrize(("heads", "model"), [(12, None), (6, "vit_small_patch16_224?num_heads=6")])
def test_a_moco_v3_vit_has_12_heads_by_default(tmp_path, shallow, heads, model):
    torch = pytest.importorskip("torch")
    from helpers.torch_twins import twin_output

    twin, contents = moco_v3(heads)
    torch.save(contents, tmp_path / "vit-s-300ep.pth.tar")
    found = load_checkpoint(tmp_path / "vit-s-300ep.pth.tar", model)
    images = np.tile(IMAGES, (1, 2, 2, 1))
    _, features = twin_output(twin, images)
    output = apply(found.net, found.params, found.stats, images)
    assert np.abs(output.features - features).max() < 1e-4 * np.abs(features).max()
    assert found.settings["num_heads"] == heads and not found.has_head
    assert (found.preprocessing.mean[0], found.preprocessing.interpolation) == (0.485, "bilinear")
    assert any("MoCo v3's ViT-S, which has 12" in note for note in found.notes) == (heads == 12)
    export(found, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").net is found.net


def test_attention_heads_are_read_from_the_file_or_assumed(tmp_path, shallow):
    torch = pytest.importorskip("torch")
    _, contents = moco_v3(6)
    trunk = {
        name.removeprefix("module.base_encoder."): x
        for name, x in contents["state_dict"].items()
        if "base_encoder" in name and "head" not in name
    }
    linear = {"arch": "vit_small", "state_dict": {f"module.{name}": x for name, x in trunk.items()}}
    dino = {
        "student": {},
        "teacher": {f"backbone.{name}": x for name, x in trunk.items()},
        "args": {"arch": "vit_small"},
    }
    configured = {"model": trunk, "config": {"num_heads": 4}}
    cases = (
        ("linear-mine.pth", linear, 12, "MoCo v3"),
        ("mine.pth", dino, 6, "6 attention heads are assumed"),
        ("mine.pth", configured, 4, "options specify 4"),
        ("vit_small_patch16_224.augreg_in1k.bin", trunk, 6, ""),
    )
    for name, contents, heads, expected in cases:
        torch.save(contents, tmp_path / name)
        checkpoint = load_checkpoint(tmp_path / name, "vit_small_patch16_224")
        assert checkpoint.settings.get("num_heads", 6) == heads, name
        assert any("heads" in note for note in checkpoint.notes) == bool(expected)
        assert expected in " ".join(checkpoint.notes)


def test_unknown_settings_are_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    for settings in ({"heads": 6}, {"stem": "4x4"}, {"width": "wide"}, {"width": 16}, {"num_heads": 6}):
        with pytest.raises(InputError, match=r"a\.safetensors|stem"):
            load_checkpoint(path, "resnet10", settings=settings)
    assert named("vit_small_patch16_224?num_heads=12&dropout=0.5&x=y") == (
        "vit_small_patch16_224",
        {"num_heads": 12, "dropout": 0.5, "x": "y"},
    )


# --- heads that are not over classes


def test_metadata_state_whether_the_head_is_over_classes(tmp_path):
    for stated, head in ((False, False), (True, True), (None, True)):
        metadata = {**DESCRIBED, **({} if stated is None else {"has_head": stated})}
        path = saved(tmp_path / "a.safetensors", metadata={"jax_transfer": json.dumps(metadata)})
        assert load_checkpoint(path).has_head == head
    with pytest.raises(InputError, match="has_head is 'no'"):
        metadata = {"jax_transfer": json.dumps({**DESCRIBED, "has_head": "no"})}
        load_checkpoint(saved(tmp_path / "a.safetensors", metadata=metadata))


TRAINING = {
    "opt_state": {"count": np.zeros(())[()].astype(np.float32)},
    "step": np.int32(7),
    "key": jax.random.key_data(jax.random.key(0)),
}


def test_an_export_keeps_has_head_of_an_epoch(tmp_path):
    run = Trajectory(tmp_path / "checkpoints")
    for epoch, fields in ((1, {"has_head": False}), (2, {})):
        run.save(epoch, {"params": PARAMS, "stats": STATS}, TRAINING, {**DESCRIBED, **fields})
    run.close()
    first, second = (load_checkpoint(tmp_path / "checkpoints" / str(epoch)) for epoch in (1, 2))
    assert not first.has_head and second.has_head
    export(first, tmp_path / "a.safetensors")
    assert not load_checkpoint(tmp_path / "a.safetensors").has_head


# --- the keys of a training state


def save_and_restore(folder, *kept):
    run = Trajectory(folder)
    run.save(1, *kept, {})
    run.wait()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = run.restore(1, *(abstract(jax.tree.map(jnp.asarray, tree), sharding) for tree in kept))
    run.close()
    return found


def test_a_trajectory_restores_all_keys_of_both_trees(tmp_path):
    more = {
        "queue": jnp.arange(3.0), "aux": {"momentum": {"w": jnp.ones(2)}, "none": None},
        "count": 3, "flag": True, "rate": 1e30, "bytes": np.ones(2, np.uint8),
        "list": [jnp.ones(1), jnp.zeros(2)], "half": jnp.ones(2, jnp.bfloat16),
    }  # fmt: skip
    model = {"params": {"w": jnp.ones(2)}, "stats": {"m": jnp.zeros(1)}}
    for i, average in enumerate(({}, {"params": {"w": jnp.zeros(2)}, "stats": {"m": jnp.ones(1)}})):
        kept = {**TRAINING, **more, **average}
        found = save_and_restore(tmp_path / str(i), model, kept)
        assert set(found[1]) == set(kept)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(jnp.asarray, (model, kept)))


@pytest.mark.parametrize(
    "value", ["text", np.arange(2), 2**40, object(), np.array(["a"]), jax.random.key(0), np.ones(2)]
)
@pytest.mark.parametrize("where", ["extra", "params"])
def test_unsupported_values_in_a_trajectory_are_named(tmp_path, where, value):
    run = Trajectory(tmp_path)
    model = {"params": {"w": jnp.ones(2)} if where == "extra" else {"x": value}, "stats": {}}
    training = {**TRAINING, **({"extra": {"x": value}} if where == "extra" else {})}
    with pytest.raises(InputError, match=f"cannot hold {where}/.*x of type"):
        run.save(1, model, training, {})
    assert run.epochs() == []
    run.close()
