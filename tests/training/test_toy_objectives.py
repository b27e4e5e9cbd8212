"""Studies with two unusual objectives: MoCo v2, with much state, and one from outside the package with two feeds."""

import contextlib
import functools
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.source_files import REPOSITORY, get_config
from helpers.studies import results_without_times
from jax_transfer import preemption, study
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.models.net import gaussian
from jax_transfer.records import InputError
from jax_transfer.study import checks
from jax_transfer.study import pretrain as pretrain_stage
from jax_transfer.study.epochs import snapshot
from jax_transfer.study.pretrain import feed_sizes
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.trust.evidence import NAIVE

# --- the objective from outside the package


def two_heads(net, augment, source_weight=0.5, source_classes=10):
    """Cross-entropy on two feeds in one forward pass, with a head for each feed."""

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        kernel = gaussian(jax.random.fold_in(key, 1), (net.feature_dim, source_classes), 0.01)
        return {"net": params, "head": {"kernel": kernel, "bias": jnp.zeros(source_classes)}}, {"stats": stats}

    def loss(params, aux, views, key):
        (target_images,), (source_images,) = views["target"].images, views["source"].images
        output, stats = net.apply_train(
            params["net"], aux["stats"], jnp.concatenate([target_images, source_images]), key
        )
        num_target = len(target_images)
        logits = output.features[num_target:] @ params["head"]["kernel"] + params["head"]["bias"]
        entropy = optax.softmax_cross_entropy_with_integer_labels
        target = entropy(output.logits[:num_target], views["target"].labels).mean()
        source = entropy(logits, views["source"].labels).mean()
        accuracy = (output.logits[:num_target].argmax(-1) == views["target"].labels).mean()
        return target + source_weight * source, ({"stats": stats}, {"accuracy": accuracy, "source_loss": source})

    def groups(params):
        labels = jax.tree.map(lambda _: "backbone", params)
        labels["net"]["fc"] = jax.tree.map(lambda _: "head", params["net"]["fc"])
        return {**labels, "head": jax.tree.map(lambda _: "head", params["head"])}

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"target": (augment,), "source": (augment,)},
        groups=groups,
    )


TOYS = {"toy_two_heads": two_heads}
NAMES = ("moco_v2", *TOYS)
SOURCE = "embedded:digits?train=160&test=64"
FEEDS = {"source": {"dataset": "embedded:mnist_5k?train=100&test=50", "batch_size": 24}}
TINY = {
    "stages": ("pretrain", "features", "probe", "scores", "report"),
    "model.width": 4.0,
    "source.dataset": SOURCE,
    "targets": ("embedded:digits?train=128&test=64",),
    "preprocessing.image_size": 8,
    "pretrain.batch_size": 32,
    "pretrain.augment": ("pad_crop", "flip"),
    "probe.epochs": 2,
    "data.eval_batch_size": 64,
    "scores": ("logme", "leep"),
}


def configure(name, **changes):
    """Returns the config of a tiny study with an objective; one of TOYS must be registered in OBJECTIVES."""
    config = get_config("quickstart", "smoke")
    config.pretrain.objective = name
    config.update_from_flattened_dict({**TINY, **{path.replace("__", "."): value for path, value in changes.items()}})
    if name == "moco_v2":
        config.model.batch_norm_group = 8
        config.pretrain.moco_v2.update({"queue_size": 64, "momentum": 0.9, "hidden_dim": 32, "projection_dim": 16})
    if name == "toy_two_heads":
        config.pretrain.feeds.update(FEEDS)
        config.pretrain.optimizer.head_learning_rate_factor = 10.0
    return config


@pytest.fixture(params=NAMES)
def toy(request, monkeypatch):
    for name, make in TOYS.items():
        monkeypatch.setitem(OBJECTIVES, name, make)
    return request.param


# --- studies in this process


def fingerprints(workdir):
    """Returns the saved fingerprints of the model and the training state of every epoch."""
    trajectory = Trajectory(workdir / "checkpoints", alone=True)
    found = {epoch: trajectory.metadata(epoch)["fingerprints"] for epoch in trajectory.epochs()}
    trajectory.close()
    return {epoch: {name: saved[name] for name in ("model", "training")} for epoch, saved in found.items()}


def test_study_trains_and_evaluates_toy_objective(toy, tmp_path):
    config = configure(toy, pretrain__epochs=4)
    study.run(config, tmp_path)
    found = results_without_times(tmp_path)
    losses = [row["train_loss"] for row in found["pretrain.jsonl"][1:]]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert toy == "moco_v2" or losses[-1] < losses[0]  # contrast with a queue of noise is learned more slowly
    assert len(found["transfer.jsonl"]) == 5 and all(row["accuracy"] > 0 for row in found["transfer.jsonl"])
    has_head = toy == "toy_two_heads"
    assert all((row["test_accuracy"] is not None) == has_head for row in found["pretrain.jsonl"])
    scores = {"logme", "leep"} if has_head else {"logme"}
    assert {row["score"] for row in found["scores.jsonl"]} - {*NAIVE} == scores
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "4")
    assert checkpoint.has_head == has_head and checkpoint.net.num_classes == 10 * has_head


@pytest.mark.parametrize(
    "stop", [7, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 10))], ids="at check {}".format
)
def test_resuming_after_any_stop_equals_uninterrupted_run(toy, stop, tmp_path, monkeypatch):
    """The code checks for a stop after each step (five per epoch) and after each batch of an evaluation."""
    make_config = functools.partial(configure, toy, pretrain__epochs=2)
    for name in ("whole", "stopped"):
        num_checks = [0]

        def requested(name=name, num_checks=num_checks):
            num_checks[0] += 1
            return name == "stopped" and num_checks[0] == stop

        monkeypatch.setattr(preemption, "requested", requested)
        for attempt in range(2 if name == "stopped" else 1):
            work = Workspace(make_config(), tmp_path / name)
            stops = name == "stopped" and attempt == 0
            with pytest.raises(preemption.Preempted) if stops else contextlib.nullcontext():
                pretrain_stage.run(work)
            work.close()
    assert results_without_times(tmp_path / "stopped") == results_without_times(tmp_path / "whole")
    assert fingerprints(tmp_path / "stopped") == fingerprints(tmp_path / "whole")
    assert sorted(fingerprints(tmp_path / "whole")) == [0, 1, 2]


def test_queue_and_momentum_encoder_are_saved(tmp_path):
    work = Workspace(configure("moco_v2", pretrain__epochs=1), tmp_path)
    pretrain_stage.run(work)
    work.close()
    stored = {path.name for path in (tmp_path / "checkpoints" / "1" / "training").rglob("*")}
    manifest = (tmp_path / "checkpoints" / "1" / "training" / "_METADATA").read_text()
    assert stored and all(
        f"'{name}'" in manifest for name in ("queue", "next", "key_params", "key_stats", "projection")
    )


def test_head_learning_rate_factor_scales_head_updates(monkeypatch, tmp_path):
    """In one step of plain gradient descent, a factor of ten moves the heads ten times as far."""
    monkeypatch.setitem(OBJECTIVES, "toy_two_heads", two_heads)
    moved = {}
    for factor in (1.0, 10.0):
        config = configure(
            "toy_two_heads",
            source__dataset="embedded:digits?train=32&test=64",
            pretrain__epochs=1,
            pretrain__optimizer__schedule="constant",
        )
        config.pretrain.optimizer.head_learning_rate_factor = factor
        work = Workspace(config, tmp_path / str(factor))
        pretrain_stage.run(work)
        models = [work.checkpoint(snapshot(work.pretrainings[0], epoch)).params for epoch in (0, 1)]
        moved[factor] = jax.tree.map(lambda a, b: np.asarray(b - a), *models)
        work.close()
    np.testing.assert_allclose(moved[10.0]["fc"]["kernel"], 10 * moved[1.0]["fc"]["kernel"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(moved[10.0]["conv1"]["kernel"], moved[1.0]["conv1"]["kernel"], rtol=1e-3, atol=1e-6)


def test_error_names_missing_or_unused_feeds(toy, tmp_path):
    config = configure(toy)
    with config.unlocked():
        config.pretrain.feeds = {} if toy == "toy_two_heads" else FEEDS
    with pytest.raises(InputError, match=r"config\.pretrain\.feeds has (source|no feeds)"):
        checks.check(config)
        work = Workspace(config, tmp_path)
        feed_sizes(work, work.pretrainings[0])


# --- killed and resumed as a command: on one device, on eight devices, with two processes

CHILD = (
    "import sys; sys.path[:0] = ['tests', 'tests/training']; import test_toy_objectives as toys; "
    "toys.OBJECTIVES.update(toys.TOYS); from jax_transfer import main; main.run()"
)
LAUNCHERS = {
    "one device": (1, ()),
    "eight devices": (8, ()),
    "two processes": (1, ("bash", "launch/local_processes.sh", "2")),
}


def start(toy, workdir, devices, launcher):
    """Starts the pre-training of a toy as a command: `python -m jax_transfer.main` with TOYS registered."""
    python = workdir.parent / "python"
    # The launcher also runs its interpreter to find a free port.
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\nshift 2\nexec {sys.executable} -c "{CHILD}" "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    config = workdir.parent / "toy.py"
    config.write_text(
        f"import test_toy_objectives as toys\nget_config = lambda: toys.configure({toy!r}, pretrain__epochs=6, "
        f"stages=('pretrain',), pretrain__optimizer__learning_rate=0.002)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "PYTHON": str(python),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = launcher or (str(python), "-m", "jax_transfer.main")
    log = open(f"{workdir}.log", "a")  # noqa: SIM115  closed with the process
    command = [*command, f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log), pathlib.Path(log.name)


def wait_for(text, process, log):
    for _ in range(4000):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError(f"{text!r} was not logged: {log.read_text()[-3000:]}")


@pytest.mark.slow
@pytest.mark.parametrize("how", LAUNCHERS)
@pytest.mark.parametrize("toy", NAMES)
def test_killed_and_stopped_run_equals_uninterrupted_run(toy, how, tmp_path):
    devices, launcher = LAUNCHERS[how]
    whole, log = start(toy, tmp_path / "whole", devices, launcher)
    assert whole.wait(300) == 0, log.read_text()[-3000:]
    signals = (signal.SIGKILL, signal.SIGTERM) if not launcher else (signal.SIGTERM,)
    for number, epoch in zip(signals, (1, 3), strict=False):
        process, log = start(toy, tmp_path / "broken", devices, launcher)
        wait_for(f"epoch {epoch}/6", process, log)
        process.send_signal(number)
        assert process.wait(90) == (preemption.EXIT_CODE if number == signal.SIGTERM else -number)
    process, log = start(toy, tmp_path / "broken", devices, launcher)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()
    assert results_without_times(tmp_path / "broken") == results_without_times(tmp_path / "whole")
    assert fingerprints(tmp_path / "broken") == fingerprints(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco_v2", "simclr"])
def test_two_processes_train_as_one(name, tmp_path):
    """The queue of keys and the negatives that the processes gather are those of one process."""
    losses = {}
    for how in ("one device", "two processes"):
        workdir = tmp_path / how.replace(" ", "_")
        process, log = start(name, workdir, *LAUNCHERS[how])
        assert process.wait(300) == 0, log.read_text()[-3000:]
        losses[how] = [row["train_loss"] for row in results_without_times(workdir)["pretrain.jsonl"][1:]]
    assert len(losses["one device"]) == 6
    # In 30 steps rounding grows to half a thousandth. With the negatives of its own process alone, the loss of SimCLR
    # would be smaller by log 2.
    np.testing.assert_allclose(losses["two processes"][0], losses["one device"][0], rtol=2e-5)
    np.testing.assert_allclose(losses["two processes"], losses["one device"], rtol=2e-3)
