"""Being told to stop: SIGTERM, which clusters send before they take a machine away.

Only a pre-training holds what is not on disk yet: it polls `requested` between steps, saves and ends. Everywhere else the
program ends at once; several processes, which must agree, before the next stage or checkpoint to fine-tune. Either way the
exit code is EXIT_CODE, and the same command resumes.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: the scripts in launch/ run the command again


class Preempted(Exception):
    """The run was told to stop and has saved what it needs to go on."""


_state = {"requested": False, "training": False}
_sync_points = itertools.count()


def listen() -> None:
    """To be called once, after `devices.join_processes`.

    Of several processes JAX listens itself, and sees to it that all stop at the same step.
    """
    if jax.process_count() > 1:
        return
    # Python calls a handler between two of its own instructions, which can be minutes apart while a compiled program runs.
    # So a thread of its own reads what the signal writes at once.
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def done() -> None:
    """All is on disk: a signal that comes while the interpreter ends changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _watch(read: int) -> None:
    while number := os.read(read, 1):
        if number[0] == signal.SIGTERM:
            _told()


def _told() -> None:
    _state["requested"] = True
    if not _state["training"]:
        print(
            "jax_transfer: stopped on request (SIGTERM). Run the same command again to resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)


@contextlib.contextmanager
def training():
    """Inside, SIGTERM only makes `requested` true."""
    _state["training"] = True
    try:
        yield
    finally:
        _state["training"] = False
    if _state["requested"]:
        raise Preempted


def stop_if_requested() -> None:
    """Of several processes all must call this equally often.

    Raises:
      Preempted: to end here, for all is on disk.
    """
    if requested():
        raise Preempted


def requested() -> bool:
    """Whether to stop now. Of several processes all must ask equally often, and all get the same answer."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return _state["requested"]
