"""What the tests of bad input share: how many examples they try, a watchdog, and what a refusal must look like.

By default each property is tried on a few dozen examples. The campaign tries many more of the same, and counts them:

    BAD_INPUT_EXAMPLES=1000 BAD_INPUT_REPORT=campaign.json python -m pytest -n0 tests/bad_input

Examples are drawn from fixed seeds, so both give the same examples again.
"""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import signal
import threading

import hypothesis

from jax_transfer.records import InputError, printable

EXAMPLES = int(os.environ.get("BAD_INPUT_EXAMPLES", "0"))
TRIED: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
SECONDS = 20


def examples(default: int, most: int = 10**6):
    """How often a property is tried: `default` times, in the campaign BAD_INPUT_EXAMPLES times but at most `most`."""
    return hypothesis.settings(
        max_examples=min(EXAMPLES, most) if EXAMPLES else default,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@contextlib.contextmanager
def watchdog(seconds: int = SECONDS):
    """Fails what takes longer; prints where all threads are, and ends the process if even that does not stop it."""

    def fail(signum, frame):
        faulthandler.dump_traceback(all_threads=True)
        raise TimeoutError(f"took more than {seconds} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def accepted_or_refused(kind: str, use, *names: str):
    """Calls `use()`; returns what it gives, or None after an InputError of one line that holds one of `names`.

    Any other exception goes through, and with it the test fails.
    """
    try:
        with watchdog():
            found = use()
    except InputError as error:
        said = str(error)
        assert said == printable(said), f"not one line that can be written: {said!r}"
        assert not names or any(printable(name) in said for name in names), f"{said!r} names none of {names}"
        TRIED[kind]["refused"] += 1
        return None
    TRIED[kind]["accepted"] += 1
    return found


def write_report() -> None:
    """Adds what was tried to the file BAD_INPUT_REPORT."""
    if path := os.environ.get("BAD_INPUT_REPORT"):
        file = pathlib.Path(path)
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, **{kind: dict(count) for kind, count in TRIED.items()}}, indent=1))
