"""Nets without a head over classes: logits have no columns, and only scores of logits are undefined."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer import devices
from jax_transfer.analysis import SCORES, Score, score_all, score_gigaflops, why_undefined
from jax_transfer.data.batches import make_feed
from jax_transfer.data.source import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import cache, extract
from jax_transfer.models.net import Output
from jax_transfer.records import Features, InputError

RNG = np.random.default_rng(0)
Y = (np.arange(48) % 3).astype(np.int32)
X = (RNG.normal(size=(3, 4))[Y] + RNG.normal(size=(48, 4))).astype(np.float32)
HEADLESS = Features(X, np.zeros((48, 0), np.float32), Y)
WITH_HEAD = Features(X, X @ RNG.normal(size=(4, 5)).astype(np.float32), Y)


def stacked(features):
    return jax.tree.map(lambda leaf: leaf[None], features)


@pytest.mark.parametrize("name", SCORES)
def test_only_scores_of_logits_need_a_head(name):
    if SCORES[name].needs != "logits":
        assert jax.eval_shape(lambda features: SCORES[name](features, 3), HEADLESS).shape == ()
        return
    assert np.isnan(score_all(name, stacked(HEADLESS), 3)).all()
    assert "this score needs a classification head" in why_undefined(name, HEADLESS, 3)
    for function in (SCORES[name], lambda *arguments: score_gigaflops(name, *arguments)):
        with pytest.raises(InputError, match=r"^logits has the shape \[48, 0\].*needs a classification head"):
            function(HEADLESS, 3)


@pytest.mark.parametrize("name", ("logme", "h_score", "linear_1"))
def test_scores_of_features_do_not_depend_on_the_head(name):
    value = score_all(name, stacked(HEADLESS), 3)
    assert np.isfinite(value).all()
    np.testing.assert_array_equal(value, score_all(name, stacked(WITH_HEAD), 3))
    assert score_gigaflops(name, HEADLESS, 3) == score_gigaflops(name, WITH_HEAD, 3) > 0


def test_a_score_may_use_neither_features_nor_logits(monkeypatch):
    monkeypatch.setitem(SCORES, "images", Score(lambda x, y, num_classes: jnp.float32(len(y)), needs=""))
    assert score_all("images", stacked(HEADLESS), 3) == [48]
    assert SCORES["images"].x(HEADLESS) is None


def test_features_are_extracted_cached_and_stacked(tmp_path):
    def apply(params, stats, images):
        features = images.mean((1, 2))
        return Output(features[:, :0], features)

    mesh, preprocessing = devices.make_mesh(), Preprocessing(8)
    images = RNG.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    feed = make_feed(from_arrays(images, np.arange(10) % 3), preprocessing, mesh, 1.0, 1)
    forward = extract.make_forward(types.SimpleNamespace(apply=apply), preprocessing, mesh)
    found = extract.extract(forward, {"params": {}, "stats": {}}, feed, 8)
    assert found.features.shape == (10, 3) and found.logits.shape == (10, 0)
    assert extract.problem(found, 3) == ""
    cache.save(tmp_path / "v2-a.npz", found)
    jax.tree.map(np.testing.assert_array_equal, cache.load(tmp_path / "v2-a.npz"), found)
    together = extract.stack([found, found])
    assert together.features.shape == (2, 10, 3) and together.logits.shape == (2, 10, 0)
