"""Small studies: their configs and commands, and what they leave in a working directory."""

import json

from helpers.source_files import get_config
from jax_transfer import trees
from jax_transfer.study import checks
from jax_transfer.study.snapshots import snapshot
from jax_transfer.study.stages import STAGES
from jax_transfer.study.workspace import Workspace

# What the smoke variant of the quick start becomes, to run in seconds.
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
    """The tiny study as a config; `changes` name fields as pretrain__epochs=3."""
    config = get_config("quickstart", "smoke")
    named = {path.replace("__", "."): value for path, value in changes.items()}
    config.update_from_flattened_dict({**TINY, **named})
    return config


def one_epoch_config(**changes):
    """The tiny study with one epoch of pre-training, its own target and no t-SNE."""
    return tiny_config(**{"targets": (TARGET,), "pretrain__epochs": 1, "spectral__embedded_images": 0, **changes})


def run_stages(config, workdir):
    """Runs the stages of a config in this process, without plan and lock, and returns all rows by result file."""
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
    """All rows, without what a clock wrote."""
    clock = ("seconds", "images_per_second")
    return {
        path.name: [
            {k: v for k, v in json.loads(line).items() if k not in clock} for line in path.read_text().splitlines()
        ]
        for path in sorted((workdir / "results").glob("*.jsonl"))
    }


def checkpoint_fingerprints(workdir):
    """The content of every checkpoint of the tiny study, bit for bit."""
    found = {}
    work = Workspace(tiny_config(), workdir)
    for epoch in (0, 1, 2):
        found[epoch] = trees.fingerprint(work.checkpoint(snapshot(work.pretrainings[0], epoch)).model)
    work.close()
    return found
