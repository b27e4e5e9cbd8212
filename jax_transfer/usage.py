"""What a part of a run takes: time, the share of it that is compilation, and memory."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import jax

from jax_transfer import devices
from jax_transfer.logs import duration, log

# Events of JAX. Each of the durations is part of compiling a program; they may overlap, see `Compilation`.
_PROGRAM = "/jax/core/compile/backend_compile_duration"
_DURATIONS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _PROGRAM,
)
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Compilation:
    """The compilation during a part of a run, in all threads.

    Attributes:
      programs: number of compiled programs, including those read from the cache on disk.
      cached: number of programs read from the cache on disk.
    """

    def __init__(self):
        self.programs = self.cached = 0
        self._spans: list[tuple[float, float]] = []  # disjoint, in ascending order
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Time during which at least one thread traced, lowered or compiled a program."""
        return sum(end - start for start, end in self._spans)

    def add_duration(self, event: str, duration_secs: float, **_) -> None:
        """Adds something that has just ended after `duration_secs`; a listener of `jax.monitoring`."""
        if event in _DURATIONS:
            end = time.perf_counter()
            with self._lock:
                self.programs += event == _PROGRAM
                self._spans = with_span(self._spans, (end - duration_secs, end))

    def add_event(self, event: str, **_) -> None:
        """Adds an event without a duration; a listener of `jax.monitoring`."""
        if event == _CACHE_HIT:
            with self._lock:
                self.cached += 1

    def __str__(self):
        if not self.programs:
            return "nothing compiled"
        cached = f", {self.cached} from the cache" if self.cached else ""
        plural = "" if self.programs == 1 else "s"
        return f"of which {duration(self.seconds)} compiling ({self.programs} program{plural}{cached})"


def with_span(spans: list[tuple[float, float]], last: tuple[float, float]) -> list[tuple[float, float]]:
    """Adds a span of time to disjoint ones, and joins those that overlap.

    Tracing a program includes tracing the functions that it calls, and threads compile at the same time; joined spans
    count no second twice.

    Args:
      spans: disjoint spans (start, end) in ascending order.
      last: a span that ends last.

    >>> with_span([(0.0, 1.0), (3.0, 4.0), (4.5, 5.0)], (3.5, 6.0))
    [(0.0, 1.0), (3.0, 6.0)]
    """
    before = [span for span in spans if span[1] < last[0]]
    start = min([last[0], *(span[0] for span in spans[len(before) :])])
    return [*before, (start, last[1])]


@contextlib.contextmanager
def counted() -> Iterator[Compilation]:
    """Counts the compilation within the `with` statement.

    >>> with counted() as compilation:
    ...     _ = jax.jit(lambda x: x + 1)(0)
    >>> compilation.programs > 0 and compilation.seconds > 0
    True
    """
    compilation = Compilation()
    jax.monitoring.register_event_duration_secs_listener(compilation.add_duration)
    jax.monitoring.register_event_listener(compilation.add_event)
    try:
        yield compilation
    finally:
        jax.monitoring.unregister_event_duration_listener(compilation.add_duration)
        jax.monitoring.unregister_event_listener(compilation.add_event)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a part of a run took.

    Attributes:
      compile_seconds: time during which at least one thread compiled, part of `seconds`.
      num_programs: number of compiled programs.
      host_gigabytes, device_gigabytes: see `devices.peak_gigabytes`.
    """

    seconds: float
    compile_seconds: float
    num_programs: int
    host_gigabytes: float
    device_gigabytes: float | None


@contextlib.contextmanager
def reported(what: str, record: Callable[[Usage], None] = lambda used: None) -> Iterator[None]:
    """Logs the time, the compilation and the memory of the `with` statement, unless it raises an error.

    The line reads "Stage features: 41 s, of which 12 s compiling (3 programs); device memory so far at most 5.1 of 78.0
    GB". The memory is the peak since the start of the process, because a peak cannot be reset.

    Args:
      what: the beginning of the line.
      record: called at the end with the numbers, unless the `with` statement raises an error.

    >>> with reported("Stage toy", lambda used: print(used.num_programs)):
    ...     pass
    0
    """
    start = time.perf_counter()
    with counted() as compilation:
        yield
    seconds = time.perf_counter() - start
    log.info("%s: %s, %s; %s", what, duration(seconds), compilation, devices.peak_memory())
    record(Usage(seconds, compilation.seconds, compilation.programs, *devices.peak_gigabytes()))
