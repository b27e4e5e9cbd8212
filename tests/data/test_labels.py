"""The cache of labels: it saves reading the records, and is never trusted nor needed."""

import logging
import os

import numpy as np
import pytest

from jax_transfer.data import labels, tfds_sets
from jax_transfer.data.labels import cached_labels
from jax_transfer.data.sources import load_source

LABELS = np.array([0, 2, 1, 2], np.int32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; its value is the folder of the labels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jax_transfer" / "labels"


class Read:
    """Returns the labels, and counts how often it is called."""

    def __init__(self, values=LABELS):
        self.calls, self.values = 0, values

    def __call__(self):
        self.calls += 1
        return self.values


def test_the_second_load_reads_no_label(tfds_dir, monkeypatch):
    first = load_source("tfds:caltech101", "train")
    monkeypatch.setattr(tfds_sets, "_read_tfds_labels", lambda *_: pytest.fail("the labels are read again"))
    second = load_source("tfds:caltech101", "train")
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.fingerprint == second.fingerprint and len(np.unique(first.labels)) == 102
    with pytest.raises(pytest.fail.Exception, match="read again"):
        load_source("tfds:caltech101", "test")


def test_the_second_load_examines_only_a_sample_of_the_records(tfds_dir, monkeypatch):
    seen, original = [], tfds_sets._read_tfds
    load_source("tfds:caltech101", "train")
    monkeypatch.setattr(
        tfds_sets, "_read_tfds", lambda data, indices: [seen.extend(indices), original(data, indices)][1]
    )
    source = load_source("tfds:caltech101", "train")
    assert len(seen) <= 64 < len(source)


def test_labels_read_in_threads_stay_in_order():
    class Records:
        def __len__(self):
            return 5000

        def __getitems__(self, chunk):
            return [{"label": i % 7} for i in chunk]

    found = tfds_sets._read_tfds_labels(Records(), "toy")
    np.testing.assert_array_equal(found, np.arange(5000) % 7)
    assert found.dtype == np.int32


def test_labels_are_read_once():
    read = Read()
    for _ in range(3):
        np.testing.assert_array_equal(cached_labels("key", 4, 3, read), LABELS)
    assert read.calls == 1
    cached_labels("other", 4, 3, read)
    assert read.calls == 2


def npy(array):
    def write(path):
        with open(path, "wb") as file:
            np.save(file, array)

    return write


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "text": lambda path: path.write_text("labels"),
    "a zip file": lambda path: path.write_bytes(b"PK\3\4" + b"\0" * 40),
    "a huge shape": lambda path: path.write_bytes(path.read_bytes().replace(b"(4,)", b"(9999999999999,)")),
    "objects": npy(np.array([{}], object)),
    "too few": npy(LABELS[:3]),
    "another type": npy(LABELS.astype(np.int64)),
    "a class that does not exist": npy(LABELS + 1),
    "a negative class": npy(LABELS - 1),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_read_again_and_replaced(damage, cache, caplog):
    read = Read()
    cached_labels("key", 4, 3, read)
    DAMAGES[damage](cache / "key.npy")
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(cached_labels("key", 4, 3, read), LABELS)
    assert read.calls == 2 and "read again" in caplog.text
    np.testing.assert_array_equal(cached_labels("key", 4, 3, read), LABELS)
    assert read.calls == (3 if damage == "a folder" else 2)
    assert not list(cache.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(cached_labels("key", 4, 3, Read()), LABELS)
    assert "cannot be cached" in caplog.text


def test_invalid_labels_are_not_cached(cache):
    cached_labels("key", 4, 2, Read())
    assert not (cache / "key.npy").exists()


def test_the_cache_is_below_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert labels.folder() == tmp_path / ".cache" / "jax_transfer" / "labels"
    assert "XDG_CACHE_HOME" not in os.environ
