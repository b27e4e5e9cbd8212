"""Training steps that need less memory: activations computed again, and batches divided into parts."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.source_files import REPOSITORY
from helpers.studies import environment
from helpers.training_parts import (
    CLASSES,
    PREPROCESSING,
    assert_equal_trees,
    feed_of,
    joined_feed,
    random_source,
    small_net,
)
from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.records import Batch, InputError
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps, memory_advice

BATCH = 32
SGD = optax.sgd(0.05, momentum=0.9)


@functools.cache
def batches(size=8):
    """Returns the batches of one step."""
    source = random_source(BATCH, size=size)
    return {"train": Batch(np.stack(source.read(range(BATCH))), source.labels, np.ones(BATCH, bool))}


def linear(augmentations=()):
    """Returns softmax regression on the pixels, without BatchNorm; `aux` counts the calls and keeps the last draw."""

    def init(key, model=None):
        return {"w": 0.1 * jax.random.normal(key, (192, CLASSES))}, {"calls": 0, "drawn": jnp.float32(0)}

    def loss(params, aux, views, key):
        (images,), labels = views["train"].images, views["train"].labels
        logits = images.reshape(len(images), -1) @ params["w"]
        targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, CLASSES)
        aux = {"calls": aux["calls"] + 1, "drawn": jax.random.uniform(key)}
        return optax.softmax_cross_entropy(logits, targets).mean(), (aux, {"size": jnp.abs(logits).mean()})

    return Objective(init, loss, lambda params, aux: {"params": params, "stats": {}}, {"train": (augmentations,)})


def resnet(augmentations=()):
    return OBJECTIVES["supervised"](small_net(), augmentations)


def one_step(objective, size=8, **memory):
    """Returns the state and the metrics after one step."""
    step = make_train_step(objective, SGD, Preprocessing(image_size=size), {"train": CLASSES}, **memory)
    return jax.jit(step)(init_state(objective, SGD, 0), batches(size))


def assert_close_trees(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


# --- remat

FAST = ("resnet10",)
SLOW = (
    "vit_tiny_patch4_32",
    "resnet50",
    "resnet18_v2",
    "mobilenet_v1",
    "mobilenet_v2",
    "inception_v1",
    "inception_v2",
    "inception_v3",
    "inception_v4",
)
SLOW += ("inception_resnet_v2", "t2t_vit_14", "t2t_vit_t_14")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_remat_changes_neither_loss_nor_gradient(name):
    spec = MODELS[name]
    sizes = {"stem": "cifar", "width": 8 if spec.takes("stem") else 0.25, "image_size": 32}
    net = spec(num_classes=CLASSES, **{setting: value for setting, value in sizes.items() if spec.takes(setting)})
    objective = OBJECTIVES["supervised"](net, ("flip",))
    plain, again = (one_step(objective, net.min_image_size, remat=remat) for remat in (False, True))
    assert_close_trees(plain, again)


def test_remat_computes_activations_again():
    state = jax.eval_shape(lambda: init_state(resnet(), SGD, 0))

    def convolutions(remat):
        step = make_train_step(resnet(), SGD, PREPROCESSING, {"train": CLASSES}, remat=remat)
        return jax.jit(step).lower(state, batches()).as_text().count("stablehlo.convolution")

    assert convolutions(remat=True) - convolutions(remat=False) == 9  # all of a ResNet-10 but the 1x1 ones


# --- parts of a batch


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("augmentations", [(), ("pad_crop", "mixup")])
def test_parts_equal_the_whole_batch_without_batch_norm(parts, augmentations):
    (whole, metrics), (divided, means) = (one_step(linear(augmentations), microbatches=n) for n in (1, parts))
    assert_close_trees((whole["params"], whole["opt_state"], metrics), (divided["params"], divided["opt_state"], means))
    assert divided["aux"]["calls"] == parts and divided["step"] == 1


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_with_batch_norm_equal_a_loop_over_them(remat):
    objective, parts = resnet(("pad_crop", "mixup")), 4
    state = init_state(objective, SGD, 0)
    divided, means = one_step(objective, microbatches=parts, remat=remat)

    key_views, key_loss = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), 0))
    views = augment.views(key_views, batches(), objective.views, PREPROCESSING, {"train": CLASSES})
    aux, values, gradients = state["aux"], [], []
    for j in range(parts):
        rows = jax.tree.map(lambda x, j=j: x[j::parts], views)
        key = jax.random.fold_in(key_loss, j)
        loss = jax.value_and_grad(objective.loss, has_aux=True)
        (value, (aux, metrics)), gradient = jax.jit(loss)(state["params"], aux, rows, key)
        values.append({"loss": value, **metrics})
        gradients.append(gradient)
    mean = jax.tree.map(lambda *x: sum(x) / parts, *gradients)
    updates, _ = SGD.update(mean, state["opt_state"], state["params"])
    assert_close_trees(divided["params"], optax.apply_updates(state["params"], updates))
    assert_close_trees(divided["aux"], aux)
    assert_close_trees(means, jax.tree.map(lambda *x: sum(x) / parts, *values))
    (whole, _) = one_step(objective)
    assert np.abs(whole["params"]["conv1"]["kernel"] - divided["params"]["conv1"]["kernel"]).max() > 1e-4


def test_each_part_has_its_own_key():
    drawn = {parts: float(one_step(linear(), microbatches=parts)[0]["aux"]["drawn"]) for parts in (1, 2, 4)}
    assert len(set(drawn.values())) == 3


def trained(steps, start=None, objective=None, **memory):
    """Trains to `steps` steps, 3 to an epoch, and returns the state and the losses."""
    objective = objective or resnet(("pad_crop", "flip"))
    feed = feed_of(random_source(n=100))
    step = make_train_step(objective, SGD, PREPROCESSING, {"train": CLASSES}, **memory)
    run = many_steps(step, joined_feed(feed, BATCH).fetch, feed.mesh)
    state = devices.replicate(init_state(objective, SGD, 0), feed.mesh) if start is None else start
    losses = []
    for epoch in train(state, run, joined_feed(feed, BATCH), seed=3, total_steps=steps, what="test"):
        state = epoch.state
        losses += epoch.metrics["loss"].tolist()
    return state, losses


def test_training_in_parts_resumes_bit_for_bit():
    whole, losses = trained(5, microbatches=2, remat=True)
    half, first = trained(2, microbatches=2, remat=True)
    again, rest = trained(5, start=half, microbatches=2, remat=True)
    assert losses == first + rest
    assert_equal_trees(whole, again)


def test_a_loop_over_the_parts_equals_the_unrolled_one(monkeypatch):
    unrolled = one_step(resnet(), microbatches=2)
    monkeypatch.setattr(devices, "unrolled", lambda iterations: 1)  # as on accelerators
    assert_close_trees(unrolled, one_step(resnet(), microbatches=2))


ON_DEVICES = """
import json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax, numpy as np
import test_memory as t
state, losses = t.trained(2, objective=t.resnet(("pad_crop", "mixup")), microbatches=4)
total = float(sum(abs(x).sum() for x in jax.tree.leaves(state["params"])))
print(json.dumps([jax.device_count(), losses, total, t.exchanged_images()]))
"""


def exchanged_images():
    """Returns which operations of a compiled step in parts exchange images between devices."""
    objective, mesh = resnet(("flip",)), devices.make_mesh()
    step = make_train_step(objective, SGD, PREPROCESSING, {"train": CLASSES}, microbatches=4)
    state, held = devices.replicate(init_state(objective, SGD, 0), mesh), devices.split(batches(), mesh, "data")
    program = jax.jit(step).lower(state, held).compile().as_text()
    return [name for name in ("all-gather", "all-to-all", "collective-permute") if f"{name}(" in program]


@pytest.mark.slow
def test_parts_are_equal_on_eight_devices_which_exchange_no_images():
    found = []
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-c", ON_DEVICES]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(XLA_FLAGS=flags), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (one, losses, total, _), (eight, *others, exchanged) = found
    assert (one, eight, exchanged) == (1, 8, [])
    np.testing.assert_allclose([*losses, total], np.hstack(others), rtol=1e-4)


@pytest.mark.parametrize(("parts", "size"), [(3, 32), (64, 32), (2, 7)])
def test_parts_that_do_not_divide_a_batch_are_refused_with_valid_numbers(parts, size):
    with pytest.raises(InputError, match=f"config.x.microbatches = {parts} must divide the {size} images") as caught:
        devices.check_microbatches(parts, size, "config.x.microbatches", "config.x.batch_size")
    valid = [int(number) for number in str(caught.value).rpartition("one of ")[2].rstrip(".").split(", ")]
    for number in valid:
        devices.check_microbatches(number, size, "", "")
    assert valid == [n for n in range(1, size + 1) if size % n == 0]


# --- memory that does not suffice


def test_a_step_that_does_not_fit_names_the_fields_to_set():
    def run(state, held, items, count):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating 9 bytes.\nBuffers: ...")

    feed, advice = joined_feed(feed_of(random_source())), memory_advice("config.pretrain", False, 1)
    with pytest.raises(InputError) as caught:
        list(train({"step": np.int32(0)}, run, feed, seed=0, total_steps=2, what="", advice=advice))
    assert str(caught.value) == (
        "Out of memory while allocating 9 bytes: add --config.pretrain.remat=True to the command to resume "
        "it, or, with another --workdir, use more config.pretrain.microbatches than 1 or a smaller "
        "config.pretrain.batch_size."
    )


def test_other_errors_of_a_device_pass_through():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), devices.explain_out_of_memory("wait."):
        raise jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED is only mentioned here")
