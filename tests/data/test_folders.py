"""Class folders: layouts, splits, links, damaged images, and errors that users can cause."""

import logging
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.images import write_images
from jax_transfer.data.sources import load_source, materialize
from jax_transfer.data.transforms import resize_square
from jax_transfer.records import InputError


@pytest.fixture
def animals(tmp_path):
    """Class folders cat/ (10 images) and dog/ (5)."""
    write_images(tmp_path / "animals" / "dog", 5)
    write_images(tmp_path / "animals" / "cat", 10)
    return tmp_path / "animals"


@pytest.fixture
def split_animals(tmp_path):
    """The same classes below train/ (6 images each) and test/ (2 each)."""
    root = tmp_path / "split"
    for split, count in (("train", 6), ("test", 2)):
        write_images(root / split / "cat", count, seed=count)
        write_images(root / split / "dog", count, seed=count)
    return root


def test_class_folders_are_sorted_by_name(animals):
    train, test = (load_source(f"folder:{animals}", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert np.bincount(train.labels).tolist() == [8, 4] and np.bincount(test.labels).tolist() == [2, 1]
    pixels = [{image.tobytes() for image in source.read(range(len(source)))} for source in (train, test)]
    assert len(pixels[0]) == 12 and len(pixels[1]) == 3 and not pixels[0] & pixels[1]


def test_the_split_does_not_depend_on_the_seed(animals):
    assert (
        load_source(f"folder:{animals}", "test", seed=0).fingerprint
        == load_source(f"folder:{animals}", "test", 9).fingerprint
    )


@pytest.mark.parametrize("test_folder", ["test", "val", "validation"])
def test_train_and_test_folders_are_the_splits(split_animals, test_folder):
    (split_animals / "test").rename(split_animals / test_folder)
    train, test = (load_source(f"folder:{split_animals}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 4) and test.labels.tolist() == [0, 0, 1, 1]
    direct = np.asarray(Image.open(split_animals / test_folder / "dog" / "01.png"))
    assert np.array_equal(test.read([3])[0], direct)


def test_train_without_test_is_split(split_animals):
    shutil.rmtree(split_animals / "test")
    train, test = (load_source(f"folder:{split_animals}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 2) and train.class_names == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "train", 5)
    write_images(tmp_path / "bus", 5)
    assert load_source(f"folder:{tmp_path}", "train").class_names == ("bus", "train")


def test_labels_of_test_follow_the_classes_of_train(split_animals):
    shutil.rmtree(split_animals / "test" / "cat")
    test = load_source(f"folder:{split_animals}", "test")
    assert test.class_names == ("cat", "dog") and test.labels.tolist() == [1, 1]


def test_one_class_loads(tmp_path):
    write_images(tmp_path / "only", 5)
    assert load_source(f"folder:{tmp_path}", "train").num_classes == 1


def test_extensions_hidden_files_and_nested_folders(animals, caplog):
    write_images(animals / "cat" / "more", 1)
    write_images(animals / ".cache", 1)
    Image.new("RGB", (3, 3)).save(animals / "cat" / "UPPER.JPG", format="JPEG")
    (animals / "cat" / ".hidden.png").write_bytes(b"")
    (animals / "cat" / "notes.txt").write_text("no image")
    counts = [np.bincount(load_source(f"folder:{animals}", split).labels).tolist() for split in ("train", "test")]
    assert np.sum(counts, axis=0).tolist() == [12, 5]
    assert "1 file is not read because of its extension (.txt; such as cat/notes.txt)" in caplog.text


@pytest.mark.parametrize("folder", ["what?", "a?b", "katzen und häuser 猫", "x?y=1/z", "50% & more=less"])
def test_folder_names_may_contain_any_characters(tmp_path, folder):
    write_images(tmp_path / folder / "ein Hündchen", 5)
    assert len(load_source(f"folder:{tmp_path / folder}", "train")) == 4
    assert len(load_source(f"folder:{tmp_path / folder}?train=2", "train")) == 2


def test_the_fingerprint_changes_with_the_files(animals):
    before = load_source(f"folder:{animals}", "train").fingerprint
    assert load_source(f"folder:{animals}", "train").fingerprint == before
    for path in sorted((animals / "cat").iterdir()):
        path.touch()
    assert load_source(f"folder:{animals}", "train").fingerprint != before


def test_folder_sources_pickle(animals):
    source = load_source(f"folder:{animals}?train=4", "train")
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read([1])[0], source.read([1])[0])


def test_missing_folders_and_empty_classes_are_named(tmp_path, split_animals):
    def message(split="train"):
        with pytest.raises(InputError) as caught:
            load_source(f"folder:{tmp_path / 'x'}", split)
        return str(caught.value)

    assert f"{tmp_path / 'x'}: no such folder" in message()
    (tmp_path / "x").write_text("")
    assert f"{tmp_path / 'x'}: not a folder" in message()
    (tmp_path / "x").unlink()
    (tmp_path / "x").mkdir()
    assert f"{tmp_path / 'x'}: no class folders" in message()
    write_images(tmp_path / "x" / "cat", 1)
    assert "no class has more than one image" in message("test")
    (tmp_path / "x" / "empty").mkdir()
    assert f"{tmp_path / 'x' / 'empty'}: the class has no images; expected .apng, .bmp" in message()


def test_wrong_split_folders_are_named(split_animals):
    write_images(split_animals / "test" / "zebra", 1)
    with pytest.raises(InputError, match="test/zebra: class 'zebra' is not in"):
        load_source(f"folder:{split_animals}", "test")
    shutil.move(split_animals / "train", split_animals / "images")
    with pytest.raises(InputError, match="has test/ but no train/"):
        load_source(f"folder:{split_animals}", "train")


def test_split_folders_without_classes_are_not_classes(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "test", 3)
    with pytest.raises(InputError, match="train: no class folders"):
        load_source(f"folder:{tmp_path}", "train")


def test_links_are_followed_inside_and_outside(animals, tmp_path):
    write_images(tmp_path / "elsewhere", 4)
    (animals / "cat" / "inside.png").symlink_to(animals / "dog" / "00.png")
    (animals / "cat" / "outside.png").symlink_to(tmp_path / "elsewhere" / "00.png")
    (animals / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (animals / "wolf").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(animals)
    whole = [load_source(f"folder:{tmp_path / 'link'}", split) for split in ("train", "test")]
    assert whole[0].class_names == ("cat", "dog", "wolf")
    assert sum(np.bincount(source.labels, minlength=3) for source in whole).tolist() == [16, 5, 4]
    assert all(image.shape == (12, 10, 3) for source in whole for image in source.read(range(len(source))))


def test_split_folders_may_be_links_to_elsewhere(split_animals, tmp_path):
    before = load_source(f"folder:{split_animals}", "train").fingerprint
    (split_animals / "train").rename(tmp_path / "outside")
    (split_animals / "train").symlink_to(tmp_path / "outside")
    assert load_source(f"folder:{split_animals}", "train").fingerprint == before


def test_a_snapshot_of_links_to_blobs_is_read(split_animals, tmp_path):
    """In the cache of a hub, a snapshot holds relative links to files that are named by their hashes."""
    snapshot = tmp_path / "hub" / "snapshots" / "1a2b"
    for i, path in enumerate(sorted(split_animals.rglob("*.png"))):
        link = snapshot / path.relative_to(split_animals)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = tmp_path / "hub" / "blobs" / f"{i:064x}"
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    source = load_source(f"folder:{snapshot}", "train", on_corrupt="skip")
    assert len(source) == 12 and source.class_names == ("cat", "dog") and len(source.read(range(12))) == 12


def test_broken_and_circular_links_are_named(animals, tmp_path):
    write_images(tmp_path / "elsewhere", 1)
    (tmp_path / "elsewhere" / "back").symlink_to(animals / "cat")
    for link, target, message in (
        (animals / "gone", tmp_path / "nothing", "gone: a broken link to"),
        (animals / "cat" / "gone.png", tmp_path / "nothing", "gone.png: a broken link to"),
        (animals / "cat" / "self.png", animals / "cat" / "self.png", "self.png: a broken link to"),
        (animals / "cat" / "loop", animals, "loop: a link to a folder that contains it"),
        (animals / "loop", animals, "loop: a link to a folder that contains it"),
        (
            animals / "cat" / "round",
            tmp_path / "elsewhere",
            "back: leads to .*cat, whose images are already in this class",
        ),
    ):
        link.symlink_to(target)
        with pytest.raises(InputError, match=message):
            load_source(f"folder:{animals}", "train")
        link.unlink()


def damage(folder):
    whole = (folder / "00.png").read_bytes()
    (folder / "01.png").write_bytes(b"")
    (folder / "02.png").write_bytes(b"no image")
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])


def test_skip_names_and_counts_damaged_images(split_animals, caplog):
    damage(split_animals / "train" / "cat")
    whole = load_source(f"folder:{split_animals}", "train")
    with caplog.at_level(logging.WARNING):
        source = load_source(f"folder:{split_animals}", "train", on_corrupt="skip")
    assert "3 of 12 images" in caplog.text and all(f"0{i}.png" in caplog.text for i in (1, 2, 3))
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1] and len(source.read(range(9))) == 9
    assert source.fingerprint != whole.fingerprint


@pytest.mark.parametrize(("name", "reason"), [("01", "empty"), ("02", "not an image"), ("03", "truncated")])
def test_reading_a_damaged_image_names_it(split_animals, name, reason):
    damage(split_animals / "train" / "cat")
    source = load_source(f"folder:{split_animals}", "train")
    with pytest.raises(InputError, match=f"{name}.png.*{reason}"):
        source.read([int(name)])


def test_skip_names_a_class_without_readable_images(split_animals):
    for path in (split_animals / "train" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"no image of class 'dog' in the train split can be read; the first error: .*the file is empty",
    ):
        load_source(f"folder:{split_animals}", "train", on_corrupt="skip")


def test_skip_gives_the_reason_for_an_unreadable_class(split_animals):
    for path in (split_animals / "train" / "dog").iterdir():
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")
    with pytest.raises(
        InputError, match=r"no image of class 'dog' in the train .* first error: .*00\.png.*floating point"
    ):
        load_source(f"folder:{split_animals}", "train", on_corrupt="skip")


def test_materialize_resizes_all_images(animals):
    source = load_source(f"folder:{animals}", "train")
    images, labels = materialize(source, 9)
    assert np.array_equal(images, np.stack([resize_square(image, 9) for image in source.read(range(12))]))
    assert np.array_equal(labels, source.labels)


def test_materialize_names_the_damaged_image(animals):
    (animals / "cat" / "03.png").write_bytes(b"")
    source = load_source(f"folder:{animals}", "train")
    with pytest.raises(InputError, match=r"03\.png.*empty"):
        materialize(source, 8)
