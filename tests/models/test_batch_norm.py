"""BatchNorm: one pass is as accurate as two on hard inputs, and groups do not depend on anything else."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.source_files import REPOSITORY
from jax_transfer.models import MODELS
from jax_transfer.models.layers import BatchNorm, ConvNorm, in_groups
from jax_transfer.records import InputError

SHAPE = (16, 8, 8)  # images, height, width


def _statistics(x: np.ndarray, running_mean, group: int | None = None):
    """Returns a BatchNorm of eps 0 after one training step on x, and its output."""
    norm = BatchNorm(x.shape[-1], eps=0.0)
    norm.mean.set_value(jnp.asarray(running_mean, jnp.float32))
    norm.group = group
    return norm, norm(jnp.asarray(x), train=True)


def _variance_and_output(x, running_mean):
    norm, y = _statistics(x, running_mean)
    return norm.var[...], y


def _channels() -> dict[str, np.ndarray]:
    """Returns hard channels [16, 8, 8] in float32: name -> values."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    return {
        "plain": noise,
        "hardly varies": 3 + 1e-4 * noise,
        "large offset": 1000 + noise,
        "large offset, hardly varies": 1000 + 0.01 * noise,
        "one outlier": np.where(np.arange(SHAPE[0])[:, None, None] == 3, 1e4, noise),
        "tiny": 1e-6 * noise,
    }


@pytest.mark.parametrize("name", _channels())
@pytest.mark.parametrize("distance", [0.0, 1.0, 100.0])  # of the running mean from the mean, in standard deviations
def test_one_pass_is_as_accurate_as_its_docstring_says(name, distance, fully_optimised):
    x = _channels()[name].astype(np.float32)
    exact = x.astype(np.float64)
    running = np.float32(exact.mean() - distance * exact.std())
    var, y = jax.jit(_variance_and_output, compiler_options=fully_optimised)(x[..., None], [running])
    measured_distance = (exact.mean() - float(running)) / exact.std()
    bound = 2**-18 * (1 + measured_distance**2)
    unbiased = (float(var[0]) - 0.9) / 0.1
    # The running variance has itself rounding errors of 0.9.
    np.testing.assert_allclose(unbiased, exact.var(ddof=1), rtol=bound, atol=10 * 2**-23)
    expected = (exact - exact.mean()) / exact.std()
    # The output has, besides, the rounding error of x - mean.
    rounding = 2**-23 * np.abs(exact).max() / exact.std()
    np.testing.assert_allclose(y[..., 0], expected, rtol=bound + 1e-6, atol=2 * rounding + 2**-18 * (1 + distance))


def test_a_mean_that_moved_far_costs_accuracy_for_some_steps_only(fully_optimised):
    """Starts with a running mean of 0 for a channel at 1000 +- 1, the worst case of the shift."""
    x = np.float32(1000 + np.random.default_rng(1).standard_normal((*SHAPE, 1)))

    @functools.partial(jax.jit, compiler_options=fully_optimised)
    def step(x, mean):
        norm, y = _statistics(x, mean)
        return norm.mean[...], y

    mean, errors = jnp.zeros(1), []
    for _ in range(60):
        mean, y = step(x, mean)
        errors.append(abs(float(y.std()) - 1))
    assert max(errors[40:]) < 1e-4
    assert np.isfinite(errors).all()


def test_a_constant_channel_is_zero():
    norm = BatchNorm(2)
    y = norm(jnp.full((4, 3, 3, 2), 7.25), train=True)
    assert float(jnp.abs(y).max()) < 1e-2  # 7.25 / sqrt(eps) would be 2,300
    assert float(norm.var[...].min()) >= 0.9 - 1e-6


def test_gradient_equals_that_of_two_passes():
    x = jax.random.normal(jax.random.key(0), (*SHAPE, 3)) * 2 + 1

    def one_pass(x):
        norm = BatchNorm(3)
        norm.mean.set_value(jnp.full(3, 0.7))
        return jnp.sum(jnp.sin(norm(x, train=True)))

    def two_passes(x):
        centred = x - x.mean((0, 1, 2))
        return jnp.sum(jnp.sin(centred * jax.lax.rsqrt(jnp.square(centred).mean((0, 1, 2)) + 1e-5)))

    np.testing.assert_allclose(jax.grad(one_pass)(x), jax.grad(two_passes)(x), atol=2e-6)


def test_groups_equal_a_loop_over_the_groups():
    x = np.random.default_rng(2).standard_normal((8, 4, 4, 5)).astype(np.float32)
    norm, y = _statistics(x, np.zeros(5), group=2)
    parts = [_statistics(part, np.zeros(5)) for part in np.split(x, 4)]
    np.testing.assert_allclose(y, np.concatenate([part for _, part in parts]), atol=1e-6)
    for statistic in ("mean", "var"):
        mean = np.mean([getattr(part, statistic)[...] for part, _ in parts], 0)
        np.testing.assert_allclose(getattr(norm, statistic)[...], mean, atol=1e-6)


def test_one_group_is_the_whole_batch():
    x = np.random.default_rng(3).standard_normal((8, 4, 4, 5)).astype(np.float32)
    (whole, y), (grouped, z) = _statistics(x, np.zeros(5)), _statistics(x, np.zeros(5), group=8)
    np.testing.assert_allclose(y, z, atol=1e-6)
    np.testing.assert_allclose(whole.var[...], grouped.var[...], atol=1e-7)


def test_evaluation_ignores_groups():
    x = jnp.ones((3, 2, 2, 4))
    norm = BatchNorm(4)
    norm.group = 2
    assert norm(x, train=False).shape == x.shape


def test_a_group_must_divide_the_batch():
    module = in_groups(lambda rngs: ConvNorm(3, 4, 3, dtype=jnp.float32, rngs=rngs), 3)(nnx.Rngs(0))
    with pytest.raises(InputError, match="batch_norm_group = 3 does not divide a batch of 8 images"):
        module(jnp.ones((8, 4, 4, 3)), train=True)


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.takes("batch_norm_group")])
def test_every_net_with_batch_norm_takes_groups(name):
    net = MODELS[name](num_classes=2, batch_norm_group=2)
    assert net is not MODELS[name](num_classes=2)
    assert net is MODELS[name](num_classes=2, batch_norm_group=2)
    with pytest.raises(InputError, match="batch_norm_group"):
        MODELS[name](num_classes=2, batch_norm_group=0)


def test_every_net_with_statistics_of_batch_norm_has_the_setting():
    for name, spec in MODELS.items():
        stats = [path for path in spec(num_classes=2).shapes if path.startswith("stats/") and path.endswith("/var")]
        assert bool(stats) == spec.takes("batch_norm_group"), name


def test_groups_change_what_a_net_computes_in_training():
    whole, grouped = (
        MODELS["resnet10"](num_classes=2, width=8, stem="cifar", **kw) for kw in ({}, {"batch_norm_group": 2})
    )
    params, stats = whole.init(jax.random.key(0))
    # Images of 8 pixels would leave the last layers two values each, whose normalisation multiplies rounding by 1,000.
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)) * jnp.array([0.1, 1, 3, 0.5])[:, None, None, None]
    run = lambda net, images: net.apply_train(params, stats, images, jax.random.key(2))[0].logits  # noqa: E731
    np.testing.assert_allclose(run(grouped, x), jnp.concatenate([run(whole, x[:2]), run(whole, x[2:])]), atol=1e-5)
    assert float(jnp.abs(run(grouped, x) - run(whole, x)).max()) > 1e-3


ON_DEVICES = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax_transfer import devices
from jax_transfer.models.layers import BatchNorm

mesh, found = devices.make_mesh(), {}
x = np.random.default_rng(0).standard_normal((64, 4, 4, 8)).astype(np.float32)
for group in (None, 8, 32):

    def gradient(x):
        def loss(x):
            norm = BatchNorm(8)
            norm.group = group
            return jnp.sum(jnp.sin(norm(x, True))), (norm.mean[...], norm.var[...])

        return jax.grad(loss, has_aux=True)(x)

    split = devices.split(x, mesh, "data")
    compiled = jax.jit(gradient).lower(split).compile()
    text, arrays = compiled.as_text(), jax.tree.leaves(compiled(split))
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    exchanged = [len(re.findall(rf" {name}(?:-start)?\\(", text)) for name in names]
    found[str(group)] = exchanged, [np.asarray(array).ravel()[:200].tolist() for array in arrays]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_equal_one_and_exchange_only_sums():
    one, eight = (_on_devices(count) for count in (1, 8))
    for group, (_, arrays) in one.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), arrays, eight[group][1])
    # The global batch: one all-reduce for both moments, one in the backward pass. A group on each device: only that of
    # the running statistics.
    assert eight["None"][0] == [2, 0, 0, 0]
    assert eight["8"][0] == [1, 0, 0, 0]
    assert eight["32"][0][1:] == [0, 0, 0]


def _on_devices(count: int) -> dict:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_DEVICES]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
