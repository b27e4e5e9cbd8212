"""Stopping on request: SIGTERM, which clusters send before they take a machine away.

Only pre-training holds state that is not on disk yet. It polls `requested` between steps, and saves its state before it
stops. At any other time, a single process exits immediately, while several processes stop together, before the next
stage or before they fine-tune the next checkpoint. The exit code is always EXIT_CODE, and running the same command
again resumes.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: the scripts in launch/ run the command again
MESSAGE = "Stopped on request (SIGTERM). Run the same command again to resume."


class Preempted(Exception):
    """The run was asked to stop and has saved what it needs to resume."""


_state = {"requested": False, "training": False}
_sync_points = itertools.count()


def listen() -> None:
    """Starts to listen for SIGTERM. Call it once, after `devices.join_processes`.

    With several processes, JAX listens instead and makes all of them stop at the same step.
    """
    if jax.process_count() > 1:
        return
    # Python calls signal handlers between two bytecode instructions, which can be minutes apart while a compiled
    # program runs. The wakeup file descriptor is written immediately, and a separate thread reads it.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()


def done() -> None:
    """Ignores SIGTERM from now on. Call it when everything is on disk and only the interpreter has to exit."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _watch(read_end: int) -> None:
    while signal_number := os.read(read_end, 1):
        if signal_number[0] == signal.SIGTERM:
            _handle_sigterm()


def _handle_sigterm() -> None:
    _state["requested"] = True
    if not _state["training"]:
        print(f"jax_transfer: {MESSAGE}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Defers SIGTERM: inside this context it only makes `requested` return True.

    Raises:
      Preempted: at the end of the context, if a stop was requested inside it.
    """
    _state["training"] = True
    try:
        yield
    finally:
        _state["training"] = False
    if _state["requested"]:
        raise Preempted


def stop_if_requested() -> None:
    """Ends the run if a stop was requested. Call it only when everything is on disk.

    With several processes, all of them must call this the same number of times.

    Raises:
      Preempted: if a stop was requested.
    """
    if requested():
        raise Preempted


def requested() -> bool:
    """Returns whether a stop was requested.

    With several processes, all of them must call this the same number of times, and all get the same answer.

    >>> requested()
    False
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return _state["requested"]
