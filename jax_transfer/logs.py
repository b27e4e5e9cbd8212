"""What a run says: progress with the time left, result rows as JSON lines, TensorBoard scalars."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import socket
import sys
import threading
import warnings

import absl.logging
import tqdm

from jax_transfer import devices
from jax_transfer.records import ROWS, InputError, from_json_dict, is_current, to_json_dict

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


class Rows:
    """One results file: rows appended and flushed, a torn last line dropped with a warning.

    A row whose key fields equal those of an earlier row is not written again, so a stage that is
    repeated after a kill adds only what is missing. Rows that an older version of jax_transfer computed do not
    count; the first stage that writes removes them from the file. Only the first process writes.

    Raises:
      InputError: if a newer version wrote the file, or a line is not what this version writes.
    """

    def __init__(self, results: pathlib.Path, name: str):
        self.name, self.path = name, results / f"{name}.jsonl"
        self.row_type, self.key_fields = ROWS[name]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [self._read(number, line) for number, line in enumerate(self._whole_lines(), start=1)]
        self.rows = [
            self._row(values)
            for number, values in enumerate(lines, start=1)
            if is_current(name, values, f"{self.path}: line {number}")
        ]
        self._num_older = len(lines) - len(self.rows)
        self._keys = set(map(self.key, self.rows))
        self._lock = threading.Lock()

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data) and devices.is_first_process():
            log.warning("%s ends in a torn line (a run was killed while it wrote): the line is dropped.", self.path)
            with open(self.path, "r+b") as file:
                file.truncate(end)
        return data[:end].decode().split("\n")[:-1]  # not splitlines: a name may hold other line separators

    def _read(self, number: int, line: str) -> dict:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.path}: line {number} is not JSON ({error}); remove or repair it.") from error
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: line {number} is not a JSON object; remove or repair it.")
        return values

    def _row(self, values: dict):
        try:
            return from_json_dict(self.row_type, values)
        except TypeError as error:
            raise InputError(
                f"{self.path} was changed, or written by another version of jax_transfer: a line has other fields than "
                f"{', '.join(field.name for field in dataclasses.fields(self.row_type))}. Use another --workdir."
            ) from error

    def key(self, row) -> tuple:
        return tuple(getattr(row, field) for field in self.key_fields)

    def __contains__(self, key: tuple) -> bool:
        return key in self._keys

    def append(self, row) -> None:
        if self.key(row) in self:
            return
        if self._num_older:
            self.replace(self.rows)
        if devices.is_first_process():
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)
        self._keys.add(self.key(row))

    def forget_failures(self) -> None:
        """Drops the rows of what failed and of older versions, so that they are computed again."""
        if self._num_older or any(row.error for row in self.rows):
            self.replace([row for row in self.rows if not row.error])

    def replace(self, rows) -> None:
        """Writes the whole file anew; a kill leaves the old file or the new one."""
        if self._num_older and devices.is_first_process():
            log.warning("%s: %s.", self.path, older(self._num_older, "computed again"))
        self._num_older = 0
        self.rows = list(rows)
        self._keys = set(map(self.key, self.rows))
        if devices.is_first_process():
            write_atomically(self.path, "".join(map(_line, self.rows)).encode())


def older(count: int, what: str) -> str:
    """What a message says of rows of an older version; `what` is done with them."""
    rows, were, are = ("1 row", "was", "is") if count == 1 else (f"{count:,} rows", "were", "are")
    return f"{rows} {were} computed by an older version of jax_transfer and {are} {what}"


def _line(row) -> str:
    # NaN is no JSON: a value that does not exist is null.
    values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in to_json_dict(row).items()}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def tensorboard(workdir: pathlib.Path):
    """A TensorBoard writer (`tensorboardX.SummaryWriter`) that needs no TensorFlow. Only that of the first process writes."""
    import tensorboardX  # here, because it imports torch where that is installed

    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), write_to_disk=devices.is_first_process())
