"""What a run prints: log messages, progress bars with the time left, durations in words, and TensorBoard scalars."""

import logging
import pathlib
import sys
import warnings

import absl.logging
import tqdm

from jax_transfer import devices

log = logging.getLogger("jax_transfer")


def setup(level: int = logging.INFO) -> None:
    """Sends the project's messages to stderr, each with its time; other libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(_not_raised_again)
    sys.unraisablehook = _unraisable
    # Nor do the tasks matter that a failed save never came to.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def speak_for_all(first: bool) -> None:
    """Lets the first process log progress, the others only warnings."""
    log.setLevel(logging.INFO if first else logging.WARNING)


def _not_raised_again(record: logging.LogRecord) -> bool:
    """Drops what Orbax's threads and tasks log with a traceback: they also raise it, and it is then said in one line."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


def _unraisable(found) -> None:
    """Silences tasks of Orbax that end with its event loop after a failure; each would print a traceback."""
    loop_closed = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    code = getattr(found.object, "cr_code", None)  # of a coroutine
    if not (loop_closed or (code is not None and "orbax" in code.co_filename)):
        sys.__unraisablehook__(found)


def progress(total: int, what: str, unit: str) -> tqdm.tqdm:
    """A progress bar with rate and time left; call `.update(n)`, use as a context manager.

    A terminal sees it move; a log file gets a line every 20 seconds.
    """
    interactive = sys.stderr.isatty()
    return tqdm.tqdm(
        disable=not devices.is_first_process(),
        total=total,
        desc=what,
        unit=f" {unit}",
        mininterval=0.3 if interactive else 20,
        delay=0 if interactive else 20,
        dynamic_ncols=interactive,
        ncols=None if interactive else 110,
        leave=False,
        smoothing=0.1,
        file=sys.stderr,
    )


def tensorboard(workdir: pathlib.Path):
    """A TensorBoard writer (`tensorboardX.SummaryWriter`) that needs no TensorFlow. Only that of the first process writes."""
    import tensorboardX  # here, because it imports torch where that is installed

    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), write_to_disk=devices.is_first_process())


def duration(seconds: float) -> str:
    """Returns a time in words.

    >>> duration(35), duration(720), duration(12_000)
    ('35 s', '12 min', '3.3 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
