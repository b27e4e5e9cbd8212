"""The memory of a study does not grow with its length."""

import pytest

from helpers.studies import run_command

MEASURED = """
import atexit, resource
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
from jax_transfer import main
main.run()
"""


def _peak_megabytes(workdir, epochs):
    arguments = [f"--config.pretrain.epochs={epochs}", "--config.model.width=48"]
    arguments.append("--config.data.features_gigabytes=0.001")  # three checkpoints at a time
    done = run_command(workdir, *arguments, code=("-c", MEASURED), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exceed config.data.features_gigabytes" in done.stderr or epochs < 4
    return int(done.stdout.split("peak")[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
    few, many = _peak_megabytes(tmp_path / "few", 2), _peak_megabytes(tmp_path / "many", 39)
    # A checkpoint and its optimizer state take 22 MB, so keeping 37 more in memory would take 814 MB.
    assert many - few < 160
