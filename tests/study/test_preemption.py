"""SIGTERM saves at the next step and exits with 75; the same command resumes, also with several processes."""

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
from helpers.studies import TINY_COMMAND, checkpoint_fingerprints, environment, results_without_times
from helpers.training_parts import assert_equal_trees, feed_of, joined_feed, random_source, start_state, training_step
from jax_transfer import devices, preemption
from jax_transfer.records import InputError
from jax_transfer.training.loop import train
from jax_transfer.training.steps import many_steps

STEPS = 5  # an epoch of `random_source()`


def _fit(feed, total_steps, state=None, stop_after=None, begun=None, stop_at_epoch=None, pauses=()):
    """Trains; stops after so many steps of this call, or while that epoch is evaluated.

    Returns:
      The state, (number, loss, accuracy) of each epoch, and a list with the saved part of an unfinished epoch, if any.
    """
    step, optimizer = training_step()
    mesh, feed = devices.make_mesh(), joined_feed(feed, 8)
    num_steps, epochs, unfinished = 0, [], []

    def stop():
        nonlocal num_steps
        num_steps += 1
        return num_steps == stop_after

    for epoch in train(
        devices.replicate(state or start_state(optimizer, mesh), mesh),
        many_steps(step, feed.fetch, mesh),
        feed,
        seed=0,
        total_steps=total_steps,
        what="test",
        stop=stop,
        pauses=pauses,
        begun=begun,
    ):
        state = epoch.state
        if epoch.stopped or epoch.number == stop_at_epoch:
            unfinished.append(epoch.begun())
            break
        epochs.append((epoch.number, epoch.means["loss"], epoch.means["accuracy"]))
    return jax.device_get(state), epochs, unfinished


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["resident", "streamed"])
@pytest.mark.parametrize("stop_after", [1, STEPS + 2, 2 * STEPS], ids="after step {}".format)
def test_stopped_training_resumes_bit_for_bit(gigabytes, stop_after):
    feed = feed_of(random_source(), gigabytes)
    whole, epochs, _ = _fit(feed, 3 * STEPS)
    stopped, first, (begun,) = _fit(feed, 3 * STEPS, stop_after=stop_after)
    assert int(stopped["step"]) == stop_after and len(first) == (stop_after - 1) // STEPS
    assert len(begun["metrics"]["loss"]) == stop_after - len(first) * STEPS
    begun = json.loads(json.dumps(begun))  # as the checkpoint keeps it
    resumed, second, _ = _fit(feed, 3 * STEPS, state=stopped, begun=begun)
    assert_equal_trees(whole, resumed)
    assert first + second == epochs


@pytest.mark.parametrize("stop_after", [3, 4, STEPS, 7])
def test_training_with_pauses_resumes_bit_for_bit(stop_after):
    """If it stops at a pause, that pause comes again; those before it do not."""
    feed, pauses = feed_of(random_source()), (2, 4, 7)
    whole, epochs, _ = _fit(feed, 2 * STEPS, pauses=pauses)
    assert [number for number, *_ in epochs] == [1, 1, 1, 2, 2]
    stopped, first, (begun,) = _fit(feed, 2 * STEPS, stop_after=stop_after, pauses=pauses)
    left = [pause for pause in pauses if pause >= stop_after]
    begun = json.loads(json.dumps(begun))
    resumed, second, _ = _fit(feed, 2 * STEPS, state=stopped, begun=begun, pauses=left)
    assert_equal_trees(whole, resumed)
    assert first + second == epochs


def test_stop_during_evaluation_resumes_with_that_evaluation():
    feed = feed_of(random_source())
    whole, epochs, _ = _fit(feed, 3 * STEPS)
    stopped, first, (begun,) = _fit(feed, 3 * STEPS, stop_at_epoch=2)
    assert int(stopped["step"]) == 2 * STEPS and [row[0] for row in first] == [1]
    resumed, second, _ = _fit(feed, 3 * STEPS, state=stopped, begun=json.loads(json.dumps(begun)))
    assert_equal_trees(whole, resumed)
    assert first + second == epochs


ENDLESS = """
import jax
from jax_transfer import preemption
preemption.listen()
print("listening", flush=True)
jax.jit(lambda: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 7, 0))().block_until_ready()
"""


def test_sigterm_ends_the_command_during_a_compiled_call():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "listening\n"
        time.sleep(2)  # the endless loop is compiled and running
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == preemption.EXIT_CODE
    assert message.endswith("jax_transfer: Stopped on request (SIGTERM). Run the same command again to resume.\n")


@pytest.mark.parametrize(("work", "steps"), [(10.0, 50), (1e9, 1), (1e-9, 512), (float("nan"), 512)])
def test_compiled_calls_on_accelerators_stay_short(work, steps, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "sustained_gigaflops_per_second", lambda: 1000.0)
    assert devices.max_steps_per_call(lambda: work) == steps
    assert devices.steps_per_call(390, steps) == max(n for n in range(1, steps + 1) if 390 % n == 0)


def _start(workdir, *arguments, launcher=(sys.executable, "-m", "jax_transfer.main"), num_devices=1):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    variables = environment(PYTHON=sys.executable, XLA_FLAGS=flags)
    command = [*launcher, *TINY_COMMAND, f"--workdir={workdir}", *arguments]
    log = open(f"{workdir}.log", "a")  # noqa: SIM115  closed with the process
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=log, stderr=log), pathlib.Path(log.name)


def _wait_for(text, process, log, seconds=200):
    for _ in range(20 * seconds):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError(f"{text!r} is not in the log: {log.read_text()[-3000:]}")


PRETRAIN = (
    "--config.stages=('pretrain',)",
    "--config.pretrain.epochs=12",
    # Rounding differs with the number of devices. A larger rate magnifies it, and the losses differ after two epochs.
    "--config.pretrain.optimizer.learning_rate=0.002",
)


def _stopped_and_resumed(workdir, *launcher):
    """Stops a pre-training with SIGTERM after epoch 2 and resumes it; returns the seconds that stopping took."""
    arguments = {"launcher": launcher} if launcher else {}
    process, log = _start(workdir, *PRETRAIN, **arguments)
    _wait_for("epoch 2/12", process, log)
    stopped_at = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == preemption.EXIT_CODE, log.read_text()[-3000:]
    seconds = time.perf_counter() - stopped_at
    assert "is saved at step" in log.read_text() and "Traceback" not in log.read_text()
    assert (workdir / "stopped").is_dir()
    process, log = _start(workdir, *PRETRAIN, **arguments)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    assert "where it was stopped" in log.read_text() and not (workdir / "stopped").exists()
    return seconds


@pytest.mark.slow
def test_training_resumes_with_fewer_devices(uninterrupted, tmp_path):
    for num_devices, until in ((8, "epoch 2/12"), (4, "epoch 4/12"), (1, None)):
        process, log = _start(tmp_path / "run", *PRETRAIN, num_devices=num_devices)
        if until:
            _wait_for(until, process, log)
            process.send_signal(signal.SIGTERM)
        assert process.wait(200) == (preemption.EXIT_CODE if until else 0), log.read_text()[-3000:]
    assert log.read_text().count("where it was stopped") == 2
    _assert_same_losses(tmp_path / "run", uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process, log = _start(workdir, *PRETRAIN)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    return workdir


def test_sigterm_saves_in_ten_seconds_and_resumes_bit_for_bit(uninterrupted, tmp_path):
    assert _stopped_and_resumed(tmp_path / "run") < 10
    assert results_without_times(tmp_path / "run") == results_without_times(uninterrupted)
    assert checkpoint_fingerprints(tmp_path / "run") == checkpoint_fingerprints(uninterrupted)


def _assert_same_losses(workdir, uninterrupted):
    found, expected = (results_without_times(path)["pretrain.jsonl"] for path in (workdir, uninterrupted))
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected]
    losses = [[row["train_loss"] for row in rows[1:6]] for rows in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def _assert_close(found, expected):
    """Asserts that rows are equal, and numbers close: two processes add them in another order."""
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert len(found[name]) == len(rows), name
        if name == "embedding.jsonl":  # t-SNE magnifies the rounding
            continue
        for a, b in zip(found[name], rows, strict=True):
            assert a.keys() == b.keys()
            for key, value in b.items():
                is_numeric = isinstance(value, list) and not any(isinstance(x, str) for x in value)
                if not (isinstance(value, float) or is_numeric):
                    assert a[key] == value, f"{name} {key}"
                else:
                    np.testing.assert_allclose(a[key], value, rtol=2e-5, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_two_processes_stop_and_resume_together(uninterrupted, tmp_path):
    seconds = _stopped_and_resumed(tmp_path / "run", "bash", "launch/local_processes.sh", "2")
    assert seconds < 40  # two processes, possibly on one core, and the script that waits for them
    _assert_same_losses(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_two_processes_stop_before_fine_tuning_the_next_checkpoint(tmp_path):
    launcher = ("bash", "launch/local_processes.sh", "2")
    long = ("--config.finetune.epochs=20", "--config.pretrain.epochs=5", "--config.spectral.embedded_images=0")
    process, log = _start(tmp_path / "run", *long, launcher=launcher)
    _wait_for("finetune checkpoint 0", process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == preemption.EXIT_CODE, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text() and "Stage scores" not in log.read_text()
    process, log = _start(tmp_path / "run", *long, launcher=launcher)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    rows = results_without_times(tmp_path / "run")["transfer.jsonl"]
    assert sorted(row["epoch"] for row in rows if row["method"] == "finetune") == list(range(6))


@pytest.mark.slow
def test_study_resumes_after_one_of_two_processes_is_killed(uninterrupted, tmp_path):
    launcher = ("bash", "launch/local_processes.sh", "2")
    process, log = _start(tmp_path / "run", *PRETRAIN, launcher=launcher)
    _wait_for("epoch 2/12", process, log)
    pids = subprocess.run(["pgrep", "-f", f"process_id=1 .*{tmp_path}"], capture_output=True, text=True, check=True)
    os.kill(int(pids.stdout.split()[-1]), signal.SIGKILL)
    assert process.wait(120) not in (0, preemption.EXIT_CODE), log.read_text()[-3000:]
    process, log = _start(tmp_path / "run", *PRETRAIN, launcher=launcher)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    assert "after epoch" in log.read_text()
    _assert_same_losses(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["resident", "streamed"])
def test_study_with_two_processes_equals_one_process(gigabytes, tmp_path):
    data = f"--config.data.resident_gigabytes={gigabytes}"
    alone, log = _start(tmp_path / "one", data)
    assert alone.wait(400) == 0, log.read_text()[-3000:]
    both, log = _start(tmp_path / "two", data, launcher=("bash", "launch/local_processes.sh", "2"))
    assert both.wait(400) == 0, log.read_text()[-3000:]
    assert "2 processes" in log.read_text()
    _assert_close(results_without_times(tmp_path / "two"), results_without_times(tmp_path / "one"))
    for path in (*(tmp_path / "two" / "features").glob("*.npz"), tmp_path / "two" / "results" / "spectral.jsonl"):
        path.unlink()
    both, log = _start(tmp_path / "two", data, launcher=("bash", "launch/local_processes.sh", "2"))
    assert both.wait(400) == 0, log.read_text()[-3000:]
    assert "their features are missing" in log.read_text()
    _assert_close(results_without_times(tmp_path / "two"), results_without_times(tmp_path / "one"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator_address": "localhost:1"}, "Missing num_processes and process_id"),
        ({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2}, "process_id = 2: .* 0 to 1"),
    ],
)
def test_inconsistent_process_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        devices.join_processes(**arguments)


def test_environment_variables_join_processes(monkeypatch):
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


def test_gather_and_wait_are_trivial_for_one_process():
    assert devices.gather({"a": 1}) == [{"a": 1}] and devices.is_first_process()
    devices.wait_for_all("x")
