"""Masked autoencoding: which patches the net sees, and the error of those that it does not see."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from helpers.training_parts import tiny_net, tiny_vit
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.source import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.models.mae_decoder import masked_decoder
from jax_transfer.records import InputError, Views
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.objectives.mae import draw_visible, patch_values
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

SIZE, PATCH, N, M = 16, 4, 16, 4  # pixels, pixels, patches, visible ones
DECODER = {"decoder_layers": 1, "decoder_width": 24, "decoder_heads": 2}


NET = tiny_vit(SIZE, PATCH)


def some_images(b=3):
    return np.random.default_rng(0).normal(size=(b, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    """Returns parameters of the net, all of them random, so that every position matters."""
    rng = np.random.default_rng(1)
    params, _ = jax.eval_shape(NET.init, jax.random.key(0))
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


def encode(params, images, kept):
    return np.asarray(NET.encode_train(params, {}, images, np.asarray(kept), jax.random.key(0)))


# --- what the net sees


def test_encoding_all_patches_equals_the_whole_net(weights):
    """In any order, since positions are added to the patches before."""
    order = np.array([np.random.default_rng(i).permutation(N) for i in range(3)])
    tokens = encode(weights, some_images(), order)
    assert tokens.shape == (3, 1 + N, 12) and tokens.dtype == np.float32
    np.testing.assert_allclose(tokens[:, 0], NET.apply(weights, {}, some_images()).features, atol=1e-5)
    straight = encode(weights, some_images(), np.tile(np.arange(N), (3, 1)))
    np.testing.assert_allclose(tokens[:, 1:], np.take_along_axis(straight[:, 1:], order[..., None], 1), atol=1e-5)


def test_tokens_depend_on_the_kept_patches_alone(weights):
    images, kept = some_images(), np.array([[0, 5, 10, 15], [1, 2, 3, 7], [15, 8, 4, 12]])
    before = encode(weights, images, kept)
    for i, j in np.ndindex(3, N):
        changed = images.copy()
        row, column = divmod(j, SIZE // PATCH)
        changed[i, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] += 1
        equal = np.isclose(encode(weights, changed, kept), before, atol=1e-6).all((1, 2))
        assert equal.tolist() == [k != i or j not in kept[i] for k in range(3)]


def test_visible_patches_are_drawn_uniformly_and_places_invert_the_order():
    kept, places = map(np.asarray, draw_visible(jax.random.key(0), 4000, N, M))
    assert kept.shape == (4000, M) and (np.sort(places, 1) == np.arange(N)).all()
    np.testing.assert_array_equal(np.take_along_axis(places, kept, 1), np.tile(np.arange(M), (4000, 1)))
    counts = np.bincount(kept.ravel(), minlength=N)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_values_of_patches_equal_a_loop():
    images = some_images()
    images[0, :PATCH, :PATCH] = 0.7  # one colour
    found = np.asarray(patch_values(images, PATCH))
    for i, j in np.ndindex(3, N):
        row, column = divmod(j, SIZE // PATCH)
        patch = images[i, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)].astype(np.float64)
        expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        np.testing.assert_allclose(found[i, j], expected.ravel(), atol=1e-3)


# --- the loss


@pytest.fixture(scope="module")
def trial(weights):
    objective, key = OBJECTIVES["mae"](NET, (), **DECODER), jax.random.key(5)
    params, aux = jax.device_get(objective.init(jax.random.key(0), {"params": weights, "stats": {}}))
    views = {"train": Views((some_images(),), np.zeros(3, np.int32), np.ones(3, bool))}
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    return objective, params, aux, views, key, step


def test_loss_is_the_mean_error_of_the_hidden_patches(trial):
    _, params, aux, views, key, step = trial
    (value, (new_aux, _)), gradient = step(params, aux, views, key)
    kept, places = map(np.asarray, draw_visible(jax.random.split(key)[0], 3, N, M))
    decoder = masked_decoder(token_dim=12, grid=(4, 4), outputs=3 * PATCH**2, width=24, layers=1, heads=2)
    tokens = encode(params["net"], some_images(), kept)
    predicted = np.asarray(decoder.apply(params["decoder"], {}, (tokens, places)))
    target, errors = np.asarray(patch_values(some_images(), PATCH)), []
    for i, j in np.ndindex(3, N):
        if j not in kept[i]:
            errors.append(np.mean((predicted[i, j] - target[i, j]) ** 2))
    assert len(errors) == 3 * (N - M)
    assert value == pytest.approx(np.mean(errors), rel=1e-4) and new_aux == aux
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_model_is_the_whole_net_and_the_decoder_is_head(trial):
    objective, params, aux, *_ = trial
    model = objective.model(params, aux)
    assert model["params"] is params["net"] and set(NET.shapes) == {
        "params/" + "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(model["params"])
    }
    groups = objective.groups(params)
    assert set(jax.tree.leaves(groups["net"])) == {"backbone"} and set(jax.tree.leaves(groups["decoder"])) == {"head"}


@pytest.mark.parametrize("name", ["resnet10", "t2t_vit_14"])
def test_nets_without_patches_are_refused(name):
    net = MODELS[name](num_classes=0) if name != "resnet10" else tiny_net(num_classes=0)
    message = rf"^objective mae hides patches from a vision transformer, not from {net.name}: use a vit_\* model\.$"
    with pytest.raises(InputError, match=message):
        OBJECTIVES["mae"](net, ())


@pytest.mark.parametrize(("ratio", "visible"), [(0.99, 0), (0.01, 16)])
def test_some_patches_are_hidden_and_some_visible(ratio, visible):
    with pytest.raises(
        InputError, match=rf"^mask_ratio = {ratio}: {visible} of the 16 patches of vit would be visible"
    ):
        OBJECTIVES["mae"](NET, (), mask_ratio=ratio, **DECODER)


# --- training

PREPROCESSING = Preprocessing(image_size=SIZE)


def training(settings):
    """Returns the compiled steps on images of smooth waves, their feed and the first state."""
    rng, line = np.random.default_rng(0), np.linspace(0, 6, SIZE)
    phases = rng.uniform(0, 3, size=(32, 2, 1, 1, 3))
    waves = np.sin(line[:, None, None] + phases[:, 0]) + np.sin(line[:, None] + phases[:, 1])
    images = (127 + 60 * waves).astype(np.uint8)
    objective = OBJECTIVES["mae"](NET, ("flip",), **DECODER)
    feed = make_feed(from_arrays(images, np.zeros(32, np.int32)), PREPROCESSING, devices.make_mesh())
    feeds, optimizer = joined({"train": (feed, 16)}), make_optimizer(settings, 100, objective.groups)
    step = make_train_step(objective, optimizer, PREPROCESSING, feeds.num_classes)
    state = devices.replicate(init_state(objective, optimizer, 0), feed.mesh)
    return many_steps(step, feeds.fetch, feed.mesh), feeds, state


def losses_and_state(run, feeds, state, steps):
    losses = []
    for epoch in train(state, run, feeds, seed=3, total_steps=steps, what="test"):
        state = epoch.state
        losses += epoch.metrics["loss"].tolist()
    return losses, state


def numbers_and_exchanges():
    """Returns three losses and the size of the parameters then, and what the devices exchange except for sums."""
    run, feeds, state = training(OptimizerSettings(learning_rate=0.05))
    (item,) = feeds.items(range(1), 1, 0)
    program = run.lower(state, feeds.held, item, 1).compile().as_text()
    exchanged = re.findall(r"f32\[[\d,]*\]\S* (?:all-gather|all-to-all|collective-permute)\(", program)
    losses, state = losses_and_state(run, feeds, state, 3)
    return [*losses, float(sum(abs(x).sum() for x in jax.tree.leaves(state["params"])))], exchanged


ON_DEVICES = """
import json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax
import test_mae as t
print(json.dumps([jax.device_count(), *t.numbers_and_exchanges()]))
"""


@pytest.mark.slow
def test_training_is_equal_on_one_and_four_devices_which_exchange_no_tokens():
    found = []
    for count in (1, 4):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", ON_DEVICES]
        done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **flags}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (one, alone, _), (four, together, exchanged) = found
    assert (one, four, exchanged) == (1, 4, [])
    np.testing.assert_allclose(alone, together, rtol=1e-4)
