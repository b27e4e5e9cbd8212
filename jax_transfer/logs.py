"""Output of a run: log messages, progress bars with the remaining time, readable durations, and TensorBoard scalars."""

import contextlib
import logging
import pathlib
import sys
import warnings

import absl.logging
import tqdm

from jax_transfer import devices

log = logging.getLogger("jax_transfer")


def setup(level: int = logging.INFO) -> None:
    """Logs the project's messages to stderr with the time of day. Other libraries log only warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(_not_raised_again)
    sys.unraisablehook = _unraisable
    # A failed save leaves behind tasks that never started. The failure itself is reported elsewhere.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def speak_for_all(first: bool) -> None:
    """Lets only the first process log progress; the others log only warnings and errors."""
    log.setLevel(logging.INFO if first else logging.WARNING)


def _not_raised_again(record: logging.LogRecord) -> bool:
    """Drops tracebacks that Orbax's threads and tasks log, because they also raise the error and `main` shows it."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


def _unraisable(unraisable) -> None:
    """Silences Orbax tasks whose event loop closes after a failure; otherwise each would print a traceback."""
    error = unraisable.exc_value
    loop_closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    code = getattr(unraisable.object, "cr_code", None)  # set if the object is a coroutine
    if not (loop_closed or (code is not None and "orbax" in code.co_filename)):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def muted():
    """Drops the project's messages within a block that repeats work whose messages have been logged.

    >>> with muted():
    ...     log.warning("again")
    """
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def progress(total: int, label: str, unit: str) -> tqdm.tqdm:
    """Makes a progress bar that shows the rate and the remaining time: a context manager with `.update(n)`.

    On a terminal the bar is updated in place; a log file gets a new line every 20 seconds.

    >>> with progress(10, "read mnist", "images") as bar:
    ...     _ = bar.update(10)
    """
    interactive = sys.stderr.isatty()
    return tqdm.tqdm(
        disable=not devices.is_first_process(),
        total=total,
        desc=label,
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
    """Opens a TensorBoard writer, which needs no TensorFlow. Only the first process writes."""
    import tensorboardX  # imported here because it imports torch if that is installed

    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), write_to_disk=devices.is_first_process())


def duration(seconds: float) -> str:
    """Formats a duration with a suitable unit.

    >>> duration(35), duration(720), duration(12_000)
    ('35 s', '12 min', '3.3 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
