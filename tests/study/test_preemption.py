"""SIGTERM saves at the next step and exits with code 75, and the same command resumes to the same bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from helpers.studies import TINY_COMMAND, checkpoint_fingerprints, results_without_times
from helpers.training_parts import assert_equal_trees, feed_of, joined_feed, random_source, start_state, training_step
from jax_transfer import devices, preemption
from jax_transfer.records import InputError
from jax_transfer.training.loop import train
from jax_transfer.training.steps import many_steps

STEPS = 5  # an epoch of `random_source()`


def _fit(feed, total_steps, state=None, stop_after=None, begun=None, stop_at_epoch=None):
    """Returns (state, rows of epochs, metrics of stopped epochs); stops after some steps, or while an epoch is tested."""
    step, optimizer = training_step()
    mesh, feed = devices.make_mesh(), joined_feed(feed, 8)
    asked, epochs, left = [0], [], []

    def stop():
        asked[0] += 1
        return asked[0] == stop_after

    for epoch in train(
        devices.replicate(state or start_state(optimizer, mesh), mesh),
        many_steps(step, feed.fetch, mesh),
        feed,
        seed=0,
        total_steps=total_steps,
        what="test",
        stop=stop,
        begun=begun,
    ):
        state = epoch.state
        if epoch.stopped or epoch.number == stop_at_epoch:
            left.append(epoch.begun())
            break
        epochs.append((epoch.number, epoch.means["loss"], epoch.means["accuracy"]))
    return jax.device_get(state), epochs, left


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["resident", "streamed"])
@pytest.mark.parametrize("stop_after", [1, STEPS + 2, 2 * STEPS], ids="after step {}".format)
def test_a_training_stopped_anywhere_goes_on_to_the_same_bits(gigabytes, stop_after):
    feed = feed_of(random_source(), gigabytes)
    whole, epochs, _ = _fit(feed, 3 * STEPS)
    half, first, (begun,) = _fit(feed, 3 * STEPS, stop_after=stop_after)
    assert int(half["step"]) == stop_after and len(first) == (stop_after - 1) // STEPS
    assert len(begun["metrics"]["loss"]) == stop_after - len(first) * STEPS
    begun = json.loads(json.dumps(begun))  # as the checkpoint keeps it
    rest, second, _ = _fit(feed, 3 * STEPS, state=half, begun=begun)
    assert_equal_trees(whole, rest)
    assert first + second == epochs


def test_a_stop_while_an_epoch_is_evaluated_goes_on_with_its_evaluation():
    feed = feed_of(random_source())
    whole, epochs, _ = _fit(feed, 3 * STEPS)
    half, first, (begun,) = _fit(feed, 3 * STEPS, stop_at_epoch=2)
    assert int(half["step"]) == 2 * STEPS and [row[0] for row in first] == [1]
    rest, second, _ = _fit(feed, 3 * STEPS, state=half, begun=json.loads(json.dumps(begun)))
    assert_equal_trees(whole, rest)
    assert first + second == epochs


LONG = """
import jax
from jax_transfer import preemption
preemption.listen()
print("listening", flush=True)
jax.jit(lambda: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 7, 0))().block_until_ready()
"""


def test_sigterm_ends_the_program_also_while_a_compiled_program_runs():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "listening\n"
        time.sleep(2)  # the loop without an end is compiled and running
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == preemption.EXIT_CODE
    assert said.endswith("jax_transfer: Stopped on request (SIGTERM). Run the same command again to resume.\n")


@pytest.mark.parametrize(("work", "steps"), [(10.0, 50), (1e9, 1), (1e-9, 512), (float("nan"), 512)])
def test_a_compiled_call_on_an_accelerator_is_short_enough_to_stop(work, steps, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "sustained_gigaflops_per_second", lambda: 1000.0)
    assert devices.max_steps_per_call(lambda: work) == steps
    assert devices.steps_per_call(390, steps) == max(n for n in range(1, steps + 1) if 390 % n == 0)


def _run(workdir, *arguments, launcher=(sys.executable, "-m", "jax_transfer.main"), num_devices=1):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    command = [*launcher, *TINY_COMMAND, f"--workdir={workdir}", *arguments]
    log = open(f"{workdir}.log", "a")  # noqa: SIM115  closed with the process
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log), pathlib.Path(log.name)


def _wait_for(text, process, log, seconds=200):
    for _ in range(20 * seconds):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError(f"{text!r} was not said: {log.read_text()[-3000:]}")


PRETRAIN = (
    "--config.stages=('pretrain',)",
    "--config.pretrain.epochs=12",
    # A larger one magnifies the rounding, which depends on the number of devices: after two epochs the losses differ.
    "--config.pretrain.optimizer.learning_rate=0.002",
)


def _stopped_and_resumed(workdir, *launcher):
    """Runs a pre-training that gets SIGTERM after its second epoch, then again; returns how long the stop took."""
    arguments = {"launcher": launcher} if launcher else {}
    process, log = _run(workdir, *PRETRAIN, **arguments)
    _wait_for("epoch 2/12", process, log)
    told = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == preemption.EXIT_CODE, log.read_text()[-3000:]
    seconds = time.perf_counter() - told
    assert "is saved at step" in log.read_text() and "Traceback" not in log.read_text()
    assert (workdir / "stopped").is_dir()
    process, log = _run(workdir, *PRETRAIN, **arguments)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    assert "where it was stopped" in log.read_text() and not (workdir / "stopped").exists()
    return seconds


@pytest.mark.slow
def test_a_training_begun_on_eight_devices_goes_on_with_four_and_with_one(uninterrupted, tmp_path):
    for num_devices, until in ((8, "epoch 2/12"), (4, "epoch 4/12"), (1, None)):
        process, log = _run(tmp_path / "run", *PRETRAIN, num_devices=num_devices)
        if until:
            _wait_for(until, process, log)
            process.send_signal(signal.SIGTERM)
        assert process.wait(200) == (preemption.EXIT_CODE if until else 0), log.read_text()[-3000:]
    assert log.read_text().count("where it was stopped") == 2
    _same_losses(tmp_path / "run", uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process, log = _run(workdir, *PRETRAIN)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    return workdir


def test_sigterm_saves_within_ten_seconds_and_the_same_command_ends_with_the_same_bits(uninterrupted, tmp_path):
    assert _stopped_and_resumed(tmp_path / "run") < 10
    assert results_without_times(tmp_path / "run") == results_without_times(uninterrupted)
    assert checkpoint_fingerprints(tmp_path / "run") == checkpoint_fingerprints(uninterrupted)


def _same_losses(workdir, uninterrupted):
    found, expected = (results_without_times(path)["pretrain.jsonl"] for path in (workdir, uninterrupted))
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected]
    losses = [[row["train_loss"] for row in rows[1:6]] for rows in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def _close(found, expected):
    """The same rows, numbers to 1e-5: two processes add up in another order."""
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert len(found[name]) == len(rows), name
        if name == "embedding.jsonl":  # t-SNE magnifies the rounding
            continue
        for a, b in zip(found[name], rows, strict=True):
            assert a.keys() == b.keys()
            for key, value in b.items():
                if not isinstance(value, float | list):
                    assert a[key] == value, f"{name} {key}"
                else:
                    np.testing.assert_allclose(a[key], value, rtol=2e-5, atol=1e-5, err_msg=f"{name} {key}")


def test_two_processes_give_the_rows_of_one_and_stop_and_go_on_together(uninterrupted, tmp_path):
    seconds = _stopped_and_resumed(tmp_path / "run", "bash", "launch/local_processes.sh", "2")
    assert seconds < 40  # two processes on what may be one core, and the script that waits for them
    _same_losses(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_two_processes_stop_before_the_next_checkpoint_to_fine_tune(tmp_path):
    launcher = ("bash", "launch/local_processes.sh", "2")
    long = ("--config.finetune.epochs=20", "--config.pretrain.epochs=5", "--config.spectral.embedded_images=0")
    process, log = _run(tmp_path / "run", *long, launcher=launcher)
    _wait_for("finetune checkpoint 0", process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == preemption.EXIT_CODE, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text() and "Stage scores" not in log.read_text()
    process, log = _run(tmp_path / "run", *long, launcher=launcher)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    tuned = [
        row["epoch"] for row in results_without_times(tmp_path / "run")["transfer.jsonl"] if row["method"] == "finetune"
    ]
    assert sorted(tuned) == list(range(6))


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_same_command_gives_the_rows_of_one(uninterrupted, tmp_path):
    launcher = ("bash", "launch/local_processes.sh", "2")
    process, log = _run(tmp_path / "run", *PRETRAIN, launcher=launcher)
    _wait_for("epoch 2/12", process, log)
    found = subprocess.run(["pgrep", "-f", f"process_id=1 .*{tmp_path}"], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    assert process.wait(120) not in (0, preemption.EXIT_CODE), log.read_text()[-3000:]
    process, log = _run(tmp_path / "run", *PRETRAIN, launcher=launcher)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    assert "after epoch" in log.read_text()
    _same_losses(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["resident", "streamed"])
def test_a_whole_study_of_two_processes_gives_the_rows_of_one(gigabytes, tmp_path):
    data = f"--config.data.resident_gigabytes={gigabytes}"
    alone, log = _run(tmp_path / "one", data)
    assert alone.wait(400) == 0, log.read_text()[-3000:]
    both, log = _run(tmp_path / "two", data, launcher=("bash", "launch/local_processes.sh", "2"))
    assert both.wait(400) == 0, log.read_text()[-3000:]
    assert "2 processes" in log.read_text()
    _close(results_without_times(tmp_path / "two"), results_without_times(tmp_path / "one"))
    for path in (*(tmp_path / "two" / "features").glob("*.npz"), tmp_path / "two" / "results" / "spectral.jsonl"):
        path.unlink()
    both, log = _run(tmp_path / "two", data, launcher=("bash", "launch/local_processes.sh", "2"))
    assert both.wait(400) == 0, log.read_text()[-3000:]
    assert "tuned again" in log.read_text()
    _close(results_without_times(tmp_path / "two"), results_without_times(tmp_path / "one"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator_address": "localhost:1"}, "Missing num_processes and process_id"),
        ({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2}, "process_id = 2: .* 0 to 1"),
    ],
)
def test_processes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        devices.join_processes(**arguments)


def test_the_environment_joins_processes(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: joined.append(kwargs))
    devices.join_processes()
    assert not joined
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    devices.join_processes()
    assert joined.pop() == {}
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    devices.join_processes()
    assert joined.pop() == {}
    for name, value in (("COORDINATOR_ADDRESS", "h:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAX_{name}", value)
    devices.join_processes()
    assert joined.pop() == {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match="must be whole numbers"):
        devices.join_processes()


def test_gather_and_wait_are_nothing_for_one_process():
    assert devices.gather({"a": 1}) == [{"a": 1}] and devices.is_first_process()
    devices.wait_for_all("x")
