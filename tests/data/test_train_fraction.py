"""`train_fraction`: all images of a data set are split anew, by class and at random."""

import dataclasses
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.images import write_images
from jax_transfer.data import catalog
from jax_transfer.data.source import from_arrays
from jax_transfer.data.sources import load_source
from jax_transfer.data.subsets import resplit
from jax_transfer.records import InputError


def load_both(name, seed=0, **options):
    return [load_source(name, split, seed=seed, **options) for split in ("train", "test")]


def pixels(source):
    return [image.tobytes() for image in source.read(range(len(source)))]


@pytest.fixture
def animals(tmp_path):
    """Class folders cat/ (20 images) and dog/ (10)."""
    write_images(tmp_path / "animals" / "dog", 10)
    write_images(tmp_path / "animals" / "cat", 20)
    return tmp_path / "animals"


@pytest.fixture
def split_animals(tmp_path):
    """The same classes in Training/ (6 images each) and Testing/ (4 each), a folder beside them, and a note on it."""
    for split, count in (("Training", 6), ("Testing", 4), ("other", 1)):
        write_images(tmp_path / split / "cat", count, seed=count)
        write_images(tmp_path / split / "dog", count, seed=count)
    return tmp_path


# --- the division


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_splits_are_disjoint_complete_and_proportional(labels, part, seed):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    source = from_arrays(images, labels, class_names="abcd")
    sources = [dataclasses.replace(source, split=split) for split in ("train", "test")]
    try:
        train, test = (resplit(one, part, seed) for one in sources)
    except InputError as error:
        size = max(1, round(part * len(labels)))
        assert size < len(set(labels)) or size == len(labels), error
        return
    numbers = [[int(image[0, 0]) for image in one.read(range(len(one)))] for one in (train, test)]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(labels)))
    assert len(train) == max(1, round(part * len(labels))) and set(train.labels) == set(labels)
    for one, of_split in zip((train, test), numbers, strict=True):
        assert one.labels.tolist() == [labels[number] for number in of_split]
    total, counts = np.bincount(labels, minlength=4), np.bincount(train.labels, minlength=4)
    far = np.abs(counts - len(train) * total / len(labels))
    assert (far < 1).all() or (counts[total > 0] == 1).any()  # a class that is too small for its share has one image


def test_digits_are_split_anew_and_depend_on_the_seed():
    name = "embedded:digits?train_fraction=0.3"
    train, test = load_both(name)
    assert len(train) == round(0.3 * 1797) and len(train) + len(test) == 1797
    assert train.name == test.name == name and (train.split, test.split) == ("train", "test")
    unsplit = load_both("embedded:digits")
    assert sorted(pixels(train) + pixels(test)) == sorted(pixels(unsplit[0]) + pixels(unsplit[1]))
    shares = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(shares, 0.3, atol=0.005)
    assert train.fingerprint == load_both(name)[0].fingerprint
    others = [*unsplit, *load_both(name, seed=1), *load_both("embedded:digits?train_fraction=0.4"), test]
    assert len({train.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


def test_other_options_apply_after_the_division():
    name = "embedded:digits?{}train_fraction=0.3{}"
    train, test = load_both(name.format("", ""))
    for options in (("per_class=4&classes=7+2&test=30&", ""), ("", "&test=30&classes=7+2&per_class=4")):
        few, capped = load_both(name.format(*options))
        assert few.class_names == ("7", "2") and np.bincount(few.labels).tolist() == [4, 4] and len(capped) == 30
        assert set(pixels(few)) <= set(pixels(train)) and set(pixels(capped)) <= set(pixels(test))
    assert len(load_source("embedded:digits?train_fraction=0.3&train=50", "train")) == 50


# --- folders


def test_folder_with_one_split_is_divided_without_a_note(animals):
    train, test = load_both(f"folder:{animals}?train_fraction=0.3")
    assert np.bincount(train.labels).tolist() == [6, 3] and np.bincount(test.labels).tolist() == [14, 7]
    assert not set(pixels(train)) & set(pixels(test)) and train.notes == test.notes == ()
    assert train.fingerprint not in [one.fingerprint for one in load_both(f"folder:{animals}")]
    assert train.fingerprint != load_source(f"folder:{animals}?train_fraction=0.3", "train", seed=1).fingerprint


def test_both_splits_of_a_folder_are_joined_first(split_animals):
    original = load_both(f"folder:{split_animals}")
    assert any("is used for training" in note for note in original[0].notes)
    train, test = load_both(f"folder:{split_animals}?train_fraction=0.5")
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist() == [5, 5]
    assert sorted(pixels(train) + pixels(test)) == sorted(pixels(original[0]) + pixels(original[1]))
    assert train.notes == ("other/ beside Training/ is not read.",)


def test_unlabelled_test_folder_leaves_no_note_on_a_fifth(tmp_path):
    write_images(tmp_path / "train" / "a", 5)
    write_images(tmp_path / "train" / "b", 5)
    write_images(tmp_path / "test", 3)
    assert any("a fifth" in note for note in load_source(f"folder:{tmp_path}", "train").notes)
    assert load_source(f"folder:{tmp_path}?train_fraction=0.5", "train").notes == ()


def test_copies_in_both_splits_are_mentioned(split_animals):
    shutil.copy(split_animals / "Training" / "cat" / "00.png", split_animals / "Testing" / "cat" / "copy.png")
    notes = load_source(f"folder:{split_animals}?train_fraction=0.5", "train").notes
    assert not any("also in the training split" in note for note in notes)
    assert any("does not keep copies together: test accuracies may be too high" in note for note in notes)


def test_damaged_images_are_left_out_before_the_division(animals):
    (animals / "dog" / "00.png").write_bytes(b"no image")
    train, test = load_both(f"folder:{animals}?train_fraction=0.5", on_corrupt="skip")
    assert len(train) + len(test) == 29 and len(set(pixels(train)) | set(pixels(test))) == 29
    assert "1 of 30 image is damaged and left out" in " ".join(train.notes)
    for path in (animals / "dog").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no image of class .dog. in the train\+test split can be read"):
        load_both(f"folder:{animals}?train_fraction=0.5", on_corrupt="skip")


# --- prepared sets


def test_prepared_splits_are_joined_and_divided(tfds_dir):
    original, divided = load_both("tfds:caltech101"), load_both("tfds:caltech101?train_fraction=0.3")
    assert sum(map(len, divided)) == sum(map(len, original)) == 9144 and len(divided[0]) == round(0.3 * 9144)
    counts = [sum(np.bincount(one.labels, minlength=102) for one in pair) for pair in (original, divided)]
    assert np.array_equal(*counts) and divided[0].metric == "mean_class_accuracy"
    whole = tfds.data_source("caltech101", split="train+test", data_dir=tfds_dir, download=False)
    image = divided[1].read([100])[0]
    matches = [i for i in range(len(whole)) if whole[i]["label"] == divided[1].labels[100]]
    assert any(np.array_equal(whole[i]["image"], image) for i in matches)
    assert len({one.fingerprint for one in (*original, *divided)}) == 4


def test_prepared_set_with_one_split_is_divided_without_a_note(tfds_dir, monkeypatch):
    builder = tfds.builder("caltech101", data_dir=tfds_dir, try_gcs=False)
    single = {"train": builder.info.splits["train"]}
    monkeypatch.setattr(type(builder.info), "splits", property(lambda info: single))
    train, test = load_both("tfds:caltech101?train_fraction=0.5")
    assert len(train) + len(test) == single["train"].num_examples and abs(len(train) - len(test)) <= 1
    assert not any("only one split" in note for note in (*train.notes, *test.notes))


def test_eurosat_is_in_the_catalog():
    assert catalog.find("eurosat") == catalog.find("eurosat/rgb") == catalog.CATALOG["eurosat"]


# --- errors


@pytest.mark.parametrize("value", ("0", "1", "1.5", "-0.3", "nan", "half", ""))
def test_fraction_must_lie_between_0_and_1(value):
    with pytest.raises(InputError, match=f"train_fraction must be a number between 0 and 1, got '{value}'"):
        load_source(f"embedded:digits?train_fraction={value}", "train")


@pytest.mark.parametrize("split", ("train", "test"))
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.05", r"\?train_fraction=0\.05': .*=0\.05 of 30 images leaves class 'kiwi' without a training image; use a"),
        ("0.99", r"\?train_fraction=0\.99': .*=0\.99 of 30 images leaves none for testing; use a smaller one\.$"),
    ],
)
def test_fraction_that_leaves_nothing_is_refused_in_one_line(tmp_path, split, value, message):
    for name, count in (("ape", 14), ("bee", 15), ("kiwi", 1)):
        write_images(tmp_path / name, count)
    with pytest.raises(InputError, match=message) as caught:
        load_source(f"folder:{tmp_path}?train_fraction={value}", split)
    assert "\n" not in str(caught.value)
