"""The cosine head: logits against numpy, and what is new when a checkpoint gets one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.models.cosine import with_cosine_head, with_new_cosine_head, without_cosine_head
from jax_transfer.models.resnet import resnet10
from jax_transfer.training.objectives import OBJECTIVES

HEADLESS = resnet10(num_classes=0, width=8, stem="cifar")
IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("embedding_dim", [None, 7])
def test_logits_are_scaled_cosines_of_the_embedding(embedding_dim):
    net = with_cosine_head(HEADLESS, 3, embedding_dim)
    params, stats = net.init(jax.random.key(1))
    params["cosine"]["scale"] = jnp.float32(4.0)
    h = np.asarray(HEADLESS.apply(without_cosine_head(params), stats, IMAGES).features, np.float64)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["cosine"])
    u = h @ head["embedding"]["kernel"] + head["embedding"]["bias"] if embedding_dim else h
    f, w = u / np.linalg.norm(u, axis=1, keepdims=True), head["kernel"] / np.linalg.norm(head["kernel"], axis=0)
    for output in (net.apply(params, stats, IMAGES), net.apply(params, stats, IMAGES)):
        np.testing.assert_allclose(output.features, f, atol=2e-6)
        np.testing.assert_allclose(output.logits, 4 * f @ w, atol=2e-5)


def test_shapes_are_those_of_the_parameters():
    net = with_cosine_head(HEADLESS, 3, 7)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    found = {
        f"{kind}/{'/'.join(key.key for key in path)}": leaf.shape
        for kind, tree in (("params", params), ("stats", stats))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert found == net.shapes


def test_training_changes_the_scale_and_every_part_of_the_head_but_keeps_its_features_unit():
    net = with_cosine_head(HEADLESS, 2, 5)
    objective = OBJECTIVES["supervised"](net, ())
    params, aux = objective.init(jax.random.key(0), None)
    views = {"train": type("Views", (), {"images": (jnp.asarray(IMAGES),), "labels": jnp.arange(6) % 2})}
    gradient = jax.grad(lambda params: objective.loss(params, aux, views, jax.random.key(0))[0])(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["cosine"]))
    labels = objective.groups(params)
    assert set(jax.tree.leaves(labels["cosine"])) == {"head"} and labels["conv1"]["kernel"] == "backbone"
    output, _ = net.apply_train(params, aux["stats"], IMAGES, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(output.features, axis=1), 1, atol=1e-6)


def test_a_new_head_depends_on_its_key_alone_and_keeps_the_backbone():
    net = with_cosine_head(HEADLESS, 2, 5)
    backbone, _ = HEADLESS.init(jax.random.key(3))
    first, again, other = (with_new_cosine_head(backbone, jax.random.key(seed), net) for seed in (0, 0, 1))
    assert float(first["cosine"]["scale"]) == 10 and not np.any(first["cosine"]["embedding"]["bias"])
    np.testing.assert_array_equal(first["cosine"]["kernel"], again["cosine"]["kernel"])
    assert np.any(first["cosine"]["kernel"] != other["cosine"]["kernel"])
    assert without_cosine_head(first) is not first and without_cosine_head(first).keys() == backbone.keys()
