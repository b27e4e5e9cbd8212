"""The objectives without labels, or with a few: rotations, patches and exemplars."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.images import write_images
from helpers.objectives import SMALL
from helpers.source_files import REPOSITORY, get_config
from helpers.training_parts import CLASSES, structured_source, tiny_net
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.records import InputError, Views
from jax_transfer.study import checks
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.objectives.jigsaw import distant_permutations
from jax_transfer.training.objectives.patches import cut_patches, standardise
from jax_transfer.training.objectives.relative_patch import NEIGHBOURS
from jax_transfer.training.objectives.rotation import four_rotations
from jax_transfer.training.objectives.triplet import batch_hard_triplet_loss, semi_hard_triplet_loss
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import divide, init_state
from jax_transfer.training.steps import make_train_step, many_steps

PRETEXT = ("rotation", "relative_patch", "jigsaw", "exemplar", "sup_exemplar", "semi_rotation", "semi_exemplar")
WITH_LABELS = ("sup_exemplar", "semi_rotation", "semi_exemplar")
SQUARES = Preprocessing(image_size=24)
NUM_TRAIN, NUM_LABELLED = 8, 4


def net_for(name, make=tiny_net):
    return make(num_classes=CLASSES if name in WITH_LABELS else 0)


def make(name, augment=(), net=None):
    return OBJECTIVES[name](net or net_for(name), augment, **SMALL[name])


def some_views(objective):
    """Returns random views of 12 pixels of the feeds of an objective, each image with a colour of its own."""
    rng, sizes = np.random.default_rng(3), {"train": NUM_TRAIN, "labelled": NUM_LABELLED}

    def images(n):
        return (2 * rng.normal(size=(n, 1, 1, 3)) + rng.normal(size=(n, 12, 12, 3))).astype(np.float32)

    return {
        feed: Views(
            tuple(images(sizes[feed]) for _ in views),
            (np.arange(sizes[feed]) % CLASSES).astype(np.int32),
            np.ones(sizes[feed], bool),
        )
        for feed, views in objective.views.items()
    }


def cross_entropy(logits, labels):
    """Returns the mean of -log softmax(logits)[labels], in float64."""
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_probabilities[np.arange(len(labels)), labels].mean()


def affine(layer, x):
    return np.asarray(x, np.float64) @ layer["kernel"] + layer["bias"]


# --- the parts


def test_rotations_equal_numpy_and_stay_beside_each_other():
    images = np.random.default_rng(0).normal(size=(3, 5, 5, 2))
    rotated = np.asarray(four_rotations(jnp.asarray(images, jnp.float32))).reshape(3, 4, 5, 5, 2)
    for i, turns in itertools.product(range(3), range(4)):
        np.testing.assert_array_equal(rotated[i, turns], np.rot90(images[i], turns).astype(np.float32))


@pytest.mark.parametrize(("size", "cell", "patch"), [(255, 85, 64), (224, 74, 56), (32, 10, 8), (9, 3, 2)])
def test_patches_are_windows_at_every_place_of_their_cells(size, cell, patch):
    """Pixels hold their own row and column, so that a patch shows where it was cut."""
    b = 2 if size > 100 else 60
    places = np.stack(np.meshgrid(range(size), range(size), indexing="ij"), -1).astype(np.float32)
    cut = np.asarray(cut_patches(jax.random.key(0), jnp.asarray(np.broadcast_to(places, (b, *places.shape))), 0.25))
    assert cut.shape == (9 * b, patch, patch, 2)
    corners = cut[:, 0, 0]
    np.testing.assert_array_equal(cut, corners[:, None, None] + places[:patch, :patch])
    grid = np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(9, 2)
    offsets = corners.reshape(b, 9, 2) - cell * grid
    assert offsets.min() >= 0 and offsets.max() <= cell - patch
    if b > 2:  # all offsets occur in all cells along both axes, and independently
        assert all(len(np.unique(offsets[:, i, axis])) == cell - patch + 1 for i in range(9) for axis in range(2))
        assert len(np.unique(offsets.reshape(-1, 2), axis=0)) == (cell - patch + 1) ** 2


def test_patches_without_jitter_are_the_cells_and_tiny_images_are_refused():
    images = jnp.arange(2 * 9 * 9.0).reshape(2, 9, 9, 1)
    cut = cut_patches(jax.random.key(1), images, jitter=0.0)
    np.testing.assert_array_equal(cut[9 + 5], images[1, 3:6, 6:9])
    assert cut_patches(jax.random.key(1), images, jitter=0.99).shape == (18, 1, 1, 1)
    with pytest.raises(InputError, match="2x2 pixels cannot be cut into 3x3 patches: use larger ones"):
        cut_patches(jax.random.key(0), images[:, :2, :2], jitter=0.0)


def test_standardised_images_equal_numpy_and_one_colour_becomes_zero():
    images = np.random.default_rng(0).normal(3, 2, size=(3, 5, 4, 3)).astype(np.float32)
    images[0] = 0.3
    found = np.asarray(standardise(jnp.asarray(images)))
    expected = [(x - x.mean()) / x.std() for x in images[1:].astype(np.float64)]
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    assert np.abs(found[0]).max() < 1e-3


def test_neighbours_surround_the_centre():
    assert sorted(NEIGHBOURS[:, 0].tolist()) == [0, 1, 2, 3, 5, 6, 7, 8] and set(NEIGHBOURS[:, 1]) == {4}


def test_permutations_are_chosen_greedily():
    """A slow reference compares each permutation with all those chosen so far."""
    every = list(itertools.permutations(range(5)))
    chosen = [every[0]]
    while len(chosen) < 20:
        distances = {p: [sum(a != b for a, b in zip(p, q, strict=True)) for q in chosen] for p in every}
        chosen.append(max(every, key=lambda p: (min(distances[p]), sum(distances[p]), -every.index(p))))
    np.testing.assert_array_equal(distant_permutations(20, 5), chosen)


def test_hundred_permutations_of_patches_differ_in_most_places():
    permutations = distant_permutations(100)
    assert permutations.shape == (100, 9) and (np.sort(permutations) == np.arange(9)).all()
    distances = (permutations[:, None] != permutations[None]).sum(-1)[~np.eye(100, dtype=bool)]
    assert distances.min() >= 6 and distances.mean() > 7.9


def triplets(embeddings, margin):
    """Returns the semi-hard and the batch-hard loss by loops over anchors and positives."""
    x = np.asarray(embeddings, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    semi_hard, batch_hard = [], []
    for i, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        others = [d for d in range(x.shape[1]) if d != c]
        positives = [((x[i, c] - x[i, d]) ** 2).sum() for d in others]
        negatives = ((x[i, c] - np.delete(x, i, 0).reshape(-1, x.shape[2])) ** 2).sum(1)
        for p in positives:
            farther = negatives[negatives > p]
            semi_hard.append(max(0, margin + p - (farther.min() if len(farther) else negatives.max())))
        batch_hard.append(np.log1p(np.exp(max(positives) ** 0.5 - min(negatives) ** 0.5)))
    return np.mean(semi_hard), np.mean(batch_hard)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_triplet_losses_equal_loops(spread):
    """With a small spread all copies are near each other, with a large one some have no negative that is farther."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, 1, 4)) + spread * rng.normal(size=(5, 3, 4))
    found = (semi_hard_triplet_loss(embeddings, 0.5), batch_hard_triplet_loss(embeddings))
    np.testing.assert_allclose(found, triplets(embeddings, 0.5), rtol=1e-5)


def test_triplet_losses_have_finite_gradients_at_equal_embeddings():
    for loss in (functools.partial(semi_hard_triplet_loss, margin=0.5), batch_hard_triplet_loss):
        for embeddings in (jnp.ones((3, 2, 4)), jnp.zeros((3, 2, 4))):
            value, gradient = jax.value_and_grad(loss)(embeddings)
            assert np.isfinite(value) and np.isfinite(gradient).all()


# --- the losses of the objectives


def outputs(net, params, images):
    return jax.device_get(net.apply(params["net"], {}, images))


def expected_loss(name, net, params, views, key):
    """Computes the loss from the net's outputs for each batch of images by itself; the net has no BatchNorm."""
    settings, head, images = SMALL[name], params["head"], views["train"].images
    if name.endswith("rotation"):
        by_turn = [outputs(net, params, np.rot90(images[0], k, axes=(1, 2))).features for k in range(4)]
        of_rotations = np.mean([cross_entropy(affine(head, f), np.full(len(f), k)) for k, f in enumerate(by_turn)])
        if name == "rotation":
            return of_rotations
        turned = [np.rot90(views["labelled"].images[0], k, axes=(1, 2)) for k in range(4)]
        labels = views["labelled"].labels
        of_labels = np.mean([cross_entropy(outputs(net, params, x).logits, labels) for x in turned])
        return of_labels + settings["weight"] * of_rotations
    if "exemplar" in name:
        embeddings = np.stack([affine(head, outputs(net, params, x).features) for x in images], 1)
        semi_hard, batch_hard = triplets(embeddings, 0.5)
        if name == "exemplar":
            return semi_hard
        labelled = views.get("labelled", views["train"])
        logits = [outputs(net, params, x).logits for x in labelled.images]
        return np.mean([cross_entropy(x, labelled.labels) for x in logits]) + settings["weight"] * batch_hard
    _, key_cut, key_draw = jax.random.split(key, 3)
    tuples = NEIGHBOURS if name == "relative_patch" else distant_permutations(settings["permutations"])
    patches = np.asarray(standardise(cut_patches(key_cut, images[0], 0.25)))
    embedded = affine(head["embedding"], outputs(net, params, patches).features).reshape(NUM_TRAIN, 9, -1)
    losses = []
    drawn = np.asarray(jax.random.permutation(key_draw, len(tuples)))[: settings.get("permutations_per_step", 8)]
    for choice in drawn:
        joined_patches = np.concatenate([embedded[:, patch] for patch in tuples[choice]], 1)
        logits = affine(head["output"], np.maximum(affine(head["hidden"], joined_patches), 0))
        losses.append(cross_entropy(logits, np.full(NUM_TRAIN, choice)))
    return np.mean(losses)


@pytest.mark.parametrize("name", PRETEXT)
def test_loss_equals_numpy(name):
    net = net_for(name)
    objective = make(name, net=net)
    params, aux = jax.device_get(objective.init(jax.random.key(0), None))
    views, key = some_views(objective), jax.random.key(5)
    loss, (new_aux, metrics) = jax.jit(objective.loss)(params, aux, views, key)
    assert loss == pytest.approx(expected_loss(name, net, params, views, key), rel=1e-4)
    assert jax.tree.structure(new_aux) == jax.tree.structure(aux)
    assert ("accuracy" in metrics) == objective.has_head == (name in WITH_LABELS)
    for metric, value in metrics.items():
        assert value.shape == () and (not metric.endswith("accuracy") or 0 <= value <= 1)


@pytest.mark.parametrize("name", ["relative_patch", "jigsaw"])
def test_small_patches_are_enlarged_for_nets_of_a_fixed_image_size(name):
    net = MODELS["vit_tiny_patch16_224"](num_classes=0, image_size=16)
    objective = make(name, net=net)
    params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
    views = {"train": Views((jnp.zeros((2, 16, 16, 3)),), jnp.zeros(2, int), jnp.ones(2, bool))}
    loss, _ = jax.eval_shape(objective.loss, params, aux, views, jax.random.key(0))
    assert loss.shape == ()


@pytest.mark.parametrize("name", PRETEXT)
def test_model_is_the_net_alone_and_selects_leaves(name):
    net = net_for(name, functools.partial(tiny_net, batch_norm=True))
    params, stats = net.init(jax.random.key(1))
    objective = make(name, net=net)
    model = objective.model(*objective.init(jax.random.key(0), {"params": params, "stats": stats}))
    assert model["params"] is params and model["stats"] is stats
    model, rest = divide(objective, init_state(objective, make_optimizer(OptimizerSettings(), 10), 0))
    assert jax.tree.structure(model) == jax.tree.structure({"params": params, "stats": stats})
    assert "head" in rest["params"]


@pytest.mark.parametrize("name", PRETEXT)
def test_all_heads_are_in_the_group_head(name):
    objective = make(name)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), None)
    groups = objective.groups(params)
    in_net = {"fc": {"bias": "head", "kernel": "head"}} if name in WITH_LABELS else {}
    assert groups["net"] == {"conv": {"bias": "backbone", "kernel": "backbone"}, **in_net}
    assert set(jax.tree.leaves(groups["head"])) == {"head"}


@pytest.mark.parametrize("name", ["exemplar", "sup_exemplar", "semi_exemplar"])
def test_exemplars_refuse_mixed_images_and_a_batch_of_one(name):
    with pytest.raises(InputError, match=f"objective {name} compares single images, .* by 'mixup': leave it out"):
        make(name, ("flip", "mixup"))
    objective = make(name)
    params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
    alone = jax.tree.map(lambda x: x[:1], some_views(objective))
    with pytest.raises(InputError, match=r"a batch has 1 of 3 copies: use a batch_size and copies of at least 2, and"):
        jax.eval_shape(objective.loss, params, aux, alone, jax.random.key(0))


# --- training


SGD = OptimizerSettings(learning_rate=0.05)  # keeps the size of differences by rounding


def training(name):
    """Returns the compiled steps of an objective on a tiny net with BatchNorm, its feeds and its first state."""
    net = net_for(name, functools.partial(tiny_net, batch_norm=True))
    objective = make(name, ("color_jitter",), net)
    feed = make_feed(structured_source(), SQUARES, devices.make_mesh())
    feeds = joined({name: (feed, size) for name, size in zip(objective.views, (16, 8), strict=False)})
    optimizer = make_optimizer(SGD, 100, objective.groups)
    step = make_train_step(objective, optimizer, SQUARES, feeds.num_classes)
    state = devices.replicate(init_state(objective, optimizer, 0), feed.mesh)
    return many_steps(step, feeds.fetch, feed.mesh), feeds, state


def losses_and_state(run, feeds, state, steps):
    losses = []
    for epoch in train(state, run, feeds, seed=3, total_steps=steps, what="test"):
        state = epoch.state
        losses += epoch.metrics["loss"].tolist()
    return losses, state


ON_DEVICES = """
import json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax
import test_pretext as t
print(json.dumps([jax.device_count(), *t.numbers_and_exchanges(sys.argv[1])]))
"""


def numbers_and_exchanges(name):
    """Returns three losses and the size of the parameters then, and the shapes of what the devices exchange for them.

    Sums over the devices are not counted as an exchange.
    """
    run, feeds, state = training(name)
    (item,) = feeds.items(range(1), 1, 0)
    program = run.lower(state, feeds.held, item, 1).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program)
    losses, state = losses_and_state(run, feeds, state, 3)
    return [*losses, float(sum(abs(x).sum() for x in jax.tree.leaves(state["params"])))], shapes


def on_devices(name, count):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_DEVICES, name]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETEXT)
def test_training_is_equal_on_one_and_four_devices_which_exchange_no_images(name):
    (one, alone, _), (four, together, exchanged_arrays) = on_devices(name, 1), on_devices(name, 4)
    assert (one, four) == (1, 4)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert all(
        len(shape.split(",")) <= 3 for shape in exchanged_arrays
    )  # embeddings, but nothing with height and width


# --- studies


def configure(objective, labelled="embedded:digits?train=160&test=64&fraction=0.5"):
    config = get_config("quickstart", "smoke")
    config.source.dataset = "embedded:digits?train=160&test=64"
    config.pretrain.objective = objective
    config.pretrain.feeds = {"labelled": {"dataset": labelled, "batch_size": 8}} if "semi" in objective else {}
    return config


def test_a_labelled_feed_must_have_the_classes_of_the_source(tmp_path):
    checks.check_data(Workspace(configure("semi_rotation"), tmp_path / "right"))
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 10)
    work = Workspace(configure("semi_rotation", f"folder:{tmp_path / 'images'}"), tmp_path / "wrong")
    message = r"^config\.pretrain\.feeds\.labelled\.dataset = folder:\S+ has 2 classes, which are not the 10 of \S+ in"
    with pytest.raises(InputError, match=message):
        checks.check_data(work)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("exemplar.copies", 1, r"config\.pretrain\.exemplar\.copies = 1: must lie in \[2, 100\]"),
        ("jigsaw.permutations_per_step", 101, r"must lie between 0 and permutations = 100"),
        ("relative_patch.jitter", 1.0, r"config\.pretrain\.relative_patch\.jitter = 1\.0: must lie in \[0, 1\)"),
        ("semi_rotation.weight", -1.0, r"config\.pretrain\.semi_rotation\.weight = -1\.0: must not be negative"),
    ],
)
def test_settings_are_checked(field, value, message):
    config = configure(field.partition(".")[0])
    config.update_from_flattened_dict({f"pretrain.{field}": value})
    with pytest.raises(InputError, match=message):
        checks.check(config)
