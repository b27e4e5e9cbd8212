"""Fixtures shared by the tests. The offline data sets are optional: a stranger's clone has none of them."""

import os
import pathlib

import pytest

if not os.environ.get("JAX_TRANSFER_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any test file imports jax

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture
def tfds_dir(monkeypatch):
    """The folder of prepared TFDS data sets; skips where there is none."""
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", SHARED / "data" / "tfds"))
    if not folder.is_dir():
        pytest.skip(f"the offline data sets are not here ({folder}); set TFDS_DATA_DIR")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def reference_dir():
    """The folder of reference values computed with the peers' code; skips where there is none."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"the reference values are not here ({folder})")
    return folder
