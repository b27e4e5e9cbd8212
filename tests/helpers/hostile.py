"""Shared by the tests of bad input: the number of examples, a watchdog, and the required form of errors.

By default each property is tested with a few dozen examples. The campaign tests and counts many more:

    BAD_INPUT_EXAMPLES=1000 BAD_INPUT_REPORT=campaign.json python -m pytest -n0 tests/bad_input

Examples are drawn from fixed seeds, so that both are reproducible.
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
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
SECONDS = 20


def examples(default: int, most: int = 10**6):
    """Returns settings for `default` examples; in the campaign for BAD_INPUT_EXAMPLES, but at most `most`."""
    return hypothesis.settings(
        max_examples=min(EXAMPLES, most) if EXAMPLES else default,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@contextlib.contextmanager
def watchdog(seconds: int = SECONDS):
    """Raises TimeoutError after `seconds` and prints all stacks; ends the process if it still runs later."""

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
    """Returns `use()`, or None after a one-line InputError that contains one of `names`.

    Any other exception is propagated, so that the test fails.
    """
    try:
        with watchdog():
            result = use()
    except InputError as error:
        message = str(error)
        assert message == printable(message), f"not a single printable line: {message!r}"
        assert not names or any(printable(name) in message for name in names), f"{message!r} names none of {names}"
        COUNTS[kind]["refused"] += 1
        return None
    COUNTS[kind]["accepted"] += 1
    return result


def write_report() -> None:
    """Adds the counts of examples to the file BAD_INPUT_REPORT."""
    if path := os.environ.get("BAD_INPUT_REPORT"):
        file = pathlib.Path(path)
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, **{kind: dict(count) for kind, count in COUNTS.items()}}, indent=1))
