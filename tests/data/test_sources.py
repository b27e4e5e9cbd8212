"""Data sets by name: packages, arrays and TFDS, options, and errors that users can cause."""

import dataclasses
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_transfer.data import catalog, prepare
from jax_transfer.data.source import NoValidation, of_classes, subset
from jax_transfer.data.sources import from_arrays, load_source, materialize
from jax_transfer.data.transforms import resize_square
from jax_transfer.records import InputError

# ---- embedded and arrays


@pytest.mark.parametrize(("name", "sizes", "side"), [("digits", (1438, 359), 8), ("mnist_5k", (4000, 1000), 28)])
def test_embedded_sets_split_eighty_to_twenty(name, sizes, side):
    train, test = (load_source(f"embedded:{name}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == sizes and train.num_classes == 10
    image = train.read([0])[0]
    assert image.shape == (side, side) and image.dtype == np.uint8 and image.max() > 200
    assert train.fingerprint != test.fingerprint
    pixels = [{image.tobytes() for image in source.read(range(len(source)))} for source in (train, test)]
    assert not pixels[0] & pixels[1]


def test_from_arrays_reads_in_the_order_asked():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    source = from_arrays(images, [0, 1, 2, 0, 1])
    assert source.class_names == ("0", "1", "2") and source.labels.dtype == np.int32
    assert [image[0, 0] for image in source.read([3, 0, 3])] == [12, 0, 12]


def test_the_fingerprint_depends_on_the_contents():
    images, labels = np.zeros((4, 2, 2), np.uint8), [0, 1, 0, 1]
    changed = images.copy()
    changed[3, 1, 1] = 1
    sources = [from_arrays(images, labels), from_arrays(changed, labels), from_arrays(images, [0, 1, 1, 1])]
    sources += [from_arrays(images.reshape(4, 1, 4), labels), from_arrays(images, labels, class_names=["a", "b"])]
    sources += [subset(sources[0], [0, 1]), subset(sources[0], [1, 0])]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert from_arrays(images.copy(), labels).fingerprint == sources[0].fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (np.zeros((2, 3, 3), np.uint8), [0], None, "one label for each"),
        (np.zeros((0, 3, 3), np.uint8), [], None, "one label for each"),
        ([np.zeros((3, 3), np.uint8)], [-1], None, "whole numbers of at least 0"),
        ([np.zeros((3, 3), np.uint8)], [0.5], None, "whole numbers of at least 0"),
        ([np.zeros((3, 3), np.uint8)], [2], ["a", "b"], "label 2 is out of range: expected labels from 0 to 1"),
    ],
)
def test_from_arrays_refuses_invalid_labels(images, labels, names, message):
    with pytest.raises(InputError, match=message):
        from_arrays(images, labels, class_names=names)


# ---- names and options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "kind:name"),
        ("embedded:", "kind:name"),
        ("embeded:digits", "Did you mean 'embedded'"),
        ("embedded:digit", "Did you mean 'digits'"),
        ("embedded:digits?per_clas=3", "Did you mean 'per_class'.*fraction, images, imbalance, per_class, test, train"),
        ("embedded:digits?per_class=0", "per_class must be a whole number.*'0'"),
        ("embedded:digits?train=many", "train must be a whole number.*'many'"),
        ("embedded:digits?train=", "train must be a whole number.*''"),
        ("embedded:digits?fraction=1.5", r"fraction must be a number in \(0, 1\].*'1.5'"),
        ("embedded:digits?train=5&train=6", "given twice"),
        ("embedded:digits?per_class=500", "class '0' has only 142"),
        ("embedded:digits?classes=3++4", r"classes must be names of classes joined by \+, got '3\+\+4'"),
        ("embedded:digits?classes=3+ten", "Unknown class: 'ten'"),
        ("embedded:digits?classes=3+4+3", "class '3' is given twice"),
    ],
)
def test_a_wrong_name_lists_the_valid_ones(name, message):
    with pytest.raises(InputError, match=message):
        load_source(name, "train")


def test_wrong_split_and_on_corrupt_list_the_valid_ones():
    with pytest.raises(InputError, match=r"'val'\. Valid: train, test, validation"):
        load_source("embedded:digits", "val")
    for name in ("embedded:digits", "embedded:digits?train_fraction=0.5"):
        with pytest.raises(NoValidation, match="has no validation split: use a part of its training split"):
            load_source(name, "validation")
    with pytest.raises(InputError, match=r"'ignore'\. Valid: error, skip"):
        load_source("embedded:digits", "train", on_corrupt="ignore")


def test_options_apply_to_their_own_split():
    name = "embedded:digits?per_class=7&test=40"
    train, test = load_source(name, "train"), load_source(name, "test")
    assert np.bincount(train.labels).tolist() == [7] * 10 and np.bincount(test.labels).tolist() == [4] * 10
    assert train.name == test.name == name
    assert len(load_source("embedded:digits?fraction=0.1&train=100", "train")) == 100


@pytest.mark.parametrize("name", ("classes=7+2&per_class=5", "per_class=5&classes=7+2"))
def test_the_classes_option_applies_first_and_to_both_splits(name):
    train, test = (load_source(f"embedded:digits?{name}", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("7", "2") and np.bincount(train.labels).tolist() == [5, 5]
    whole = load_source("embedded:digits", "test")
    assert np.bincount(test.labels).tolist() == [np.sum(whole.labels == 7), np.sum(whole.labels == 2)]
    assert train.fingerprint == load_source("embedded:digits?classes=7+2&per_class=5", "train").fingerprint


# ---- selected classes and extra arrays


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_some_classes_are_renumbered_and_keep_their_images(data):
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30)))
    numbers = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    classes = [data.draw(st.sampled_from((number, "abcde"[number]))) for number in numbers]
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    source = from_arrays(images, labels, class_names="abcde")
    source = dataclasses.replace(source, extra={"place": np.arange(len(labels)), "row": np.eye(len(labels))})
    kept = np.flatnonzero(np.isin(labels, numbers))
    if not len(kept):
        with pytest.raises(InputError, match="no image"):
            of_classes(source, classes)
        return
    part = of_classes(source, classes)
    assert part.class_names == tuple("abcde"[number] for number in numbers) and part.num_classes == len(numbers)
    assert [numbers[label] for label in part.labels] == labels[kept].tolist() and part.labels.dtype == np.int32
    assert [image[0, 0] for image in part.read(range(len(part)))] == kept.tolist()
    np.testing.assert_array_equal(part.extra["place"], kept)
    np.testing.assert_array_equal(part.extra["row"], np.eye(len(labels))[kept])
    others = [source, subset(source, kept)] + [of_classes(source, numbers[::-1])] * (len(numbers) > 1)
    assert part.fingerprint not in [other.fingerprint for other in others]
    assert part.fingerprint == of_classes(source, numbers).fingerprint


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", 5], "Unknown class: 5, expected a name, or a number from 0 to 4"),
        ([-1], "Unknown class: -1"),
        (["f"], "Unknown class: 'f'.*a, b, c, d, e"),
        (["a", "b", 0], "class 'a' is given twice"),
        ([], "no images of the 0 chosen classes"),
    ],
)
def test_unknown_and_duplicate_classes_are_named(classes, message):
    source = from_arrays(np.zeros((5, 2, 2), np.uint8), np.arange(5), class_names="abcde")
    with pytest.raises(InputError, match=message):
        of_classes(source, classes)


def test_a_subset_keeps_the_extra_arrays():
    source = from_arrays(np.zeros((3, 2, 2), np.uint8), [0, 1, 0])
    assert source.extra == {} and subset(source, [1]).extra == {}
    tokens = np.arange(12).reshape(3, 4)
    (found,) = subset(dataclasses.replace(source, extra={"tokens": tokens}), [2, 0]).extra.values()
    np.testing.assert_array_equal(found, tokens[[2, 0]])


def test_the_subset_depends_on_the_seed():
    first, again, other = (load_source("embedded:digits?per_class=3", "train", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (
        load_source("embedded:digits", "test", seed=0).fingerprint
        == load_source("embedded:digits", "test", 1).fingerprint
    )


def test_images_of_a_subset_match_its_labels():
    whole = load_source("embedded:digits", "train")
    part = subset(subset(whole, np.arange(100, 200)), [5, 50, 7])
    assert np.array_equal(part.labels, whole.labels[[105, 150, 107]])
    assert all(map(np.array_equal, part.read([0, 1, 2]), whole.read([105, 150, 107])))


# ---- materialize


def test_materialize_equals_resizing_one_by_one():
    source, done = load_source("embedded:digits?train=600", "train"), []
    images, labels = materialize(source, 12, "bicubic", progress=done.append)
    single = np.stack([resize_square(source.read([i])[0], 12, "bicubic") for i in range(len(source))])
    assert np.array_equal(images, single) and np.array_equal(labels, source.labels)
    assert done == sorted(done) and done[-1] == 600


# ---- tfds


def test_tfds_labels_match_their_images(tfds_dir):
    source = load_source("tfds:fashion_mnist", "test")
    assert len(source) == 10_000 and np.bincount(source.labels).tolist() == [1000] * 10
    assert source.class_names[0] == "T-shirt/top" and source.metric == "accuracy"
    direct = tfds.data_source("fashion_mnist", split="test", data_dir=tfds_dir, download=False)
    indices = [77, 3, 9_999]
    assert all(
        np.array_equal(image, direct[i]["image"]) for image, i in zip(source.read(indices), indices, strict=True)
    )
    assert source.labels[indices].tolist() == [direct[i]["label"] for i in indices]


def test_gray_tfds_images_get_three_channels(tfds_dir):
    source = load_source("tfds:mnist?test=20", "test")
    images, _ = materialize(source, 28)
    assert source.read([0])[0].shape == (28, 28, 1)
    assert images.shape == (20, 28, 28, 3) and np.array_equal(images[..., 0], images[..., 2])


def test_validation_replaces_a_missing_test_split(tfds_dir):
    source = load_source("tfds:tiny_imagenet?test=300", "test")
    assert len(source) == 300 and source.num_classes == 200 and source.class_names[0] == "goldfish"


def test_caltech101_uses_mean_class_accuracy(tfds_dir):
    source = load_source("tfds:caltech101?train=306", "train")
    assert source.metric == "mean_class_accuracy" and source.num_classes == 102
    images, _ = materialize(source, 32)
    assert np.array_equal(images[300], resize_square(source.read([300])[0], 32))


def test_split_expressions_join_splits(tfds_dir, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "both", catalog.Entry("caltech101", 102, train="train+test"))
    assert len(load_source("tfds:both", "train")) == 9144


def test_tfds_sources_pickle(tfds_dir):
    source = load_source("tfds:caltech101", "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint and np.array_equal(copy.read([5])[0], source.read([5])[0])


def test_reading_tfds_does_not_import_tensorflow(tfds_dir):
    code = (
        "import sys; from jax_transfer.data.sources import load_source, materialize\n"
        "materialize(load_source('tfds:caltech101?train=4', 'train'), 8)\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "group size" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100", r"not on disk.*python -m jax_transfer\.data\.prepare cifar100 .*TFDS_DATA_DIR"),
        ("flowers102", r"not on disk.*prepare flowers102 "),
        ("cifar11", "Unknown TFDS data set: 'cifar11'. Did you mean cifar10"),
        ("CIFAR10", "Did you mean cifar10"),
        ("zzzzqqq", "Unknown TFDS data set: 'zzzzqqq'. See"),
        ("cifar10:9.9.9", "9.9.9"),
        ("two words", "two words"),
        ("aircraft", r"load it as folder:DIR.*train/<variant>"),
        ("indoor67", "folder:DIR"),
        ("mura", "folder:DIR"),
        ("shenzhen_cxr", "folder:DIR"),
        ("tiny_imagenet", "folder:DIR"),
        ("celeb_a", r"'image' and 'label' \(or captions\), but has"),
    ],
)
def test_missing_and_unknown_tfds_sets_are_named(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        load_source(f"tfds:{name}", "train")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_incomplete_and_tfrecord_sets_are_not_on_disk(tfds_dir, tmp_path, monkeypatch):
    folder = tmp_path / "caltech101" / "3.0.2"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        shutil.copy(tfds_dir / "caltech101" / "3.0.2" / name, folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"not on disk in ArrayRecord format.*prepare caltech101"):
        load_source("tfds:caltech101", "train")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for split in ("train", "test"):
        (folder / f"caltech101-{split}.tfrecord-00000-of-00001").touch()
    with pytest.raises(InputError, match="not on disk in ArrayRecord format"):
        load_source("tfds:caltech101", "train")


def test_a_missing_split_lists_the_existing_ones(tfds_dir, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "odd", catalog.Entry("mnist", 10, test="validation"))
    with pytest.raises(InputError, match=r"no split 'validation' to test on\. Its splits are: .*train"):
        load_source("tfds:odd", "test")


@pytest.mark.parametrize(
    "name", [n for n, entry in catalog.CATALOG.items() if not entry.layout and entry.num_classes > 1]
)
def test_the_catalog_agrees_with_tfds(name, tmp_path):
    entry = catalog.CATALOG[name]
    builder = tfds.builder(entry.tfds, data_dir=tmp_path, try_gcs=False)
    assert builder.info.features["label"].num_classes == entry.num_classes
    assert catalog.find(entry.tfds) == entry == catalog.find(f"{entry.tfds}:1.0.0")


def test_prepare_without_tensorflow_names_the_extra_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert prepare.main(["cifar10"]) == 2
    assert 'pip install "jax_transfer[prepare]"' in capsys.readouterr().err
