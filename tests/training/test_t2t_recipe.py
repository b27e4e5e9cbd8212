"""The training recipe of T2T-ViT: moving average, checkpoints, several devices, and config."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.source_files import REPOSITORY, get_config
from helpers.training_parts import CLASSES, PREPROCESSING, assert_equal_trees, feed_of, joined_feed, random_source
from jax_transfer import devices
from jax_transfer.checkpoints.load import load_checkpoint
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.models import Net
from jax_transfer.models.net import Output
from jax_transfer.records import InputError
from jax_transfer.study import checks, epochs, settings
from jax_transfer.study import pretrain as pretrain_stage
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import train
from jax_transfer.training.objectives.supervised import supervised
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer, make_schedule
from jax_transfer.training.state import divide, evaluated, init_state, join
from jax_transfer.training.steps import make_train_step, many_steps

RECIPE = ("pad_crop", "flip", "rand_augment", "mixup_or_cutmix", "random_erase")
DECAY = 0.8


@functools.cache
def _net():
    """Returns a linear model with a running mean of its input, like that of BatchNorm; it compiles quickly."""

    def init(key):
        return {"fc": {"kernel": 0.1 * jax.random.normal(key, (192, CLASSES))}}, {"mean": jnp.zeros(192)}

    def apply(params, stats, images):
        features = images.reshape(len(images), -1) - stats["mean"]
        return Output(logits=features @ params["fc"]["kernel"], features=features)

    def apply_train(params, stats, images, key):
        mean = 0.9 * stats["mean"] + 0.1 * images.reshape(len(images), -1).mean(0)
        return apply(params, stats, images), {"mean": mean}

    return Net("linear", CLASSES, 192, 8, init, apply, apply_train, ("fc",))


@functools.cache
def _optimizer():
    return make_optimizer(OptimizerSettings(name="adamw", learning_rate=1e-2, weight_decay=0.05), 100)


def _objective(names=RECIPE):
    return supervised(_net(), names, label_smoothing=0.1)


def joined_stripes():
    return joined_feed(feed_of(random_source(n=64)))


@functools.cache
def _run(ema_decay=DECAY, names=RECIPE):
    step = make_train_step(_objective(names), _optimizer(), PREPROCESSING, {"train": _net().num_classes}, ema_decay)
    return many_steps(step, joined_stripes().fetch, devices.make_mesh())


def _start(ema=True):
    start = jax.jit(lambda: init_state(_objective(), _optimizer(), 0, ema=ema))
    return devices.replicate(start(), devices.make_mesh())


def _train(state, total_steps, ema_decay=DECAY, names=RECIPE, on_step=lambda state: None):
    """Trains with 16 images per step. `on_step` gets a copy of each state, since the next step donates it."""

    def run(*arguments):
        state, metrics = _run(ema_decay, names)(*arguments)
        on_step(jax.device_get(state))
        return state, metrics

    for epoch in train(state, run, joined_stripes(), seed=3, total_steps=total_steps, what="test"):
        state = epoch.state
    return state


# --- the moving average


def test_average_follows_its_formula():
    seen = []
    start = _start()
    raw = _objective().model
    expected = jax.device_get(raw(start["params"], start["aux"]))
    assert_equal_trees(start["ema"], expected)
    _train(start, 5, on_step=seen.append)
    assert len(seen) == 5
    for state in seen:
        model = raw(state["params"], state["aux"])
        expected = jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, expected, model)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state["ema"], expected)


def test_average_does_not_change_the_training():
    names = ("flip",)
    averaged, plain = _train(_start(), 4, names=names), _train(_start(ema=False), 4, ema_decay=0.0, names=names)
    assert "ema" in averaged and "ema" not in plain
    assert_equal_trees({name: averaged[name] for name in plain}, plain)
    assert evaluated(_objective(), plain)["params"] is plain["params"]
    assert evaluated(_objective(), averaged) is averaged["ema"]


def test_resumed_training_equals_uninterrupted_training_exactly(tmp_path):
    whole = _train(_start(), 6)
    half = _train(_start(), 4)
    trajectory = Trajectory(tmp_path / "checkpoints")
    trajectory.save(1, *divide(_objective(), half), {})
    trajectory.wait()
    shapes = abstract(half, devices.replicated(devices.make_mesh()))
    restored = join(_objective(), shapes, *trajectory.restore(1, *divide(_objective(), shapes)))
    assert_equal_trees(restored, half)
    model = trajectory.restore_model(1, _net(), devices.replicated(devices.make_mesh()))
    trajectory.close()
    assert_equal_trees(model, half["ema"])
    assert (model["params"]["fc"]["kernel"] != half["params"]["fc"]["kernel"]).any()
    assert_equal_trees(_train(restored, 6), whole)


# --- pre-training by a config


def _tiny(**changes):
    config = get_config("quickstart", "smoke")
    config.source.dataset, config.targets = "embedded:digits?train=256&test=64", ("embedded:digits?train=128&test=64",)
    config.preprocessing.image_size = 8
    config.pretrain.batch_size = config.finetune.batch_size = 32
    config.data.eval_batch_size = 64
    config.pretrain.augment = ("mixup",)
    config.pretrain.ema_decay = DECAY
    for path, value in changes.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return config


def test_checkpoint_holds_the_average_and_its_accuracy(tmp_path):
    config = _tiny()
    checks.check(config)
    work = Workspace(config, tmp_path)
    pretrain_stage.run(work)
    objective = work.objective(work.pretrainings[0])
    optimizer = make_optimizer(settings.pretrain_optimizer(config.pretrain), 16)
    shapes = abstract(
        jax.eval_shape(lambda: init_state(objective, optimizer, 0, ema=True)), devices.replicated(work.mesh)
    )
    saved = work._trajectory(work.pretrainings[0]).restore(2, *divide(objective, shapes))
    state = join(objective, shapes, *saved)
    snapshot = epochs.snapshot(work.pretrainings[0], 2)
    assert_equal_trees(work.checkpoint(snapshot).model, state["ema"])
    work.close()
    found = load_checkpoint(tmp_path / "checkpoints" / "2")
    assert_equal_trees({"params": found.params, "stats": found.stats}, state["ema"])
    measure = classification(work.source_net(work.pretrainings[0]), work.preprocessing, work.mesh, stacked=False)
    test = work.feed(work.sources[0], "test", work.preprocessing)
    raw = objective.model(state["params"], state["aux"])
    accuracy = {name: measure(m, test, 64)[0]["accuracy"] for name, m in (("ema", state["ema"]), ("raw", raw))}
    assert found.source_accuracy == accuracy["ema"] != accuracy["raw"]


LOSSES = """
import json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax, numpy as np
import test_t2t_recipe as t
losses = []
feed = t.joined_stripes()
for items in feed.items(range(feed.steps_per_epoch), 1, 3):
    state, metrics = t._run()(state if losses else t._start(), feed.held, items, 1)
    losses += np.ravel(metrics["loss"]).tolist()
total = float(sum(abs(x).sum() for x in jax.tree.leaves(state["ema"]["params"])))
print(json.dumps([jax.device_count(), losses, total]))
"""


@pytest.mark.slow
def test_mixing_and_averaging_are_equal_on_eight_devices():
    found = []
    for count in (1, 8):
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        done = subprocess.run(
            [sys.executable, "-c", LOSSES], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(jax.tree.leaves(json.loads(done.stdout.splitlines()[-1])))
    assert [row[0] for row in found] == [1, 8] and len(found[0]) == 6
    np.testing.assert_allclose(found[0][1:], found[1][1:], rtol=1e-4)


# --- the config


def test_full_recipe_equals_the_released_one():
    config = get_config("t2t_vit_14_imagenet", "full")
    checks.check(config)
    steps = 300 * (1_281_167 // 512)
    schedule = settings.pretrain_optimizer(config.pretrain)
    rate = make_schedule(schedule, steps)
    np.testing.assert_allclose([rate(0), rate(steps // 30), rate(steps)], [1e-6, 5e-4, 1e-5], rtol=1e-3)
    tokens = OptimizerSettings(name="adamw", learning_rate=1.0, weight_decay=0.05, decay_norm_and_bias=False)
    decayed = make_optimizer(tokens, 1)
    net = settings.make_net(config, settings.models(config)["t2t_vit_t_14"], 1000)
    params, _ = jax.eval_shape(net.init, jax.random.key(0))
    ones = {path[-1].key: jnp.ones((1,) * leaf.ndim) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = decayed.update(zeros, decayed.init(ones), ones)
    assert {name for name, update in updates.items() if update.any()} == {"kernel"}
    checks.check(get_config("t2t_vit_14_imagenet", "smoke"))
    with pytest.raises(InputError, match="Valid: full, smoke"):
        get_config("t2t_vit_14_imagenet", "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain__ema_decay": 1.0}, r"config\.pretrain\.ema_decay = 1\.0: must lie in \[0, 1\); 0 turns it off"),
        ({"pretrain__ema_decay": -0.1}, r"config\.pretrain\.ema_decay = -0\.1"),
        ({"pretrain__supervised.label_smoothing": 1.5}, r"config\.pretrain\.supervised\.label_smoothing = 1\.5"),
        ({"pretrain__augment": ("mixip",)}, r"augmentation \(config\.pretrain\.augment\): 'mixip'.*'mixup'"),
        ({"pretrain__optimizer.min_learning_rate": 1.0}, r"config\.pretrain\.optimizer\.min_learning_rate = 1\.0"),
        ({"finetune__optimizer.warmup_learning_rate": -1.0}, r"config\.finetune\.optimizer\.warmup_learning_rate = -1"),
    ],
)
def test_check_names_the_field(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        checks.check(_tiny(**changes))
    assert "\n" not in str(caught.value)
