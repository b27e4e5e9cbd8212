"""XLA's flags: set before JAX starts, the user's kept, and only where XLA knows them."""

import os
import subprocess
import sys

import pytest

from jax_transfer import xla_flags

OURS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def _flags_after(code: str, flags: str) -> str:
    """Returns XLA_FLAGS at the end of a new process that runs `code`."""
    code += "; import os; print(os.environ.get('XLA_FLAGS', ''))"
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not xla_flags.is_known(), reason="the installed XLA does not know the flag, or has a plugin")
@pytest.mark.parametrize("code", ["import jax_transfer", "import jax_transfer, jax; jax.numpy.ones(3).sum()"])
def test_import_sets_the_flag_and_the_compiler_takes_it(code):
    assert _flags_after(code, "") == OURS


@pytest.mark.skipif(not xla_flags.is_known(), reason="the installed XLA does not know the flag, or has a plugin")
def test_flags_of_the_user_are_kept():
    ours = "--xla_force_host_platform_device_count=2"
    assert _flags_after("import jax_transfer, jax; assert len(jax.devices()) == 2", ours) == f"{ours} {OURS}"
    own = "--xla_cpu_experimental_ynn_fusion_type="
    assert _flags_after("import jax_transfer", own) == own


def test_a_file_of_flags_is_kept():
    """XLA reads a value that does not begin with a dash as the name of a file."""
    assert xla_flags.without_slow_convolutions("/tmp/flags.txt") == "/tmp/flags.txt"


def test_an_unknown_flag_is_not_set(monkeypatch):
    """An unknown flag in XLA_FLAGS would abort the process."""
    monkeypatch.setattr(xla_flags, "FLAG", "xla_cpu_no_such_flag_in_any_version")
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.set_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_nothing_is_set_beside_a_plugin_for_an_accelerator(monkeypatch):
    find = xla_flags.importlib.util.find_spec
    monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: name == "libtpu" or find(name))
    assert not xla_flags.is_known()
