"""Adding a model takes one module and one entry in MODELS: a toy model is pre-trained, loaded and ranked."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jax_transfer as jt
from jax_transfer.checkpoints import Checkpoint, describes_itself, export, load_checkpoint
from jax_transfer.checkpoints.released import architecture, released_preprocessing
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS, Output, Spec, make_net, with_new_head
from jax_transfer.models.layers import conv, gaussian_head, global_mean
from jax_transfer.records import InputError
from jax_transfer.study import checks
from jax_transfer.study import pretrain as pretrain_stage
from jax_transfer.study.config import default_config
from jax_transfer.study.workspace import Workspace

DATA = "embedded:digits?train=160&test=40"
RELEASED = Preprocessing(8, 1.0, (0.3,) * 3, (0.4,) * 3)


class Toy(nnx.Module):
    """Patches, a hidden layer, their mean, and a linear head with a name that no other model uses."""

    def __init__(self, num_classes: int, width: int, rngs: nnx.Rngs):
        self.patches = conv(3, width, 4, 4, jnp.float32, rngs, padding=0)
        self.hidden = nnx.Linear(width, width, kernel_init=gaussian_head, rngs=rngs)
        self.answer = nnx.Linear(width, num_classes, kernel_init=gaussian_head, rngs=rngs)

    def __call__(self, images, train: bool, rngs: nnx.Rngs | None = None) -> Output:
        maps = self.patches(images)
        maps = maps + self.hidden(nnx.relu(maps))
        features = global_mean(maps)
        return Output(self.answer(features), features, maps, projection=features[:, :2])


def toy(num_classes, dtype="float32", width=16):
    return _build(num_classes, int(width))


@functools.cache
def _build(num_classes, width):
    sizes = {"num_classes": num_classes, "feature_dim": width, "min_image_size": 4}
    return make_net("toy", functools.partial(Toy, num_classes, width), classifier=("answer",), **sizes)


def width_shown(state):
    return {"width": len(state["hidden.weight"])} if "hidden.weight" in state else {}


@pytest.fixture(autouse=True)
def _in_models(monkeypatch):
    released = {"toy": RELEASED, "toynet_small": RELEASED}
    spec = Spec(toy, 4, patch=4, released=released, architectures=("toy_arch",), settings_from_shapes=width_shown)
    monkeypatch.setitem(MODELS, "toy", spec)


def test_it_is_a_valid_net_with_and_without_a_head():
    assert MODELS["toy"](5) is toy(5) and MODELS["toy"].takes("width") and not MODELS["toy"].takes("stem")
    assert inspect.signature(MODELS["toy"]) == inspect.signature(toy)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    (params, stats), (whole, _) = toy(0).init(jax.random.key(0)), toy(5).init(jax.random.key(0))
    assert whole.keys() - params.keys() == {"answer"}
    output, expected = toy(0).apply(params, stats, images), toy(5).apply(whole, stats, images)
    assert output.logits.shape == (3, 0) and output.logits.dtype == jnp.float32
    assert output.maps.shape == (3, 2, 2, 16) and output.projection.shape == (3, 2)
    np.testing.assert_array_equal(output.features, expected.features)
    again = toy(5).apply(with_new_head(params, toy(5), jax.random.key(2)), stats, images)
    np.testing.assert_array_equal(again.features, expected.features)


def test_its_files_are_recognised_by_metadata_name_and_arch(tmp_path):
    settings = {"width": 8}
    params, stats = toy(5, width=8).init(jax.random.key(0))
    export(Checkpoint("mine", toy(5, width=8), params, stats, RELEASED, settings=settings), tmp_path / "a.safetensors")
    assert describes_itself(tmp_path / "a.safetensors")
    state = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    safetensors.numpy.save_file(state, tmp_path / "toynet_small-0123abcd.safetensors")
    for name in ("a.safetensors", "toynet_small-0123abcd.safetensors"):
        found = load_checkpoint(tmp_path / name)
        assert found.net is toy(5, width=8) and found.has_head and found.preprocessing == RELEASED and found.notes == ()
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert architecture("toy_arch") == "toy" and released_preprocessing("toy") == RELEASED


def test_studies_and_rankings_accept_it(tmp_path):
    config = default_config()
    config.model.name, config.model.width, config.preprocessing.image_size = "toy", 8.0, 8
    config.source.dataset, config.targets = DATA, (DATA,)
    config.pretrain.epochs, config.pretrain.batch_size, config.pretrain.augment = 1, 32, ()
    config.finetune.batch_size = 32
    checks.check(config)
    config.preprocessing.image_size = 3
    with pytest.raises(InputError, match=r"does not suit toy, which needs at least 4 pixels: use a larger size\."):
        checks.check(config)
    config.preprocessing.image_size = 8
    work = Workspace(config, tmp_path)
    pretrain_stage.run(work)
    work.close()
    headless = Checkpoint("mine", toy(0), *toy(0).init(jax.random.key(0)), RELEASED, settings={"num_classes": 0})
    export(headless, tmp_path / "headless.safetensors")
    checkpoints = ("random:toy?width=8", tmp_path / "checkpoints" / "1", tmp_path / "headless.safetensors")
    ranking = jt.rank(checkpoints, DATA, scores=("logme", "leep"))
    assert [row.model for row in ranking.rows] == ["toy"] * 3 and not any(row.error for row in ranking.rows)
    found = {row.checkpoint: row for row in ranking.rows}
    assert all(math.isfinite(row.scores["logme"]) for row in ranking.rows)
    assert [name for name, row in found.items() if math.isfinite(row.scores["leep"])] == ["checkpoints/1"]
    assert found["random toy?width=8"].preprocessing == RELEASED
