"""Attention: the fused kernel for TPUs, interpreted on this machine, equals the written-out form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from jax_transfer import devices
from jax_transfer.models import attention
from jax_transfer.models.attention import on_tpu, tokens_on_tpu, written_out

SCALE = 0.125


def _inputs(n: int, dtype=jnp.bfloat16, b: int = 2, heads: int = 1, d: int = 64):
    keys = jax.random.split(jax.random.key(n), 4)
    return [jax.random.normal(key, (b, heads, n, d), dtype) for key in keys]


def _lowered(q, k, v, platform: str) -> str:
    """Returns the program of attention on a mesh, lowered for a platform."""
    attend = devices.on_mesh(functools.partial(attention.attention, scale=SCALE), devices.make_mesh())
    return jax.jit(attend).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


def _exact(q, k, v):
    """Computes attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.exp(SCALE * q @ np.swapaxes(k, 2, 3))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("n", [128, 200])  # 200 tokens are padded to 256
def test_pallas_kernel_equals_the_written_out_form(n):
    q, k, v, weights = _inputs(n)

    def loss(function, q, k, v):
        y = function(q, k, v, scale=SCALE).astype(jnp.float32)
        return jnp.sum(y * weights), y

    with pltpu.force_tpu_interpret_mode():
        fused, y = jax.grad(functools.partial(loss, on_tpu), (0, 1, 2), has_aux=True)(q, k, v)
    plain, z = jax.grad(functools.partial(loss, written_out), (0, 1, 2), has_aux=True)(q, k, v)
    exact = _exact(q, k, v)
    error = lambda x: np.abs(np.asarray(x, np.float64) - exact).max()  # noqa: E731
    assert error(y) <= 1.5 * error(z) + 2**-9, "the kernel is less accurate than bfloat16 makes the written-out form"
    for ours, theirs in zip(fused, plain, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2**-6 * np.abs(theirs).max())


def test_padding_is_never_attended_to():
    """With values of 1, every output is 1, unless padded values of 0 take part."""
    q, k, _, _ = _inputs(130)
    with pltpu.force_tpu_interpret_mode():
        y = on_tpu(q, k, jnp.ones_like(k), scale=SCALE)
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, atol=2**-7)


def test_float32_is_written_out_everywhere(monkeypatch):
    monkeypatch.setattr(attention, "FEWEST_TOKENS_ON_TPU", 1)
    q, k, v, _ = _inputs(16, jnp.float32)
    assert "tpu_custom_call" not in _lowered(q, k, v, "tpu")
    np.testing.assert_allclose(attention.attention(q, k, v, SCALE), _exact(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("n", "fused"), [(768, True), (196, False)])
def test_only_long_sequences_use_the_kernel_on_a_tpu(n, fused):
    q, k, v, _ = _inputs(n)
    assert ("tpu_custom_call" in _lowered(q, k, v, "tpu")) == fused
    assert "tpu_custom_call" not in _lowered(q, k, v, "cpu")


def test_outside_of_a_mesh_it_is_written_out_so_that_its_operations_are_counted():
    q, k, v, _ = _inputs(768)
    attend = functools.partial(attention.attention, scale=SCALE)
    assert "tpu_custom_call" not in jax.jit(attend).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    products = 2 * 2 * 2 * 768 * 768 * 64 / 1e9  # two products, a multiply-add counts as two, two images
    assert products < devices.gigaflops(attend, q, k, v) < 1.2 * products


def test_kernel_is_split_over_the_mesh_of_the_context_but_not_within_a_shard_map():
    q, k, v, _ = _inputs(128)
    mesh = devices.make_mesh()
    plain = functools.partial(on_tpu, scale=SCALE)
    split = jax.jit(devices.on_mesh(plain, mesh)).trace(q, k, v)
    assert "shard_map" in str(split.jaxpr)
    spec = PartitionSpec("sweep")
    inside = jax.shard_map(plain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert str(jax.make_jaxpr(devices.on_mesh(inside, mesh))(q, k, v)).count("shard_map") == 1


@pytest.mark.parametrize("n", [1, 127, 128, 129, 784, 1024, 3136])
def test_blocks_hold_all_tokens(n):
    padded, block = tokens_on_tpu(n)
    assert padded >= n and padded % block == 0 and block % 128 == 0
    assert padded - n < 128 or padded < n * 1.05 + 128
