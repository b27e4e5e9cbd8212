"""The objectives of fine-tuning that reuse pre-training data: joint, weak_strong and cotuning."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.training_parts import CLASSES as TARGET_CLASSES
from helpers.training_parts import PREPROCESSING, tiny_net
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.sources import load_source
from jax_transfer.models import MODELS
from jax_transfer.models.net import Output
from jax_transfer.records import InputError, Views
from jax_transfer.training.objectives import OBJECTIVES, REUSE
from jax_transfer.training.objectives.parts import in_one_pass
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

SOURCE_CLASSES = 6
NUM_TARGET, NUM_SOURCE = 8, 12


plain_net = tiny_net
batch_norm_net = functools.partial(tiny_net, batch_norm=True)


def given(name, net, source_classes=SOURCE_CLASSES, classes=TARGET_CLASSES):
    """Returns the arguments of an objective besides net, augment and source_weight; arrays are random."""
    rng = np.random.default_rng(5)
    values = {
        "num_source_classes": source_classes,
        "head_std": 0.1,
        "relationship": rng.dirichlet(np.ones(source_classes), classes).astype(np.float32),
        "source_head": {
            "kernel": 0.3 * rng.normal(size=(net.feature_dim, source_classes)).astype(np.float32),
            "bias": 0.3 * rng.normal(size=source_classes).astype(np.float32),
        },
    }
    return {argument: values[argument] for argument in (*REUSE[name].settings, *REUSE[name].arrays)}


def make(name, net, augment=(), weight=0.7):
    return REUSE[name].make(net, augment, source_weight=weight, **given(name, net))


def images(seed, n):
    return np.random.default_rng(seed).normal(size=(n, 8, 8, 3)).astype(np.float32)


def some_views(objective):
    """Returns random views of the feeds of an objective."""
    sizes, classes = {"train": NUM_TARGET, "source": NUM_SOURCE}, {"train": TARGET_CLASSES, "source": SOURCE_CLASSES}
    return {
        feed: Views(
            tuple(images(10 * len(feed) + i, sizes[feed]) for i in range(len(views))),
            (np.arange(sizes[feed]) % classes[feed]).astype(np.int32),
            np.ones(sizes[feed], bool),
        )
        for feed, views in objective.views.items()
    }


def gradient(objective, params, aux, views):
    """Returns (loss, (aux, metrics)) and the gradient by the parameters."""
    compute = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    return compute(params, aux, views, jax.random.key(3))


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def cross_entropy(logits, targets):
    """Returns the mean over the rows of -sum targets * log softmax(logits), in float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(np.asarray(targets, np.float64) * log_probabilities).sum(1).mean()


def probabilities(logits):
    exponents = np.exp(np.asarray(logits, np.float64))
    return exponents / exponents.sum(1, keepdims=True)


# --- what each of them needs and computes


@pytest.mark.parametrize("name", REUSE)
def test_reuse_lists_the_arguments_and_the_feeds_of_the_objective(name):
    reuse = REUSE[name]
    parameters = inspect.signature(reuse.make).parameters
    assert set(parameters) == {"net", "augment", "source_weight", *reuse.settings, *reuse.arrays}
    objective = make(name, plain_net(), ("flip",))
    assert next(iter(objective.views)) == "train"
    assert len(objective.views.get("source", ())) == reuse.source_views
    assert all(view[0] == "flip" for views in objective.views.values() for view in views)
    assert name not in OBJECTIVES  # a config must not pre-train with it


@pytest.mark.parametrize("name", REUSE)
def test_model_is_the_net_alone_and_starts_from_the_given_one(name):
    net = batch_norm_net()
    params, stats = net.init(jax.random.key(1))
    objective = make(name, net)
    model = objective.model(*objective.init(jax.random.key(0), {"params": params, "stats": stats}))
    assert model["params"] is params and model["stats"] is stats


@pytest.mark.parametrize("name", REUSE)
def test_loss_equals_numpy(name):
    net, weight = plain_net(), 0.7
    objective = make(name, net, weight=weight)
    params, aux = jax.device_get(objective.init(jax.random.key(0), None))
    views = some_views(objective)
    (loss, (_, metrics)), _ = jax.device_get(gradient(objective, params, aux, views))

    def outputs(view):
        return jax.device_get(net.apply(params.get("net", params), {}, view))

    labels = views["train"].labels
    target = outputs(views["train"].images[0])
    source_head = params.get("source_head")
    if name == "joint":
        logits = outputs(views["source"].images[0]).features @ source_head["kernel"] + source_head["bias"]
        of_source = cross_entropy(logits, np.eye(SOURCE_CLASSES)[views["source"].labels])
        right = np.argmax(logits, 1) == views["source"].labels
        assert metrics["source_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    elif name == "weak_strong":
        weak, strong = (outputs(view).logits for view in views["source"].images)
        of_source = cross_entropy(strong, probabilities(weak))
    else:
        logits = target.features @ source_head["kernel"] + source_head["bias"]
        of_source = cross_entropy(logits, given(name, net)["relationship"][labels])
    of_target = cross_entropy(target.logits, np.eye(TARGET_CLASSES)[labels])
    assert loss == pytest.approx(of_target + weight * of_source, rel=1e-5)
    assert metrics["source_loss"] == pytest.approx(of_source, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((np.argmax(target.logits, 1) == labels).mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["joint", "cotuning"])
def test_loss_is_linear_in_the_weights_of_mixed_labels(name):
    objective = make(name, plain_net())
    params, aux = objective.init(jax.random.key(0), None)
    views, classes = some_views(objective), {"train": TARGET_CLASSES, "source": SOURCE_CLASSES}
    mixed, losses = {}, []
    for feed, seen in views.items():
        hard = np.eye(classes[feed], dtype=np.float32)[seen.labels]
        mixed[feed] = dataclasses.replace(seen, labels=0.7 * hard + 0.3 * hard[::-1])
    for order in (1, -1):
        reordered = {f: dataclasses.replace(seen, labels=seen.labels[::order]) for f, seen in views.items()}
        losses.append(float(objective.loss(params, aux, reordered, jax.random.key(0))[0]))
    loss, _ = objective.loss(params, aux, mixed, jax.random.key(0))
    assert float(loss) == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_cotuning_starts_from_the_head_of_the_checkpoint_and_trains_it():
    objective = make("cotuning", plain_net())
    params, aux = objective.init(jax.random.key(0), None)
    jax.tree.map(np.testing.assert_array_equal, params["source_head"], given("cotuning", plain_net())["source_head"])
    _, gradients = gradient(objective, params, aux, some_views(objective))
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients["source_head"]))


@pytest.mark.parametrize("std", [0.01, (2 / 2048) ** 0.5])
def test_new_source_head_is_normal_with_zero_bias(std):
    objective = REUSE["joint"].make(plain_net(), (), source_weight=1.0, num_source_classes=2000, head_std=std)
    params, _ = objective.init(jax.random.key(0), None)
    kernel = np.asarray(params["source_head"]["kernel"])
    assert kernel.std() == pytest.approx(std, rel=0.02) and abs(kernel.mean()) < 0.02 * std
    assert not np.any(params["source_head"]["bias"])
    other, _ = objective.init(jax.random.key(1), None)
    assert np.any(other["source_head"]["kernel"] != kernel)


# --- gradients


def test_joint_without_weight_has_the_gradients_of_plain_fine_tuning():
    net = plain_net()
    objective, plain = make("joint", net, weight=0.0), OBJECTIVES["supervised"](net, ())
    params, aux = objective.init(jax.random.key(0), None)
    views = some_views(objective)
    (loss, _), gradients = gradient(objective, params, aux, views)
    (expected, _), of_plain = gradient(plain, params["net"], aux, {"train": views["train"]})
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_close(gradients["net"], of_plain, 1e-7)
    assert all(not np.any(g) for g in jax.tree.leaves(gradients["source_head"]))
    assert max(np.abs(g).max() for g in jax.tree.leaves(of_plain)) > 1e-2


@pytest.mark.parametrize("name", ["joint", "weak_strong"])
def test_order_of_the_images_in_the_pass_changes_nothing(name):
    """With the whole pass reversed, the images of the source come first."""
    net = batch_norm_net()

    def apply_train(params, stats, images, key):
        output, stats = net.apply_train(params, stats, images[::-1], key)
        return jax.tree.map(lambda x: x[::-1], output), stats

    found = []
    for own in (net, dataclasses.replace(net, apply_train=apply_train)):
        objective = make(name, own)
        params, aux = objective.init(jax.random.key(0), None)
        found.append(gradient(objective, params, aux, some_views(objective)))
    assert_close(found[0], found[1])


def test_order_of_the_batches_changes_nothing():
    net = batch_norm_net()
    params, stats = net.init(jax.random.key(0))
    batches = [images(0, 6), images(1, 4), images(2, 6)]
    forward, new = in_one_pass(net, params, stats, batches, jax.random.key(0))
    backward, other = in_one_pass(net, params, stats, batches[::-1], jax.random.key(0))
    assert_close((forward, new), (backward[::-1], other))
    assert [len(output.logits) for output in forward] == [6, 4, 6]


@pytest.mark.parametrize("name", ["joint", "weak_strong"])
def test_batch_norm_sees_all_views(name):
    net = batch_norm_net()
    objective = make(name, net)
    params, aux = objective.init(jax.random.key(0), None)
    views = some_views(objective)
    _, (new, _) = objective.loss(params, aux, views, jax.random.key(0))
    together = np.concatenate([view for feed in views.values() for view in feed.images])
    own = params["net"] if name == "joint" else params
    _, expected = net.apply_train(own, aux["stats"], together, jax.random.key(0))
    assert_close(new["stats"], expected)
    _, of_target = net.apply_train(own, aux["stats"], views["train"].images[0], jax.random.key(0))
    assert np.abs(of_target["bn"]["mean"] - expected["bn"]["mean"]).max() > 1e-4


def test_groups_of_batch_norm_hold_images_of_each_batch_in_proportion():
    seen = []
    net = dataclasses.replace(
        plain_net(), apply_train=lambda params, stats, x, key: (seen.append(x), (Output(x, x), stats))[1]
    )
    batches = [jnp.full((8, 1), 0), jnp.full((8, 1), 1), jnp.full((4, 1), 2)]
    outputs, _ = in_one_pass(net, {}, {}, batches, jax.random.key(0))
    for group in seen[0].reshape(-1, 5):
        assert np.bincount(group).tolist() == [2, 2, 1]
    for batch, output in zip(batches, outputs, strict=True):
        np.testing.assert_array_equal(output.logits, batch)


def test_rows_of_one_pass_return_to_their_batches_in_order():
    net = plain_net()
    params, stats = net.init(jax.random.key(0))
    batches = [images(0, 9), images(1, 6)]
    outputs, _ = in_one_pass(net, params, stats, batches, jax.random.key(0))
    for batch, output in zip(batches, outputs, strict=True):
        assert_close(output, net.apply(params, stats, batch))


@pytest.mark.parametrize("make_one", [plain_net, batch_norm_net])
def test_soft_labels_are_constants_of_the_gradient(make_one):
    net, weight = make_one(), 0.7
    objective = make("weak_strong", net, weight=weight)
    params, aux = objective.init(jax.random.key(0), None)
    views = some_views(objective)
    batches = (*views["train"].images, *views["source"].images)

    def outputs(params):
        return in_one_pass(net, params, aux["stats"], batches, jax.random.key(3))[0]

    soft_labels = jax.nn.softmax(outputs(params)[1].logits)

    def with_constants(params):
        target, _, strong = outputs(params)
        entropy = optax.softmax_cross_entropy_with_integer_labels(target.logits, views["train"].labels).mean()
        return entropy - weight * (soft_labels * jax.nn.log_softmax(strong.logits)).sum(-1).mean()

    (loss, _), gradients = gradient(objective, params, aux, views)
    expected, of_constants = jax.jit(jax.value_and_grad(with_constants))(params)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_close(gradients, of_constants)


def test_no_gradient_reaches_the_weak_view():
    objective = make("weak_strong", plain_net())
    params, aux = objective.init(jax.random.key(0), None)
    views = some_views(objective)

    def loss(seen):
        own = {**views, "source": dataclasses.replace(views["source"], images=seen)}
        return objective.loss(params, aux, own, jax.random.key(0))[0]

    weak, strong = jax.grad(loss)(views["source"].images)
    assert not np.any(weak) and np.abs(strong).max() > 1e-5
    changed = (views["source"].images[0][::-1], views["source"].images[1])
    assert abs(loss(changed) - loss(views["source"].images)) > 1e-5  # they label the strong views


def test_weak_strong_refuses_to_mix_images():
    with pytest.raises(InputError, match="mixes images by 'mixup': leave it out"):
        make("weak_strong", plain_net(), ("flip", "mixup"))


@pytest.mark.parametrize("name", REUSE)
def test_head_learning_rate_factor_scales_the_new_heads(name):
    net = batch_norm_net()
    objective = make(name, net)
    params, _ = objective.init(jax.random.key(0), None)
    moved = {}
    for factor in (1.0, 10.0):
        optimizer = make_optimizer(OptimizerSettings(head_learning_rate_factor=factor), 10, objective.groups)
        moved[factor], _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    ratio = jax.tree.map(lambda a, b: float((a / b).mean()), moved[10.0], moved[1.0])
    own = ratio.get("net", ratio)
    assert own["fc"] == {"kernel": pytest.approx(10), "bias": pytest.approx(10)}
    assert all(value == pytest.approx(1) for part in own if part != "fc" for value in jax.tree.leaves(own[part]))
    if name != "weak_strong":
        expected = 10 if name == "joint" else 1  # the pre-trained head of cotuning is not new
        assert jax.tree.leaves(ratio["source_head"]) == pytest.approx([expected, expected])


# --- training on real images


@pytest.mark.parametrize("name", REUSE)
def test_loss_falls_in_twenty_steps(name):
    net, mesh = MODELS["resnet10"](num_classes=10, stem="cifar", width=4), devices.make_mesh()
    reuse = REUSE[name]
    arguments = given(name, net, source_classes=10, classes=10)
    if name == "cotuning":  # the source's head is to learn the digits too
        arguments["relationship"] = np.eye(10, dtype=np.float32)
    objective = reuse.make(net, ("pad_crop",), source_weight=0.5, **arguments)
    names = {"train": "embedded:digits?train=32", "source": "embedded:mnist_5k?train=32"}
    feed = joined(
        {
            name: (make_feed(load_source(names[name], "train"), PREPROCESSING, mesh, 1.0, num_threads=1), 32)
            for name in objective.views
        }
    )
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.05), 20, objective.groups)
    run = many_steps(make_train_step(objective, optimizer, PREPROCESSING, feed.num_classes), feed.fetch, mesh)
    state = devices.replicate(jax.jit(lambda: init_state(objective, optimizer, 0))(), mesh)
    found = []
    for item in feed.items(range(20), 1, seed=0):
        state, metrics = run(state, feed.held, item, 1)
        found.append((metrics["loss"][0], metrics["source_loss"][0]))
    (first, of_source), (last, of_source_then) = np.mean(found[:5], 0), np.mean(found[-5:], 0)
    assert len(found) == 20 and last < 0.9 * first
    if name != "weak_strong":  # while soft labels become sharper, their loss may grow
        assert of_source_then < of_source
