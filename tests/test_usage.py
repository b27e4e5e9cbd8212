"""The line that says what a stage took: compilation counted once, memory, and nothing after an error."""

import itertools
import logging
import re
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import run_command
from jax_transfer import devices, usage


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20))))
def test_joined_spans_cover_each_second_once(drawn):
    spans: list = []
    for end, length in sorted(drawn):
        spans = usage.with_span(spans, (end - length, end))
    covered = {second for end, length in drawn for second in range(end - length, end)}
    assert sum(end - start for start, end in spans) == len(covered)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


def test_compilation_of_several_threads_takes_no_longer_than_the_clock_says():
    inner = jax.jit(lambda x: jnp.sin(x) @ x)
    functions = [jax.jit(lambda x, n=n: inner(inner(x)) + n) for n in range(4)]
    with usage.counted() as compilation:
        start = time.perf_counter()
        threads = [threading.Thread(target=function, args=(jnp.ones((8, 8)),)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passed = time.perf_counter() - start
    assert compilation.programs >= 4 and 0 < compilation.seconds <= passed
    seconds = compilation.seconds
    jax.jit(lambda x: x - 1)(jnp.ones(3))
    assert compilation.seconds == seconds  # it no longer listens


def test_second_run_compiles_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    caplog.set_level(logging.INFO, logger="jax_transfer")
    function, x = jax.jit(lambda x: jnp.cos(x) * 3), jnp.ones((3, 3))
    for _ in range(2):
        with usage.reported("Stage toy"):
            function(x).block_until_ready()
    compiling = r"of which 1 s compiling \(1 program(, 1 from the cache)?\)"
    memory = r"(host|device) memory so far at most [\d.]+( of [\d.]+)? GB"
    assert re.fullmatch(f"Stage toy: 1 s, {compiling}; {memory}", caplog.messages[0])
    assert re.fullmatch(f"Stage toy: 1 s, nothing compiled; {memory}", caplog.messages[1])
    with pytest.raises(ValueError), usage.reported("Stage toy"):
        raise ValueError
    assert len(caplog.messages) == 2


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(peak, **limit):
        return types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak, **limit})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(2e9, bytes_limit=8e9), device(5.1e9, bytes_limit=7.8e10)])
    assert devices.peak_memory() == "device memory so far at most 5.1 of 78.0 GB"
    monkeypatch.setattr(jax, "local_devices", lambda: [device(3e9)])
    assert devices.peak_memory() == "device memory so far at most 3.0 GB"
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: None)])
    assert re.fullmatch(r"host memory so far at most \d+\.\d GB", devices.peak_memory())


OUT_OF_MEMORY = """
import jax
from jax_transfer import main
from jax_transfer.training import steps
from jax_transfer.study import pretrain
def many_steps(*_):
    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating 9 bytes.")
    return run
pretrain.many_steps = many_steps
main.run()
"""


def test_study_that_does_not_fit_resumes_with_remat(tmp_path):
    stages = ("--config.stages=('pretrain',)", "--config.pretrain.epochs=1")
    done = run_command(tmp_path, *stages, code=("-c", OUT_OF_MEMORY))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "jax_transfer: Out of memory while allocating 9 bytes: add --config.pretrain.remat=True to the command to"
    )
    done = run_command(tmp_path, *stages, "--config.pretrain.remat=True")
    assert done.returncode == 0 and "epoch 1/1" in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Stage pretrain: " in line]
    assert len(lines) == 1 and "compiling" in lines[0] and "memory so far at most" in lines[0]
