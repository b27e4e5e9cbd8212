"""Fixtures shared by the tests. The offline data sets are optional: a stranger's clone has none of them."""

import os
import pathlib

import pytest

if not os.environ.get("JAX_TRANSFER_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any test file imports jax

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Half of the time of a small study is compilation, and the tests run the same one again and again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
SHARED = REPOSITORY.parent / "shared"


def pytest_collection_modifyitems(items):
    """The files that take minutes go first, so that no worker is left with one when the others are done."""
    longest = ("test_study.py", "test_preemption.py", "test_scores.py", "test_scoring.py", "test_mutual_information.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


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
