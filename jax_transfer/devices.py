"""Meshes, shardings, processes, and all code that depends on the kind of device (CPU, GPU or TPU).

Meshes have two axes: `data` splits a batch, and `sweep` spreads independent work, such as the fine-tuning of several
checkpoints.

With several processes (one for each host of a TPU pod or a GPU cluster), all of them pre-train together, on a mesh of
all their devices. All other work is independent: each process uses a mesh of only its local devices, and does either a
share of the work or the same work as the others.
"""

import contextlib
import functools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_transfer.records import InputError, printable

# Limits on one compiled call of training steps on an accelerator. SIGTERM is checked, and progress is shown, only
# between calls.
MAX_STEPS_PER_CALL = 512
_SECONDS_PER_CALL = (
    0.5  # at the measured rate of a convolution, which training nearly reaches; up to three calls may be in flight
)


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> None:
    """Joins this process to the others that run the same command. Call it before any computation.

    Without arguments, the environment decides: the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, a Slurm step with more than one task, or a TPU pod with several hosts on GKE. If it has none of
    these, the process runs alone.

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: the number of processes.
      process_id: the index of this process, from 0.
      distributed: whether JAX finds the other processes through the metadata of Cloud TPU, Slurm or GKE.

    Raises:
      InputError: if only some of the first three are given, or the other processes do not answer.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    given: tuple = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        address, *numbers = [os.environ.get(f"JAX_{name.upper()}") for name in names]
        try:
            given = (address, *(None if text is None else int(text) for text in numbers))
        except ValueError as error:
            raise InputError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, got {numbers}.") from error
    if any(value is not None for value in given) and any(value is None for value in given):
        missing = [name for name, value in zip(names, given, strict=True) if value is None]
        raise InputError(f"Missing {' and '.join(missing)}: give all of {', '.join(names)}, or none of them.")
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if given[0] is None and not (distributed or slurm or pod):
        return
    if given[0] is not None and not 0 <= given[2] < given[1]:
        raise InputError(f"process_id = {given[2]}: expected 0 to {given[1] - 1}, because num_processes = {given[1]}.")
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**dict(zip(names, given, strict=True)) if given[0] is not None else {})
    except (RuntimeError, ValueError) as error:
        where = f" at {given[0]}" if given[0] else ""
        raise InputError(f"Cannot join the other processes{where}: {str(error).splitlines()[0]}") from error


def is_first_process() -> bool:
    """Returns whether this is process 0, which writes the results and logs progress.

    >>> is_first_process()
    True
    """
    return jax.process_index() == 0


def wait_for_all(barrier: str) -> None:
    """Waits until every process has called this function with the same `barrier`, a name for error messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(barrier)


GATHERED_BYTES = 4096  # the maximum size of the JSON that a process may pass to `gather`


def gather(value) -> list:
    """Returns the list of the values that all processes pass, in process order. Every process gets the same list.

    A value must be small and serialisable as JSON.

    >>> gather({"accuracy": 0.5})
    [{'accuracy': 0.5}]
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(GATHERED_BYTES, np.uint8)
    padded[: len(data)] = data
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in multihost_utils.process_allgather(padded)]


def make_mesh(sweep: int = 1) -> Mesh:
    """Makes a mesh over the devices of this process, with `sweep` rows of independent work.

    >>> make_mesh().shape["sweep"]
    1

    Raises:
      InputError: if the devices do not divide into `sweep` rows.
    """
    count = jax.local_device_count()
    if count % sweep:
        raise InputError(f"{count} devices do not divide into {sweep} rows of a sweep: use a divisor of {count}.")
    return _mesh((sweep, count // sweep), jax.local_devices())


def make_global_mesh() -> Mesh:
    """Makes a mesh over the devices of all processes. Every process must run each computation on it."""
    return _mesh((1, jax.device_count()), jax.devices())


def _mesh(shape, devices) -> Mesh:
    # jax.make_mesh makes Explicit axes by default, but this package relies on the compiler to propagate shardings.
    return jax.make_mesh(shape, ("sweep", "data"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def spans_processes(mesh: Mesh) -> bool:
    """Returns whether a mesh contains devices of more than one process.

    >>> spans_processes(make_mesh())
    False
    """
    return len({device.process_index for device in mesh.devices.flat}) > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding for arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Copies arrays to every device of the mesh. With several processes, all must pass the same values.

    >>> replicate({"w": np.zeros(3)}, make_mesh())["w"].sharding.is_fully_replicated
    True
    """
    if not spans_processes(mesh):
        return jax.device_put(tree, replicated(mesh))
    put = functools.partial(jax.make_array_from_process_local_data, replicated(mesh))
    return jax.tree.map(lambda x: put(np.asarray(x), np.shape(x)), tree)


def split(tree, mesh: Mesh, axis_name: str, dimension: int = 0):
    """Puts arrays on the mesh, with their axis `dimension` split over the mesh axis `axis_name`.

    On a mesh that spans several processes, each process passes its part of the global array.

    >>> mesh = make_mesh()
    >>> images = np.zeros((2 * mesh.shape["data"], 3))
    >>> split(images, mesh, "data").sharding.shard_shape(images.shape)
    (2, 3)
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * dimension, axis_name))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def constrain(tree, mesh: Mesh, axis_name: str):
    """Splits the leading axis of every array over `axis_name`. For use inside `jax.jit`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(axis_name)))


def keep_split(tree):
    """Splits the leading axis of every array over `data` of the mesh of the context, see `on_mesh`.

    For arrays that the compiler would not split by itself, such as images in a random order, so that each device would
    work on all of them. Without a mesh in the context, and within a `shard_map`, nothing is changed.

    >>> keep_split({"images": np.zeros((4, 2))})["images"].shape
    (4, 2)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.auto_axes:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("data")))


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Returns `function`, traced with `mesh` as the mesh of the context; for use inside `jax.jit`.

    Code that splits its own work over devices, such as a Pallas kernel, finds the mesh there.

    >>> mesh = make_mesh()
    >>> on_mesh(lambda: jax.sharding.get_abstract_mesh().shape["data"], mesh)() == mesh.shape["data"]
    True
    """

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> int:
    """Checks a global batch size and returns the batch size on each device.

    >>> mesh = make_mesh()
    >>> check_batch_size(32 * mesh.shape["data"], mesh, "config.pretrain.batch_size")
    32
    >>> check_batch_size(0, mesh, "config.pretrain.batch_size")
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: config.pretrain.batch_size = 0 ...

    Args:
      batch_size: number of images in a global batch, over all devices.
      field: the config field that holds it, for the error message.

    Raises:
      InputError: if the global batch does not divide evenly over the `data` axis. The message gives the nearest valid
        sizes.
    """
    count = mesh.shape["data"]
    if batch_size < 1 or batch_size % count:
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise InputError(
            f"{field} = {batch_size} is the global batch size and must be a positive multiple of the {count} devices "
            f"on the data axis: use {nearest}, or another multiple of {count}."
        )
    return batch_size // count


def check_microbatches(microbatches: int, device_batch: int, field: str, batch_field: str) -> None:
    """Checks that the images of a training step on one device divide into equal parts.

    >>> check_microbatches(5, 32, "config.finetune.microbatches", "config.finetune.batch_size")
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: config.finetune.microbatches = 5 must divide the 32 images ...

    Args:
      microbatches: number of parts.
      device_batch: number of images on each device, see `check_batch_size`.
      field, batch_field: the config fields that hold the number of parts and the batch size, for the error message.

    Raises:
      InputError: if they do not divide evenly. The message lists the valid numbers.
    """
    if device_batch % microbatches:
        valid = ", ".join(str(n) for n in range(1, device_batch + 1) if device_batch % n == 0)
        raise InputError(
            f"{field} = {microbatches} must divide the {device_batch} images that each device takes from a batch "
            f"({batch_field}): use one of {valid}."
        )


def has_cudnn_attention() -> bool:
    """Returns whether cuDNN's fused attention runs here: on NVIDIA GPUs of compute capability 8.0 or more.

    >>> has_cudnn_attention() and jax.default_backend() == "cpu"
    False
    """
    device = jax.local_devices()[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_cuda and float(device.compute_capability) >= 8


def kind() -> str:
    """Returns the kind of the devices: "cpu", "gpu" or "tpu".

    >>> kind() in ("cpu", "gpu", "tpu")
    True
    """
    return jax.default_backend()


def compute_dtype():
    """Returns the dtype of activations: bfloat16, or float32 on CPU, where bfloat16 is emulated and slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def steps_per_call(steps: int, limit: int = MAX_STEPS_PER_CALL) -> int:
    """Returns how many training steps one compiled call makes: a divisor of `steps`, so only one program is compiled.

    On accelerators this is a whole epoch if `limit` allows it. On CPU it is 1, because XLA's CPU backend computes the
    gradient of a convolution twenty to thirty times slower inside a loop than outside, with or without YNNPACK.

    >>> 390 % steps_per_call(390)
    0
    """
    if jax.default_backend() == "cpu":
        return 1
    return max(n for n in range(1, min(steps, limit) + 1) if steps % n == 0)


def unrolled(iterations: int) -> int:
    """Returns how many iterations of a loop over parts of a training step to unroll: `unroll` of `jax.lax.scan`.

    On accelerators none are, so that the program does not grow with their number. On CPU all are, for the reason given
    in `steps_per_call`.

    >>> unrolled(4) in (1, 4)
    True
    """
    return iterations if jax.default_backend() == "cpu" else 1


def max_steps_per_call(step_gigaflops: Callable[[], float]) -> int:
    """Returns how many training steps one compiled call may make.

    Args:
      step_gigaflops: function that returns the GFLOP of one step on one device; not called on CPU.

    >>> 1 <= max_steps_per_call(lambda: 10.0) <= MAX_STEPS_PER_CALL
    True
    """
    if jax.default_backend() == "cpu":
        return 1
    work = step_gigaflops()
    if not math.isfinite(work):  # some backends have no cost analysis
        return MAX_STEPS_PER_CALL
    return max(1, min(MAX_STEPS_PER_CALL, int(_SECONDS_PER_CALL * sustained_gigaflops_per_second() / work)))


def gigaflops(function, *args) -> float:
    """Returns the floating-point operations / 1e9 of one call, from the compiler's cost analysis. Nothing is run.

    The body of a loop counts only once, however many iterations it has: pass the body alone and multiply the result, or
    use `flops.gigaflops`.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((100, 100))
    >>> round(gigaflops(lambda x: x @ x, x), 4)
    0.002

    Returns:
      A float; NaN if the backend has no cost analysis.
    """
    cost: Any = jax.jit(function).lower(*args).cost_analysis() or {}
    return float(cost.get("flops", float("nan"))) / 1e9


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turns the error of a device without enough memory into a message of one line.

    >>> with explain_out_of_memory("use a smaller batch."):
    ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: Out of memory allocating 99 bytes: use a smaller batch.

    Args:
      advice: what to do about it.

    Raises:
      InputError: if the memory of a device does not suffice. Other errors pass through.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        code, _, reason = str(error).partition("\n")[0].partition(": ")
        if code != "RESOURCE_EXHAUSTED":
            raise
        raise InputError(f"{printable(reason).rstrip('.')}: {advice}") from error


def peak_memory() -> str:
    """Describes the largest amount of memory in use at any time since the start of the process.

    It is that of the fullest device of this process, or of the process itself if the devices do not report theirs, as
    on CPU.

    >>> peak_memory()
    'host memory so far at most ... GB'
    """
    host, device = peak_gigabytes()
    if device is None:
        return f"host memory so far at most {host:.1f} GB"
    fullest = _fullest_device()
    limit = f" of {fullest['bytes_limit'] / 1e9:.1f}" if "bytes_limit" in fullest else ""
    return f"device memory so far at most {device:.1f}{limit} GB"


def peak_gigabytes() -> tuple[float, float | None]:
    """Returns the peaks of memory, in GB, since the start of this process: its own, and that of its fullest device.

    The latter is None if the devices do not report theirs, as on CPU.

    >>> host, device = peak_gigabytes()
    >>> host > 0, device
    (True, None)
    """
    unit = 1 if sys.platform == "darwin" else 1024
    host = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    fullest = _fullest_device()
    return host, fullest["peak_bytes_in_use"] / 1e9 if fullest else None


def _fullest_device() -> dict[str, int]:
    """Returns the memory statistics of the device with the highest peak; empty if the devices do not report theirs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("peak_bytes_in_use" in each for each in stats):
        return {}
    return max(stats, key=lambda each: each["peak_bytes_in_use"])


@functools.cache
def sustained_gigaflops_per_second() -> float:
    """Returns a rough GFLOP/s rate for time estimates, measured once on the gradient of a small convolution."""

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
    """Keeps compiled programs on disk, so that a resumed run does not compile them again.

    Args:
      folder: where to keep them; JAX_COMPILATION_CACHE_DIR takes precedence.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]  defined at run time
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def description() -> str:
    """Describes the devices for the start of the log, such as "2 x NVIDIA H200 (gpu), bfloat16"."""
    devices = jax.devices()
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){hosts}"
    return f"{kind}, {jnp.dtype(compute_dtype()).name}"
