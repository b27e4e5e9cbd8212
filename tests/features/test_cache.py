"""Cached features equal a plain forward pass, and the file name depends on everything that determines them."""

import dataclasses

import jax
import numpy as np
import pytest

from helpers.training_parts import PREPROCESSING, assert_equal_trees
from jax_transfer import devices
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.batches import make_feed
from jax_transfer.data.source import from_arrays
from jax_transfer.features import cache
from jax_transfer.features.cache import FeatureCache
from jax_transfer.models import MODELS
from jax_transfer.records import Features

IMAGES = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3)).astype(np.uint8)
SOURCE = from_arrays(IMAGES, np.arange(30) % 3)


def make_cache(folder):
    mesh = devices.make_mesh()
    feeds = lambda source, preprocessing: make_feed(source, preprocessing, mesh, 1.0, 1)  # noqa: E731
    return FeatureCache(folder, feeds, mesh, batch_size=16)


@pytest.fixture(scope="module")
def checkpoint():
    net = MODELS["resnet10"](num_classes=3, stem="cifar", width=8)
    return Checkpoint("a", net, *net.init(jax.random.key(0)), PREPROCESSING, settings={"stem": "cifar", "width": 8})


def expected(checkpoint):
    pixels = (IMAGES / 255.0 - PREPROCESSING.mean) / PREPROCESSING.std
    return checkpoint.net.apply(checkpoint.params, checkpoint.stats, pixels)


@pytest.mark.parametrize("cached", [True, False])
def test_features_equal_a_plain_forward_pass(tmp_path, checkpoint, cached):
    found = make_cache(tmp_path if cached else None)(checkpoint, SOURCE)
    np.testing.assert_allclose(found.features, expected(checkpoint).features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.logits, expected(checkpoint).logits, rtol=1e-3, atol=1e-4)
    assert np.array_equal(found.labels, SOURCE.labels) and len(list(tmp_path.iterdir())) == cached


def test_cached_features_need_neither_weights_nor_images(tmp_path, checkpoint):
    before = make_cache(tmp_path)(checkpoint, SOURCE)

    def unreadable(*_):
        raise AssertionError("weights or images are read")

    stored = Checkpoint.stored(
        "b",
        checkpoint.net,
        unreadable,
        PREPROCESSING,
        settings=checkpoint.settings,
        known_fingerprint=checkpoint.fingerprint,
    )
    again = FeatureCache(tmp_path, unreadable, devices.make_mesh(), batch_size=16)(stored, SOURCE)
    assert_equal_trees(again, before)


def test_damaged_file_is_extracted_again(tmp_path, checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(cache.log, "propagate", True)
    features = make_cache(tmp_path)
    before, path = features(checkpoint, SOURCE), features.path(checkpoint, SOURCE)
    path.write_bytes(path.read_bytes()[:100])
    assert_equal_trees(features(checkpoint, SOURCE), before)
    assert f"{path} cannot be read" in caplog.text and cache.load(path) is not None


def test_file_name_depends_on_everything_that_determines_features(tmp_path, checkpoint):
    def path(source=SOURCE, **changes):
        return make_cache(tmp_path).path(dataclasses.replace(checkpoint, **changes), source)

    zeros = jax.tree.map(np.zeros_like, checkpoint.params)
    paths = {
        path(),
        path(params=zeros),
        path(settings={"width": 16}),
        path(preprocessing=dataclasses.replace(PREPROCESSING, mean=(0.0, 0.0, 0.0))),
        path(source=from_arrays(IMAGES[:20], np.arange(20) % 3)),
    }
    assert len(paths) == 5 and path(name="renamed") in paths


def test_files_of_another_version_are_ignored_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache.log, "propagate", True)
    nothing = Features(features=np.zeros((2, 3)), logits=np.zeros((2, 1)), labels=np.zeros(2, np.int32))
    for name in (f"v{cache.VERSION - 1}-a", "0123456789abcdef0123456789abcdef"):
        cache.save(tmp_path / f"{name}.npz", nothing)
    new = tmp_path / f"v{cache.VERSION}-a.npz"
    for _ in range(2):
        assert cache.load(new) is None
    assert caplog.text.count("holds 2 files of features that an earlier version extracted") == 1
    cache.save(new, nothing)
    assert cache.load(new) is not None
