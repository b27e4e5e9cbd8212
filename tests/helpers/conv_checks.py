"""Checks of convolutional nets. They avoid compiling `net.init`, which takes longer than anything else in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_transfer import trees
from jax_transfer.models import make_net
from jax_transfer.models.inception_resnet_v2 import InceptionResNetV2
from jax_transfer.models.layers import DTYPES

# Compiles in a third of the time; the code is slower, but runs only once.
QUICK = {"xla_backend_optimization_level": 0}


def num_parameters(net) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))[0]))


def random_weights(net, gain=2.0, spread=1.0):
    """Returns (params, stats): kernels from N(0, gain / fan in), and random BatchNorm parameters and statistics."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        kind = name.rsplit("/", 1)[-1]
        if kind == "kernel":
            return rng.normal(size=shape) * np.sqrt(gain / np.prod(shape[:-1]))
        if kind in ("scale", "var"):
            return 1 + spread * rng.uniform(-0.5, 0.5, shape)
        return 0.2 * spread * rng.normal(size=shape)

    abstract = jax.eval_shape(net.init, jax.random.key(0))
    flat = [{name: jnp.float32(draw(name, x.shape)) for name, x in trees.flatten(tree).items()} for tree in abstract]
    return [trees.unflatten(tree) for tree in flat]


@functools.cache
def short_inception_resnet_v2(num_classes, dtype="float32", width=1.0):
    """Returns an Inception-ResNet-v2 with one block on each of its three grids; the original has 10, 20 and 9."""

    def make_module(rngs: nnx.Rngs):
        return InceptionResNetV2(num_classes, repeats=(1, 1, 1), width=width, dtype=DTYPES[dtype], rngs=rngs)

    sizes = {"num_classes": num_classes, "feature_dim": int(1536 * width), "min_image_size": 75}
    return make_net("inception_resnet_v2", make_module, classifier=("classif",), **sizes)


def random_images(size, count=4):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def apply(net, params, stats, images):
    return jax.jit(net.apply, compiler_options=QUICK)(params, stats, images)


def assert_equals_twin(net, twin, images):
    """Asserts that features and logits equal those of a torch net with the same weights."""
    from helpers import torch_twins

    logits, features = torch_twins.twin_output(twin, images)
    output = apply(net, *torch_twins.to_dicts(twin), images)
    np.testing.assert_allclose(output.features, features, rtol=1e-4, atol=1e-4 * features.std(ddof=1))
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4 * logits.std(ddof=1))


def assert_gradients_reach_every_parameter(net, images):
    """Asserts finite, non-zero gradients in training mode, and that all statistics change."""
    params, stats = random_weights(net)
    labels = jnp.arange(len(images)) % net.num_classes

    def loss(params):
        output, new_stats = net.apply_train(params, stats, images, jax.random.key(0))
        return -jnp.mean(jax.nn.log_softmax(output.logits)[jnp.arange(len(images)), labels]), new_stats

    gradients, new_stats = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    for name, leaf in trees.flatten(gradients).items():
        assert np.isfinite(leaf).all() and np.any(leaf != 0), name
    for name, leaf in trees.flatten(new_stats).items():
        assert np.isfinite(leaf).all() and not np.array_equal(leaf, trees.flatten(stats)[name]), name


def assert_bfloat16_is_close(exact, rough, images, tolerance=0.03):
    """Compares nets that differ only in dtype; the exact one must be deterministic and independent of the batch."""
    # Small weights: with gain 2, an untrained linear bottleneck amplifies rounding errors.
    params, stats = random_weights(exact, gain=1.0, spread=0.0)
    compiled = jax.jit(exact.apply, compiler_options=QUICK)
    a, b = compiled(params, stats, images), apply(rough, params, stats, images)
    assert a.features.dtype == b.features.dtype == b.logits.dtype == jnp.float32
    assert not np.array_equal(a.features, b.features)
    assert np.linalg.norm(a.features - b.features) < tolerance * np.linalg.norm(a.features)
    assert np.linalg.norm(a.logits - b.logits) < tolerance * np.linalg.norm(a.logits)

    others = images.copy()
    others[1:] = 7.0
    np.testing.assert_array_equal(a.logits, compiled(params, stats, images).logits)
    np.testing.assert_array_equal(a.logits[:1], compiled(params, stats, others).logits[:1])
