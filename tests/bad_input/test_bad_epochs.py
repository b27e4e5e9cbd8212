"""Epochs with missing, truncated or damaged files: finite weights, or a one-line error that names the folder."""

import gc
import json
import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.checkpoint_files import DESCRIBED, PARAMS, STATS
from helpers.hostile import accepted_or_refused, examples
from jax_transfer.checkpoints import describes_itself, expand, load_checkpoint
from jax_transfer.checkpoints.trajectory import Trajectory

MODEL = {"params": PARAMS, "stats": STATS}
TRAINING = {"opt_state": {}, "step": np.int32(3), "key": np.zeros(2, np.uint32)}


@pytest.fixture(scope="module")
def valid_run(tmp_path_factory):
    """A folder of two epochs; weights of the second are NaN."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    trajectory = Trajectory(folder)
    broken = {**MODEL, "params": {**PARAMS, "bn1": jax.tree.map(lambda x: x * np.nan, PARAMS["bn1"])}}
    trajectory.save(1, MODEL, TRAINING, DESCRIBED)
    trajectory.save(2, broken, TRAINING, DESCRIBED)
    trajectory.close()
    return folder


def load(kind, path):
    def use():
        describes_itself(path)
        return load_checkpoint(path)

    found = accepted_or_refused(f"epoch: {kind}", use, str(path))
    if found is not None:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.params, found.stats)))
        assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, PARAMS)
    return found


def test_a_valid_epoch_loads_and_a_diverged_one_is_named(valid_run):
    assert load("valid", valid_run / "1") is not None
    assert load("diverged", valid_run / "2") is None


def files(epoch):
    """Lists files by size, since their names are random; most small ones are not needed for loading."""
    found = [path for path in epoch.rglob("*") if path.is_file() and path.relative_to(epoch).parts[0] != "training"]
    return [path.relative_to(epoch) for path in sorted(found, key=lambda path: (-path.stat().st_size, path.parent))]


def damage_file(path, how, place, mask):
    data = path.read_bytes()
    at = int(place * len(data))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:at])
    elif how == "turned" and data:
        path.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
    elif how == "random":
        path.write_bytes(np.random.default_rng(mask).bytes(len(data)))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "item":  # the whole folder
        shutil.rmtree(path.parent)
    elif how == "dangling":
        path.unlink()
        path.symlink_to("/no/such")


def test_any_damage_to_any_file(valid_run, tmp_path):
    number = len(files(valid_run / "1"))

    @examples(30, most=300)
    @given(
        st.integers(0, number - 1), st.sampled_from(("missing", "cut", "turned", "random", "folder", "item",
        "dangling")),
        st.floats(0, 0.9999), st.integers(1, 255),
    )  # fmt: skip
    def tried(which, how, place, mask):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(valid_run / "1", copy / "1")
        damage_file(copy / "1" / files(valid_run / "1")[which], how, place, mask)
        found = load(how, copy / "1")
        if found is not None:
            assert jax.tree.all(jax.tree.map(np.array_equal, (found.params, found.stats), (PARAMS, STATS)))

    tried()


def test_a_damaged_epoch_logs_no_tracebacks(valid_run, tmp_path, caplog):
    shutil.copytree(valid_run / "1", tmp_path / "1")
    damage_file(tmp_path / "1" / files(valid_run / "1")[0], "random", 0, 1)
    assert load("random", tmp_path / "1") is None
    gc.collect()
    assert "never retrieved" not in caplog.text


VALUES = st.recursive(
    st.sampled_from(
        (None, True, 0, -1, 5, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "resnet18", "cifar", "a\nb", "vgg")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(("name", "width", "x")), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = (
    "model",
    "preprocessing",
    "source_accuracy",
    "name",
    "width",
    "stem",
    "num_classes",
    "depth",
    "image_size",
    "mean",
)


def test_any_metadata(valid_run, tmp_path):
    shutil.copytree(valid_run / "1", tmp_path / "1")
    path = next((tmp_path / "1" / "metadata").glob("metadata"))

    @examples(40, most=300)
    @given(st.sampled_from((*FIELDS, "all")), VALUES)
    @example("name", None)
    @example("num_classes", 90_000)
    @example("stem", ["cifar"])
    def tried(field, value):
        described = json.loads(json.dumps(DESCRIBED))
        section = described["preprocessing" if field in ("image_size", "mean") else "model"]
        section = described if field in described else section
        section[field] = value
        path.write_text(json.dumps(value if field == "all" else described))
        load("metadata", tmp_path / "1")

    tried()
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"{}", b"null"):
        path.write_bytes(content)
        assert load("metadata", tmp_path / "1") is None


@pytest.mark.parametrize("name", ["²", "1.orbax-checkpoint-tmp-7", "01", "-1", "9" * 30, "٣"])
def test_folders_with_names_similar_to_epochs(valid_run, tmp_path, name):
    shutil.copytree(valid_run / "1", tmp_path / "run" / name)
    load("a name", tmp_path / "run" / name)
    accepted_or_refused("epoch: a name", lambda: expand(tmp_path / "run"), str(tmp_path / "run"))


def test_folders_without_a_trajectory_are_named(tmp_path):
    (tmp_path / "5" / "model").mkdir(parents=True)
    assert load("empty", tmp_path / "5") is None
    (tmp_path / "a\nb").mkdir()
    assert load("empty", tmp_path / "a\nb") is None
    os.mkfifo(tmp_path / "6")
    assert load("empty", tmp_path / "6") is None
