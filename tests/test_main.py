"""The command and the package: options that cannot be used, and a checkout that is not installed."""

import os
import subprocess
import sys
import tomllib

import pytest

import jax_transfer as jt
from helpers.source_files import REPOSITORY
from jax_transfer import main
from jax_transfer.records import InputError
from jax_transfer.study import checks


@pytest.mark.parametrize("module", ["jax_transfer", "jax_transfer.main"])
@pytest.mark.parametrize("content", [None, b"\xd0\xff"], ids=["missing", "binary"])
def test_unusable_flag_file_is_reported_in_one_line(content, module, tmp_path):
    file = tmp_path / "flags"
    if content is not None:
        file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", module, f"--flagfile={file}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("jax_transfer: --flagfile cannot be used")


def test_uninstalled_checkout_can_be_imported():
    command = [
        sys.executable,
        "-S",
        "-c",
        "import jax_transfer; print(jax_transfer.__version__)",
    ]  # -S: no site-packages
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.stdout.strip() == jt.__version__, done.stderr


def test_version_is_declared_once():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jax_transfer.__version__"}


def test_target_settings_follow_targets_of_the_command_line(monkeypatch):
    config = _parsed(monkeypatch, "--config.targets=('embedded:digits',)")
    assert config.targets == ("embedded:digits",) and not config.overrides and not config.metrics
    checks.check(config)
    config = _parsed(
        monkeypatch, "--config.targets=('embedded:digits',)", "--config.metrics={'folder:x.y': 'accuracy'}"
    )
    with pytest.raises(InputError, match=r"folder:x\.y"):
        checks.check(config)


def test_feeds_are_parsed_as_a_literal_on_the_command_line(monkeypatch):
    config = _parsed(monkeypatch, "--config.pretrain.feeds={'a.b': {'dataset': 'tfds:cifar10', 'batch_size': 64}}")
    assert config.pretrain.feeds["a.b"].to_dict() == {"dataset": "tfds:cifar10", "batch_size": 64}
    checks.check(config)


def _parsed(monkeypatch, *arguments):
    """Returns the config that the command makes from its arguments."""
    monkeypatch.chdir(REPOSITORY)
    command = ["main", "--config=configs/cifar10_to_mnist.py", "--workdir=unused", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    for name in [name for name in main.FLAGS if name.startswith("config.")]:
        delattr(main.FLAGS, name)  # flags of the previous run
    main._define_flags()
    main._parse_flags(command)
    return main.FLAGS.config
