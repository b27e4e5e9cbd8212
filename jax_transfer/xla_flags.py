"""Flags of the XLA compiler that the package sets before JAX starts; imports neither JAX nor jaxlib."""

import importlib.util
import mmap
import os
import pathlib

FLAG = "xla_cpu_experimental_ynn_fusion_type"


def without_slow_convolutions(flags: str) -> str:
    """Returns XLA_FLAGS with YNNPACK's convolutions switched off, unless `flags` already sets their flag.

    They make the training step of a ResNet on a CPU about twice as slow as XLA's other convolutions, which
    `tests/benchmarks/train_step.py` shows with either setting of XLA_FLAGS. YNNPACK's matrix products and reductions
    are as fast or faster, and stay. A value that names a file of flags is returned as it is.

    >>> without_slow_convolutions("--xla_dump_to=/tmp")
    '--xla_dump_to=/tmp --xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
    >>> without_slow_convolutions("--xla_cpu_experimental_ynn_fusion_type=")
    '--xla_cpu_experimental_ynn_fusion_type='
    """
    if FLAG in flags or (flags.strip() and not flags.lstrip().startswith("-")):
        return flags
    return f"{flags} --{FLAG}=-individual_convolution".strip()


def is_known() -> bool:
    """Returns whether every installed copy of XLA knows the flag, since an unknown flag aborts the process.

    jaxlib is searched for the name, which takes some milliseconds. Plugins for accelerators bring their own copies, and
    where they are installed the speed on a CPU hardly matters: the answer is then False.
    """
    if any(importlib.util.find_spec(plugin) for plugin in ("libtpu", "jax_plugins")):
        return False
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return False
    return any(
        _contains(library, FLAG.encode()) for library in pathlib.Path(jaxlib.origin).parent.glob("libjax_common.*")
    )


def _contains(file: pathlib.Path, text: bytes) -> bool:
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def set_flags() -> None:
    """Sets XLA_FLAGS for this process, unless JAX has already compiled a program, and for those that it starts."""
    before = os.environ.get("XLA_FLAGS", "")
    after = without_slow_convolutions(before)
    if after != before and is_known():  # a process started by this one need not search jaxlib again
        os.environ["XLA_FLAGS"] = after
