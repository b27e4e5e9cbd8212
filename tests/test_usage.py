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

from helpers.studies import one_epoch_config, run_command
from jax_transfer import devices, study, usage
from jax_transfer.results import read_rows
from jax_transfer.study import runner


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


@pytest.mark.slow
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


def test_each_finished_run_of_a_stage_adds_a_row(tmp_path):
    config = one_epoch_config(stages=("report",))
    for runs in (1, 2):
        study.run(config, tmp_path)
        rows = read_rows(tmp_path / "results/usage.jsonl")
        assert [(row["stage"], row["run"]) for row in rows] == [("report", 1), ("report", 2)][:runs]
    assert all(row["seconds"] >= row["compile_seconds"] >= 0 and row["host_gigabytes"] > 0 for row in rows)
    assert {row["device_gigabytes"] for row in rows} == {None}
    text = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "<h2>Time and memory</h2>" in text  # of the first run, since a page cannot hold its own time


def test_only_the_first_process_records_what_a_stage_took(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "is_first_process", lambda: False)
    runner.record_usage(tmp_path / "results", "probe", usage.Usage(1.0, 0.5, 2, 0.1, None))
    assert not (tmp_path / "results").exists()
