"""The parts of a small training."""

import functools

import jax
import numpy as np

from jax_transfer import devices
from jax_transfer.data import batches
from jax_transfer.data.source import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

PREPROCESSING = Preprocessing(image_size=8)


CLASSES = 4


def random_source(n=44, split="train", size=8):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    images = rng.integers(0, 60, (n, size, size, 3)) + 50 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels.astype(np.int32), name="stripes", split=split)


@functools.cache
def small_net():
    return MODELS["resnet10"](num_classes=CLASSES, stem="cifar", width=8)


def feed_of(source, gigabytes=1.0):
    return batches.make_feed(source, PREPROCESSING, devices.make_mesh(), gigabytes, num_threads=2)


def make_objective(name="supervised"):
    return OBJECTIVES[name](small_net(), ("pad_crop", "flip"))


@functools.cache
def training_step(objective="supervised", learning_rate=0.05):
    optimizer = make_optimizer(OptimizerSettings(learning_rate=learning_rate), 100)
    return make_train_step(make_objective(objective), optimizer, PREPROCESSING, {"train": CLASSES}), optimizer


def joined_feed(feed, batch_size=16):
    return batches.joined({"train": (feed, batch_size)})


def train_small(feed, total_steps, learning_rate=0.05, start=None):
    step, optimizer = training_step(learning_rate=learning_rate)
    feed = joined_feed(feed)
    run = many_steps(step, feed.fetch, feed.feeds["train"].mesh)
    state = start if start is not None else start_state(optimizer, feed.feeds["train"].mesh)
    losses = []
    for epoch in train(state, run, feed, seed=3, total_steps=total_steps, what="test"):
        state = epoch.state
        losses.extend(epoch.metrics["loss"])
    return state, losses


def start_state(optimizer, mesh):
    return devices.replicate(init_state(make_objective(), optimizer, 0), mesh)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
