"""Projections of contrastive files: kept on request, equal to torch's, and dropped where nothing trains them."""

import jax
import numpy as np
import pytest

from helpers.checkpoint_files import IMAGES, METADATA, saved, state
from helpers.torch_checkpoints import assert_holds_state, save_and_load, tensors
from jax_transfer.checkpoints import Checkpoint, at_image_size, export, load_checkpoint
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS, with_projection
from jax_transfer.records import InputError

RNG = np.random.default_rng(0)


def linear(features_in, features_out, position="", bias=True):
    """Returns a random linear layer in torch's layout; `position` is its place in a Sequential."""
    arrays = {"weight": RNG.normal(size=(features_out, features_in))}
    arrays |= {"bias": RNG.normal(size=features_out)} if bias else {}
    return {f"{position}.{name}".lstrip("."): (0.1 * x).astype(np.float32) for name, x in arrays.items()}


ONE = linear(64, 16)
TWO = linear(64, 32, "0") | linear(32, 16, "2")
THREE = linear(64, 32, "0", bias=False) | linear(32, 24, "2") | linear(24, 16, "4", bias=False)
NORMED = linear(64, 32, "0", bias=False) | {
    f"1.{name}": np.ones(32, np.float32) for name in ("weight", "bias", "running_mean", "running_var")
}


def contrastive(projection, network="module.encoder_q.", place="module.encoder_q.fc."):
    """Returns the weights of a contrastive file."""
    backbone = {network + name: x for name, x in state().items() if not name.startswith("fc.")}
    return backbone | {place + name: x for name, x in projection.items()}


def load(tmp_path, projection, *places, **options):
    path = saved(tmp_path / "moco.safetensors", contrastive(projection, *places))
    return load_checkpoint(path, "resnet10", keep_projection=True, **options)


def projected(features, projection):
    """Computes the projection of features with torch."""
    torch = pytest.importorskip("torch")
    layers, x = {name if "." in name else f"0.{name}": torch.tensor(a) for name, a in projection.items()}, features
    for i in sorted({name.split(".")[0] for name in layers}):
        x = torch.relu(x) if i != "0" else x
        x = torch.nn.functional.linear(x, layers[f"{i}.weight"], layers.get(f"{i}.bias"))
    return x.numpy()


@pytest.mark.parametrize("projection", [ONE, TWO, THREE], ids=["MoCo v1", "MoCo v2", "three layers"])
def test_kept_projections_equal_torch(tmp_path, projection):
    torch = pytest.importorskip("torch")
    from helpers import torch_twins

    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "cifar")
    _, features = torch_twins.twin_output(twin, IMAGES)
    weights = {f"module.encoder_q.{name}": x for name, x in twin.state_dict().items() if not name.startswith("fc.")}
    found = save_and_load(
        tmp_path,
        {"arch": "resnet10", "state_dict": weights | tensors(projection, "module.encoder_q.fc.")},
        keep_projection=True,
    )
    output = found.net.apply(found.params, found.stats, IMAGES)
    np.testing.assert_allclose(output.features, features, atol=1e-5)
    np.testing.assert_allclose(output.projection, projected(torch.tensor(features), projection), atol=1e-5)
    assert output.projection.dtype == np.float32


@pytest.mark.parametrize(
    "places",
    [
        ("module.encoder_q.", "module.encoder_q.fc."),
        ("backbone.", "projector."),
        ("backbone.", "backbone.fc."),
        ("module.encoder.", "module.head."),
        ("module.", "module.projection_head."),
        ("net.backbone.", "net.projector.module."),
        ("momentum_encoder.", "momentum_projector."),
        ("", "fc."),
    ],
)
def test_projections_are_found_as_the_head_and_beside_the_network(tmp_path, places):
    found = load(tmp_path, TWO, *places)
    np.testing.assert_array_equal(found.params["projection"]["2"]["kernel"], TWO["2.weight"].T)
    assert found.net is with_projection(MODELS["resnet10"](**{"num_classes": 1000, **found.settings}), (32, 16))
    assert not found.has_head and found.settings == {"width": 8, "stem": "cifar"}
    notes = " ".join(found.notes)
    assert "Its projection from 64 to 32 to 16 is kept; ReLU between its layers is assumed" in notes
    assert "Left out" not in notes


def test_the_rest_of_the_checkpoint_is_that_without_the_projection(tmp_path):
    kept = load(tmp_path, TWO)
    plain = load_checkpoint(tmp_path / "moco.safetensors", "resnet10")
    params = {name: tree for name, tree in kept.params.items() if name != "projection"}
    jax.tree.map(np.testing.assert_array_equal, (params, kept.stats), (plain.params, plain.stats))
    assert (kept.settings, kept.preprocessing, kept.has_head) == (plain.settings, plain.preprocessing, plain.has_head)
    assert plain.net.apply(plain.params, plain.stats, IMAGES).projection is None


def test_a_classifier_beside_a_projection_is_kept_too(tmp_path):
    weights = {"backbone." + name: x for name, x in state().items()} | {
        f"projector.{name}": x for name, x in TWO.items()
    }
    found = load_checkpoint(saved(tmp_path / "a.safetensors", weights), "resnet10", keep_projection=True)
    assert_holds_state(load_checkpoint(tmp_path / "a.safetensors", "resnet10"))
    assert found.has_head and found.net.num_classes == 5 and found.net.projection == (32, 16)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (NORMED | linear(32, 16, "3"), r"\(fc\): its projection holds 0.weight \[32, 64\], .*1.running_mean \[32\]"),
        (linear(64, 32, "0") | linear(32, 16, "1"), r"its projection holds .*1.weight \[16, 32\]"),
        (linear(64, 32, "0") | linear(32, 16, "3"), r"its projection holds .*3.weight"),
        (linear(64, 32, "0") | linear(31, 16, "2"), r"its projection holds .*2.weight \[16, 31\]"),
        (linear(63, 16), r"its projection holds .*weight \[16, 63\]"),
        ({"mlp.0.weight": TWO["0.weight"]}, r"its projection holds mlp.0.weight"),
        ({}, "holds no projection .its network has no head."),
    ],
)
def test_other_projections_are_refused(tmp_path, projection, message):
    with pytest.raises(InputError, match=message + ".*load it without keep_projection") as caught:
        load(tmp_path, projection)
    assert "\n" not in str(caught.value) and "moco.safetensors" in str(caught.value)


def test_files_without_a_projection_are_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", metadata=METADATA)
    with pytest.raises(InputError, match=r"a\.safetensors: holds no projection \(its head fc classifies\); load it wi"):
        load_checkpoint(path, keep_projection=True)
    two = contrastive(TWO, "backbone.", "projector.") | {f"student_proj.{name}": x for name, x in TWO.items()}
    saved(path, two)
    with pytest.raises(InputError, match="holds several projections, projector, student_proj; load it without"):
        load_checkpoint(path, "resnet10", keep_projection=True)


def test_epochs_are_refused(tmp_path):
    trajectory = Trajectory(tmp_path / "checkpoints")
    try:
        trajectory.save(3, {"params": {"w": np.ones(3, np.float32)}, "stats": {}}, {"step": np.int32(1)}, {})
    finally:
        trajectory.close()
    with pytest.raises(InputError, match="an epoch of a trajectory has no projection; load it without keep_projection"):
        load_checkpoint(tmp_path / "checkpoints/3", keep_projection=True)


def test_exported_projections_are_read_again(tmp_path):
    first = load(tmp_path, TWO)
    export(first, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors", keep_projection=True)
    assert again.net is first.net and not again.has_head
    jax.tree.map(np.testing.assert_array_equal, again.params["projection"], first.params["projection"])
    assert load_checkpoint(tmp_path / "b.safetensors").net.projection == ()


def test_a_transformer_keeps_its_projection_at_another_image_size():
    net = with_projection(MODELS["vit_tiny_patch4_32"](num_classes=3), (16,))
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params, stats = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    larger = at_image_size(Checkpoint("a", net, params, stats, Preprocessing(32)), 64)
    output = jax.eval_shape(larger.net.apply, larger.params, larger.stats, np.zeros((1, 64, 64, 3), np.float32))
    assert output.projection.shape == (1, 16)
