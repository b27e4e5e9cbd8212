"""Meshes, shardings and what depends on the kind of device. The only file that names devices.

Two mesh axes: `data` splits a batch, `sweep` spreads independent work (checkpoints to fine-tune).
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_transfer.records import InputError

# Longest run of training steps in one compiled call on an accelerator; bounds the wait for a progress line.
_MAX_STEPS_PER_CALL = 512


def make_mesh(sweep: int = 1) -> Mesh:
    """A mesh over all devices: `sweep` rows of independent work, the rest of the devices on `data`."""
    count = jax.device_count()
    if count % sweep:
        raise InputError(f"{count} devices do not divide into {sweep} rows of a sweep.")
    # jax.make_mesh makes Explicit axes by default; everything here relies on the compiler's propagation.
    return jax.make_mesh((sweep, count // sweep), ("sweep", "data"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Puts the same values on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def split(tree, mesh: Mesh, axis_name: str, dimension: int = 0):
    """Puts arrays on the mesh with `dimension` split over `axis_name`.

    With several processes each passes its own part, and together they make the global array.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * dimension, axis_name))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def constrain(tree, mesh: Mesh, axis_name: str):
    """Inside jit: splits the leading axis of every array over `axis_name`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(axis_name)))


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> int:
    """Returns the batch size of one device.

    Raises:
      InputError: if the global batch does not divide over the `data` axis; names the sizes that do.
    """
    count = mesh.shape["data"]
    if batch_size < 1 or batch_size % count:
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        fits = f"{below} or {above}" if below > 0 else f"{above}"
        raise InputError(
            f"{field} = {batch_size} is the global batch and must be a positive multiple of the {count} devices "
            f"on the data axis: use {fits}, or any other multiple of {count}."
        )
    return batch_size // count


def compute_dtype():
    """bfloat16 on accelerators; float32 on CPU, where bfloat16 is emulated and slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def steps_per_call(steps: int, limit: int = _MAX_STEPS_PER_CALL) -> int:
    """How many training steps one compiled call makes: a divisor of `steps`, so that one program serves.

    A whole epoch on accelerators where it is not too long. One on CPU: XLA's CPU backend computes the
    gradient of a convolution about thirty times slower inside a loop than outside of one.
    """
    if jax.default_backend() == "cpu":
        return 1
    return max(n for n in range(1, min(steps, limit) + 1) if steps % n == 0)


def gigaflops(function, *args) -> float:
    """Floating point operations / 1e9 of one call, from the compiler's cost analysis; nothing runs.

    Loops count once, whatever their length: pass the body and multiply.
    """
    cost: Any = jax.jit(function).lower(*args).cost_analysis() or {}
    return float(cost.get("flops", float("nan"))) / 1e9


@functools.cache
def sustained_gigaflops_per_second() -> float:
    """A rough rate for the estimate in the plan: a small convolution and its gradient, timed once."""

    def loss(w, x):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jax.nn.relu(y) ** 2).astype(jnp.float32)

    dtype = compute_dtype()
    w, x = jnp.ones((3, 3, 64, 64), dtype), jnp.ones((32, 16, 16, 64), dtype)
    step = jax.jit(jax.grad(loss))
    jax.block_until_ready(step(w, x))
    repeats = 4 if jax.default_backend() == "cpu" else 40
    start = time.perf_counter()
    for _ in range(repeats):
        result = step(w, x)
    jax.block_until_ready(result)
    return repeats * gigaflops(jax.grad(loss), w, x) / (time.perf_counter() - start)


def use_compilation_cache(folder) -> None:
    """Keeps compiled programs in `folder`, or where JAX_COMPILATION_CACHE_DIR says, so that a resumed run need not compile."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def description() -> str:
    """For the head of the log: '2 x NVIDIA H200 (gpu), bfloat16'."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jnp.dtype(compute_dtype()).name}"
