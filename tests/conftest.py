"""Fixtures shared by the tests. The offline data sets are optional: a stranger's clone has none of them."""

import os
import pathlib

import pytest
import threadpoolctl

if not os.environ.get("JAX_TRANSFER_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any test file imports jax

# Workers share the cores: the BLAS threads of a small decomposition wait for each other far longer than they work.
threadpoolctl.threadpool_limits(1, "blas")  # of numpy, which a plugin of pytest has imported
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # of what is imported later, and of the commands that tests start

collect_ignore_glob = ["benchmarks/*", "faults/*", "helpers/*", "launch_expected/*"]  # doctests would import them

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Half of the time of a small study is compilation, and the tests run the same one again and again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
SHARED = REPOSITORY.parent / "shared"


# What only repeats, for many seconds of tracing, what a shallower net of the same family shows in the same test.
DEEP = ("resnet101", "resnet152", "resnet101_v2", "resnet152_v2")
OVER_MODELS = ("test_shapes_and_dtypes", "test_params_and_stats_are_nested_dicts_of_float32_with_string_keys")


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items):
    """Marks the deepest nets slow. The files that take minutes go first, so that no worker is left with one at the end."""
    for item in items:
        if getattr(item, "originalname", None) in OVER_MODELS and item.callspec.params.get("name") in DEEP:
            item.add_marker(pytest.mark.slow)
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


@pytest.fixture(autouse=True, scope="module")
def _few_compiled_programs():
    """Forgets compiled programs between test files, long before their memory maps reach Linux's 65,530 a process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
