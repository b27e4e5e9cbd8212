"""What every objective must do. The tests run over OBJECTIVES: a new one needs only a line in `helpers.objectives`."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.objectives import SMALL
from helpers.training_parts import structured_source, tiny_net, tiny_vit
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import divide, init_state, join
from jax_transfer.training.steps import make_train_step, many_steps

PREPROCESSING = Preprocessing(image_size=24)
STEPS = 20


def make(name, augment=("color_jitter",)):
    """Returns an objective and its net, which has a head only if the objective needs one."""
    if name == "mae":  # hides patches
        return OBJECTIVES[name](tiny_vit(), augment, **SMALL[name]), tiny_vit()
    net = tiny_net(batch_norm=True)
    if not OBJECTIVES[name](net, augment, **SMALL[name]).has_head:
        net = tiny_net(num_classes=0, batch_norm=True)
    return OBJECTIVES[name](net, augment, **SMALL[name]), net


def source_with_captions():
    tokens = np.random.default_rng(1).integers(3, 300, (32, 1, 6)).astype(np.int32)
    tokens[..., 0], tokens[..., -1] = 1, 2
    return structured_source(extra={"tokens": tokens})


@pytest.fixture(scope="module", params=OBJECTIVES)
def trained(request):
    """An objective with its net, the form of its first state, and what STEPS steps on 32 images give."""
    objective, net = make(request.param)
    feed = make_feed(source_with_captions(), PREPROCESSING, devices.make_mesh())
    feeds = joined({name: (feed, size) for name, size in zip(objective.views, (16, 8), strict=False)})
    optimizer = make_optimizer(OptimizerSettings("adam", learning_rate=0.01), 100, objective.groups)
    run = many_steps(make_train_step(objective, optimizer, PREPROCESSING, feeds.num_classes), feeds.fetch, feed.mesh)
    state = devices.replicate(init_state(objective, optimizer, 0), feed.mesh)
    form, losses, metrics = jax.eval_shape(lambda: state), [], {}
    for epoch in train(state, run, feeds, seed=3, total_steps=STEPS, what="test"):
        state, metrics = epoch.state, epoch.metrics
        losses += metrics["loss"].tolist()
    return types.SimpleNamespace(
        name=request.param, objective=objective, net=net, form=form, state=state, losses=losses, metrics=metrics
    )


def test_each_objective_has_small_settings():
    assert set(SMALL) == set(OBJECTIVES)
    for name, make_objective in OBJECTIVES.items():
        assert set(SMALL[name]) <= set(inspect.signature(make_objective).parameters) - {"net", "augment"}


def test_loss_falls_in_twenty_steps(trained):
    """That of moco_v2 first rises, until keys of images have replaced the random ones in the queue."""
    first = 4 if trained.name == "moco_v2" else 0
    assert np.isfinite(trained.losses).all() and len(trained.losses) == STEPS
    assert np.mean(trained.losses[-4:]) < 0.95 * np.mean(trained.losses[first : first + 4])


def test_state_keeps_its_form_and_is_finite(trained):
    assert jax.eval_shape(lambda: trained.state) == trained.form
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.state))


def test_accuracy_is_a_metric_only_with_a_head(trained):
    assert ("accuracy" in trained.metrics) == trained.objective.has_head
    assert all(len(np.shape(values)) == 1 and np.isfinite(values).all() for values in trained.metrics.values())


def test_model_is_that_of_the_net_and_is_stored_once(trained):
    model, rest = divide(trained.objective, trained.state)
    params, stats = jax.eval_shape(trained.net.init, jax.random.key(0))
    assert jax.eval_shape(lambda: model) == {"params": params, "stats": stats}
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model, rest, trained.state)]
    assert sizes[0] + sizes[1] == sizes[2]
    whole = join(trained.objective, trained.form, model, rest)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, whole, trained.state))


def test_each_parameter_is_in_a_group(trained):
    groups = trained.objective.groups(trained.state["params"])
    assert jax.tree.structure(groups) == jax.tree.structure(trained.state["params"])
    assert {"backbone"} <= set(jax.tree.leaves(groups)) <= {"backbone", "head"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_starts_from_a_given_model(name):
    objective, net = make(name)
    given = dict(zip(("params", "stats"), net.init(jax.random.key(7)), strict=True))
    model = objective.model(*objective.init(jax.random.key(0), given))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, model, given))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_initialisation_depends_on_the_key_alone(name):
    objective, _ = make(name)
    init = jax.jit(lambda seed: objective.init(jax.random.key(seed), None))
    first, again, other = init(0), init(0), init(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first[0], other[0])
    assert any(jax.tree.leaves(differ))
