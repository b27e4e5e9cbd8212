"""Source, nets, feed, step and state of a small training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_transfer import devices
from jax_transfer.data import batches
from jax_transfer.data.source import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.models.layers import BatchNorm, in_groups
from jax_transfer.models.net import Output, make_net
from jax_transfer.models.transformer import Size
from jax_transfer.models.vit import VisionTransformer
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

PREPROCESSING = Preprocessing(image_size=8)
CLASSES = 4


def random_source(n=44, split="train", size=8):
    """Returns a source of n random images whose brightness shows the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    images = rng.integers(0, 60, (n, size, size, 3)) + 50 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels.astype(np.int32), name="stripes", split=split)


def structured_source(n=32, size=24, extra=None):
    """Returns images with a colour of their own, darker to the top and away from the centre; the class is the hue."""
    rng, line = np.random.default_rng(0), np.linspace(-1, 1, size)
    shape = 0.35 * line[:, None] - 0.5 * (line[:, None] ** 2 + line[None] ** 2)
    labels = np.arange(n) % CLASSES
    colours = rng.uniform(0.4, 0.6, (n, 3)) + 0.4 * np.eye(CLASSES)[labels, :3]
    images = colours[:, None, None] * (1 + shape[None, ..., None]) + rng.normal(0, 0.01, (n, size, size, 3))
    source = from_arrays((255 * images.clip(0, 1)).astype(np.uint8), labels.astype(np.int32))
    return dataclasses.replace(source, extra=extra or {})


@functools.cache
def small_net():
    return MODELS["resnet10"](num_classes=CLASSES, stem="cifar", width=8)


class Tiny(nnx.Module):
    """A convolution, perhaps BatchNorm, the mean over the image, and a linear head."""

    def __init__(self, rngs, num_classes, batch_norm):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.bn = BatchNorm(16) if batch_norm else None
        # The default draws no kernel without columns.
        draw = nnx.initializers.lecun_normal() if num_classes else nnx.initializers.zeros
        self.fc = nnx.Linear(16, num_classes, kernel_init=draw, rngs=rngs)

    def __call__(self, images, train, rngs):
        x = self.conv(images)
        features = jax.nn.relu(self.bn(x, train) if self.bn else x).mean((1, 2))
        return Output(self.fc(features), features)


@functools.cache
def tiny_net(num_classes=CLASSES, batch_norm=False, group=None):
    """Returns a net that compiles in a fraction of a second; `group`: images that BatchNorm normalises together."""
    module = in_groups(functools.partial(Tiny, num_classes=num_classes, batch_norm=batch_norm), group)
    return make_net("tiny", module, num_classes=num_classes, feature_dim=16, min_image_size=1, classifier=("fc",))


@functools.cache
def tiny_vit(image_size=24, patch=8):
    """Returns a vision transformer of two blocks without a head."""

    def make_module(rngs):
        rates = {"dropout": 0.0, "stochastic_depth": 0.0}
        return VisionTransformer(Size(12, 2, 3), patch, image_size, 0, dtype=jnp.float32, rngs=rngs, **rates)

    return make_net("vit", make_module, num_classes=0, feature_dim=12, min_image_size=image_size, classifier=("head",))


def feed_of(source, gigabytes=1.0):
    """Returns a feed of the source: resident by default, streamed for `gigabytes` = 0."""
    return batches.make_feed(source, PREPROCESSING, devices.make_mesh(), gigabytes, num_threads=2)


def make_objective(name="supervised"):
    return OBJECTIVES[name](small_net(), ("pad_crop", "flip"))


@functools.cache
def training_step(objective="supervised", learning_rate=0.05):
    optimizer = make_optimizer(OptimizerSettings(learning_rate=learning_rate), 100)
    return make_train_step(make_objective(objective), optimizer, PREPROCESSING, {"train": CLASSES}), optimizer


def joined_feed(feed, batch_size=16):
    """Returns the joined feed whose only part is `feed`, named "train"."""
    return batches.joined({"train": (feed, batch_size)})


def train_small(feed, total_steps, learning_rate=0.05, start=None, objective="supervised"):
    """Trains the small net from `start`, or from random weights; returns the state and the loss of each step."""
    step, optimizer = training_step(objective, learning_rate)
    feed = joined_feed(feed)
    run = many_steps(step, feed.fetch, feed.feeds["train"].mesh)
    state = start if start is not None else start_state(optimizer, feed.feeds["train"].mesh, objective)
    losses = []
    for epoch in train(state, run, feed, seed=3, total_steps=total_steps, what="test"):
        state = epoch.state
        losses.extend(epoch.metrics["loss"])
    return state, losses


def start_state(optimizer, mesh, objective="supervised"):
    return devices.replicate(init_state(make_objective(objective), optimizer, 0), mesh)


def assert_equal_trees(a, b):
    """Fails unless all leaves are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
