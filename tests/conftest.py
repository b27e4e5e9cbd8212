"""Fixtures shared by the tests. The offline data sets are optional, since a fresh clone has none of them."""

import os
import pathlib
import subprocess
import sys

import pytest
import threadpoolctl

import jax_transfer  # noqa: F401 - sets XLA_FLAGS; imports no JAX

if not os.environ.get("JAX_TRANSFER_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any test file imports jax

# Compiling takes most of the time of the tests, and their arrays are small, so XLA optimises little here. The smoke
# variants of .ci/run are compiled as users compile them; JAX_DISABLE_MOST_OPTIMIZATIONS=0 does the same for the tests.
EMITTERS = "xla_cpu_use_fusion_emitters"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if os.environ.get("JAX_TRANSFER_TEST_GPU") else "1")


def _set_fast_emitters():
    """Sets the flag for XLA's older emitters, which compile three times as fast, if XLA takes it.

    An unknown flag aborts a process, so another one tries it.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --{EMITTERS}=false".strip()
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    if (
        flags.startswith("--")
        and not subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode
    ):
        os.environ["XLA_FLAGS"] = flags


# The workers of pytest-xdist inherit the flags.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and "PYTEST_XDIST_WORKER" not in os.environ:
    _set_fast_emitters()

# The workers share the cores, so BLAS threads spend more time waiting for each other than computing.
threadpoolctl.threadpool_limits(1, "blas")  # for numpy, which a pytest plugin has already imported
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # for later imports and for the commands that tests start

collect_ignore_glob = ["benchmarks/*", "faults/*", "helpers/*", "launch_expected/*"]  # doctests would import them

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Compilation takes half the time of a small study, and the tests run the same study many times.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["XDG_CACHE_HOME"] = str(REPOSITORY / ".pytest_cache" / "cache")  # for labels, instead of the user's folder
SHARED = REPOSITORY.parent / "shared"


# Tracing these takes many seconds, and the same tests cover a shallower net of each family.
DEEP = ("resnet101", "resnet152", "resnet101_v2", "resnet152_v2")
OVER_MODELS = (
    "test_shapes_and_dtypes",
    "test_params_and_stats_are_nested_dicts_of_float32_with_string_keys",
    "test_a_net_without_classes_has_no_head",
    "test_a_spec_agrees_with_its_net",
    "test_every_net_takes_a_projection",
    "test_classifier_is_the_path_of_the_head",
    "test_named_outputs_of_blocks_are_a_small_part_of_the_activations",
)
# Compiling these takes many seconds, and other scores go through the same lines.
LONG_SCORES = ("nleep", "mi_alpha_0.01", "mi_alpha_0.5", "mi_pca_alpha_0.01", "mi_pca_alpha_0.5", "mutual_information")
OVER_SCORES = (
    "test_score_all_equals_one_by_one",
    "test_vmap_gives_nan_only_for_the_invalid_checkpoint",
    "test_uninformative_features_never_score_above_informative_ones",
    "test_gigaflops_of_every_score_grow_with_samples",
    "test_jit_equals_eager",
    "test_finite_on_hard_inputs",
    "test_scores_are_finite_at_the_limits_of_float32",
    "test_other_dtypes_are_converted_to_float32",
    "test_traced_labels_out_of_range_give_nan",
)


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items):
    """Marks the deepest nets as slow, and runs the longest files first so that no worker ends with one of them."""
    for item in items:
        function = getattr(item, "originalname", None)
        names = (
            set(item.callspec.params.values())
            if hasattr(item, "callspec") and function in OVER_MODELS + OVER_SCORES
            else set()
        )
        if (function in OVER_MODELS and names & set(DEEP)) or (function in OVER_SCORES and names & set(LONG_SCORES)):
            item.add_marker(pytest.mark.slow)
    longest = ("study", "training", "analysis", "models", "transfer", "ranking")
    items.sort(key=lambda item: longest.index(item.path.parent.name) if item.path.parent.name in longest else 9)


@pytest.fixture
def tfds_dir(monkeypatch):
    """Folder of prepared TFDS data sets; skips the test if there is none."""
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", SHARED / "data" / "tfds"))
    if not folder.is_dir():
        pytest.skip(f"no offline data sets in {folder}; set TFDS_DATA_DIR")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def reference_dir():
    """Folder of reference values computed with the authors' code; skips the test if there is none."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference values in {folder}")
    return folder


@pytest.fixture
def fully_optimised():
    """Compiles the programs of a test as users do, for tests of rounding; returns options for `jax.jit`."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield {EMITTERS: True} if f"--{EMITTERS}=false" in os.environ.get("XLA_FLAGS", "") else {}
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _few_compiled_programs():
    """Clears compiled programs between test files, long before their memory maps reach Linux's limit of 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
