"""Tests that need an accelerator: JAX_TRANSFER_TEST_GPU=1 pytest -m gpu tests/test_gpu.py"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.training_parts import CLASSES, random_source
from jax_transfer import devices
from jax_transfer.data import batches
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import extract
from jax_transfer.models import MODELS
from jax_transfer.models.attention import attention, written_out
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() == "cpu", reason="jax sees no accelerator (is JAX_TRANSFER_TEST_GPU set?)"
    ),
]

BATCH = 32
PREPROCESSING = Preprocessing(image_size=16)


def _net(dtype):
    return MODELS["resnet10"](num_classes=CLASSES, stem="cifar", width=16, dtype=dtype)


def _feed(n=8 * BATCH, gigabytes=1.0):
    source = random_source(n, size=16)
    return batches.make_feed(source, PREPROCESSING, devices.make_mesh(), gigabytes, num_threads=2)


def _training(dtype, feed):
    """Returns the compiled steps on `feed`, the initial state, and the joined feed."""
    net = _net(dtype)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.05, weight_decay=5e-4), 100)
    objective = OBJECTIVES["supervised"](net, ("pad_crop", "flip"))
    step = make_train_step(objective, optimizer, PREPROCESSING, {"train": CLASSES})
    state = init_state(objective, optimizer, 0)
    feed = batches.joined({"train": (feed, BATCH)})
    mesh = devices.make_mesh()
    return many_steps(step, feed.fetch, mesh), devices.replicate(state, mesh), feed


def _losses(dtype, feed, total_steps):
    """Returns the loss of each step, and the number of steps of each compiled call."""
    run, state, feed = _training(dtype, feed)
    lengths, losses = [], []

    def counted(state, held, items, count):
        lengths.append(count)
        return run(state, held, items, count)

    for epoch in train(state, counted, feed, seed=3, total_steps=total_steps, what="test"):
        losses.append(epoch.metrics["loss"])
    return np.concatenate(losses), lengths


def test_compute_dtype_is_bfloat16():
    assert devices.compute_dtype() == jax.numpy.bfloat16


def test_training_in_bfloat16_stays_close_to_float32():
    feed = _feed()
    rounded, _ = _losses("bfloat16", feed, 8)
    exact, _ = _losses("float32", feed, 8)
    assert (rounded != exact).any()
    np.testing.assert_allclose(rounded[0], exact[0], rtol=0.02)  # the same parameters: only rounding differs
    np.testing.assert_allclose(rounded, exact, rtol=0.2, atol=0.05)  # rounding errors add up over the steps


def test_a_resident_epoch_is_one_call_and_the_loss_falls():
    losses, lengths = _losses("bfloat16", _feed(), 24)
    assert devices.steps_per_call(8) == 8 and lengths == [8, 8, 8]
    assert np.isfinite(losses).all()
    assert losses[-4:].mean() < 0.7 * losses[:4].mean()


@pytest.mark.parametrize("n", [197, 3136])  # tokens of a ViT, and of T2T-ViT's first token layer
def test_cudnn_attention_equals_the_written_out_form(n):
    q, k, v = (jax.random.normal(key, (2, 2, n, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

    def gradient(function):
        loss = lambda *x: jnp.sum(jnp.sin(function(*x, 0.125).astype(jnp.float32)))  # noqa: E731
        return jax.jit(devices.on_mesh(jax.grad(loss, (0, 1, 2)), devices.make_mesh()))

    assert devices.has_cudnn_attention() and "cudnn" in gradient(attention).lower(q, k, v).as_text()
    for ours, theirs in zip(gradient(attention)(q, k, v), gradient(written_out)(q, k, v), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2**-6 * np.abs(theirs).max())


def test_streamed_training_stays_close_to_resident():
    resident, _ = _losses("float32", _feed(), 8)
    streamed, lengths = _losses("float32", _feed(gigabytes=0.0), 8)
    assert lengths == [8]
    np.testing.assert_allclose(resident, streamed, rtol=0.02)  # not bit for bit: atomics and other algorithms


def test_features_in_bfloat16_stay_close_to_float32():
    feed = _feed()
    params, stats = _net("float32").init(jax.random.key(0))
    model = devices.replicate({"params": params, "stats": stats}, feed.mesh)
    features = {}
    for dtype in ("bfloat16", "float32"):
        forward = extract.make_forward(_net(dtype), PREPROCESSING, feed.mesh)
        features[dtype] = extract.extract(forward, model, feed, BATCH).features
    assert features["bfloat16"].dtype == np.float32
    difference = np.linalg.norm(features["bfloat16"] - features["float32"])
    assert 0 < difference < 0.02 * np.linalg.norm(features["float32"])


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_training_loop_makes_no_implicit_transfer(gigabytes):
    feed = _feed(gigabytes=gigabytes)
    run, state, both = _training("bfloat16", feed)
    measure = classification(_net("bfloat16"), PREPROCESSING, feed.mesh, stacked=False)
    with jax.transfer_guard("disallow"):
        for items in both.items(range(8), 8, 3):
            state, _ = run(state, both.held, items, 8)
        (metrics,) = measure({"params": state["params"], "stats": state["aux"]["stats"]}, feed, BATCH)
    assert 0 <= metrics["accuracy"] <= 1
