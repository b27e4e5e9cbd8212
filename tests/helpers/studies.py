"""Small studies: their configs, their commands, and the results in their working directories."""

import json
import os
import subprocess
import sys

from helpers.source_files import REPOSITORY, get_config
from jax_transfer import trees
from jax_transfer.study import checks
from jax_transfer.study.epochs import snapshot
from jax_transfer.study.stages import STAGES
from jax_transfer.study.workspace import Workspace

# Changes to the smoke variant of the quick start, so that it runs in seconds.
TINY = {
    "source.dataset": "embedded:digits?train=256&test=64",
    "targets": ("embedded:digits?train=128&test=64",),
    "preprocessing.image_size": 8,
    "pretrain.batch_size": 32,
    "finetune.batch_size": 32,
    "data.eval_batch_size": 64,
}
TINY_COMMAND = ["--config=configs/quickstart.py:smoke", *(f"--config.{field}={value}" for field, value in TINY.items())]
TARGET = "embedded:digits?train=160&test=64"


def tiny_config(**changes):
    """Returns the config of the tiny study; `changes` are fields such as pretrain__epochs=3."""
    config = get_config("quickstart", "smoke")
    named = {path.replace("__", "."): value for path, value in changes.items()}
    config.update_from_flattened_dict({**TINY, **named})
    return config


def one_epoch_config(**changes):
    """Returns the tiny study with one epoch of pre-training, another target and no t-SNE."""
    return tiny_config(**{"targets": (TARGET,), "pretrain__epochs": 1, "spectral__embedded_images": 0, **changes})


def environment(**variables):
    """Returns the environment of a process that imports this package and runs on the CPU."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **variables}


def run_command(workdir, *arguments, code=("-m", "jax_transfer.main"), timeout=400, **variables):
    """Runs the command of the tiny study in another process, and returns that process when it has ended.

    Args:
      variables: environment variables of the process.
    """
    command = [sys.executable, *code, *TINY_COMMAND, f"--workdir={workdir}", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True, timeout=timeout
    )


def run_stages(config, workdir):
    """Runs the stages of a config in this process, without the plan or a lock; returns all rows by result file."""
    checks.check(config)
    work = Workspace(config, workdir)
    checks.check_data(work)
    for name, stage in STAGES.items():
        if name in config.stages:
            stage.run(work)
    work.close()
    files = (workdir / "results").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def results_without_times(workdir):
    """Returns all rows by file name, without the columns that measure time and the file that does only this."""
    clock = ("seconds", "images_per_second")
    return {
        path.name: [
            {k: v for k, v in json.loads(line).items() if k not in clock} for line in path.read_text().splitlines()
        ]
        for path in sorted((workdir / "results").glob("*.jsonl"))
        if path.stem != "usage"
    }


def checkpoint_fingerprints(workdir):
    """Returns {epoch: fingerprint of the checkpoint} of the tiny study."""
    fingerprints = {}
    work = Workspace(tiny_config(), workdir)
    for epoch in (0, 1, 2):
        fingerprints[epoch] = trees.fingerprint(work.checkpoint(snapshot(work.pretrainings[0], epoch)).model)
    work.close()
    return fingerprints
