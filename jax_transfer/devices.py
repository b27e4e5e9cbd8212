"""Meshes, shardings, processes, and what depends on the kind of device. The only file that names devices.

Two mesh axes: `data` splits a batch, `sweep` spreads independent work (checkpoints to fine-tune).

Several processes (one a host of a TPU pod or a GPU cluster) share the pre-training, over a mesh of all their devices. All
else is independent work: each process does its part, or the same as the others, on a mesh of its own devices.
"""

import functools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_transfer.records import InputError

# Bounds of one compiled call of training steps on an accelerator: SIGTERM is obeyed, and progress shown, between calls.
MAX_STEPS_PER_CALL = 512
_SECONDS_PER_CALL = 0.5  # by a rate that a training comes near to; three calls may be under way


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> None:
    """Makes this process one of several that run the same command. To be called before any computation.

    With nothing given the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a Slurm step
    of more than one task; the hosts of a TPU pod on GKE. Otherwise the process is alone.

    Args:
      coordinator_address: "host:port" of process 0.
      distributed: let JAX find the others, by the metadata of a Cloud TPU, Slurm or GKE.

    Raises:
      InputError: if only some of the first three are given, or the others do not answer.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    given: tuple = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        found = [os.environ.get(f"JAX_{name.upper()}") for name in names]
        try:
            given = (found[0], *(None if text is None else int(text) for text in found[1:]))
        except ValueError as error:
            raise InputError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, got {found[1:]}.") from error
    if any(value is not None for value in given) and any(value is None for value in given):
        missing = [name for name, value in zip(names, given, strict=True) if value is None]
        raise InputError(f"Of {', '.join(names)} all are needed, and {' and '.join(missing)} missing.")
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if given[0] is None and not (distributed or slurm or pod):
        return
    if given[0] is not None and not 0 <= given[2] < given[1]:
        raise InputError(f"process_id = {given[2]}: of {given[1]} processes the numbers are 0 to {given[1] - 1}.")
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**dict(zip(names, given, strict=True)) if given[0] is not None else {})
    except (RuntimeError, ValueError) as error:
        where = f" at {given[0]}" if given[0] else ""
        raise InputError(f"The other processes{where} cannot be joined: {str(error).splitlines()[0]}") from error


def is_first_process() -> bool:
    """Whether this process writes results and speaks for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


GATHERED_BYTES = 4096


def gather(value) -> list:
    """What each process passes (a small value that JSON holds), in the order of the processes, on all of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(GATHERED_BYTES, np.uint8)
    padded[: len(data)] = data
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in multihost_utils.process_allgather(padded)]


def make_mesh(sweep: int = 1) -> Mesh:
    """A mesh over the devices of this process: `sweep` rows of independent work, the rest of the devices on `data`."""
    count = jax.local_device_count()
    if count % sweep:
        raise InputError(f"{count} devices do not divide into {sweep} rows of a sweep.")
    return _mesh((sweep, count // sweep), jax.local_devices())


def make_global_mesh() -> Mesh:
    """A mesh over the devices of all processes, which all take part in what runs on it."""
    return _mesh((1, jax.device_count()), jax.devices())


def _mesh(shape, devices) -> Mesh:
    # jax.make_mesh makes Explicit axes by default; everything here relies on the compiler's propagation.
    return jax.make_mesh(shape, ("sweep", "data"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def spans_processes(mesh: Mesh) -> bool:
    return len({device.process_index for device in mesh.devices.flat}) > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Puts the same values on every device of the mesh. Several processes must all pass the same values."""
    if not spans_processes(mesh):
        return jax.device_put(tree, replicated(mesh))
    put = functools.partial(jax.make_array_from_process_local_data, replicated(mesh))
    return jax.tree.map(lambda x: put(np.asarray(x), np.shape(x)), tree)


def split(tree, mesh: Mesh, axis_name: str, dimension: int = 0):
    """Puts arrays on the mesh with `dimension` split over `axis_name`.

    On a mesh of several processes each passes its own part, and together they make the global array.
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


def steps_per_call(steps: int, limit: int = MAX_STEPS_PER_CALL) -> int:
    """How many training steps one compiled call makes: a divisor of `steps`, so that one program serves.

    On accelerators a whole epoch where `limit` allows it. One on CPU: XLA's CPU backend computes the
    gradient of a convolution about thirty times slower inside a loop than outside of one.
    """
    if jax.default_backend() == "cpu":
        return 1
    return max(n for n in range(1, min(steps, limit) + 1) if steps % n == 0)


def max_steps_per_call(step_gigaflops: Callable[[], float]) -> int:
    """How many training steps one compiled call may make, for the work of a step on one device (not asked on CPU)."""
    if jax.default_backend() == "cpu":
        return 1
    work = step_gigaflops()
    if not math.isfinite(work):  # a backend whose compiler gives no cost
        return MAX_STEPS_PER_CALL
    return max(1, min(MAX_STEPS_PER_CALL, int(_SECONDS_PER_CALL * sustained_gigaflops_per_second() / work)))


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
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){hosts}"
    return f"{kind}, {jnp.dtype(compute_dtype()).name}"
