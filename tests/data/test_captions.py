"""Sources with captions: tables, COCO, tar files, captions from names of classes, and what may be wrong with them."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers.images import encoded, write_images
from jax_transfer.data import catalog
from jax_transfer.data.attributes import NOTE, with_attributes
from jax_transfer.data.source import NoValidation, from_arrays
from jax_transfer.data.sources import load_source
from jax_transfer.data.templates import TEMPLATES, captions_of, with_templates
from jax_transfer.data.tfds_sets import _validation, read_captions
from jax_transfer.records import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)


def write_table(path, rows, header=("image", "caption")):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])


def make_table(folder, header=("image", "caption"), name="captions.csv"):
    write_images(folder / "photos", 10)
    rows = [(f"photos/{i:02d}.png", f"caption {i} {j}") for i in range(10) for j in range(2)]
    write_table(folder / name, rows, header)


def make_coco(folder, parts=("train2017", "val2017")):
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_train2017.json").write_text("{}")  # not captions
    for part in parts:
        write_images(folder / part, 4, seed=len(part))
        names = [path.name for path in sorted((folder / part).iterdir())]
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "caption": f"{part} {i} {j}"} for i in range(4) for j in range(5)],
        }
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def make_tars(folder, count=2, each=5, caption=lambda i: f"caption {i}"):
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(count):
        members = []
        for i in range(t * each, (t + 1) * each):
            members += [
                (f"{i:09d}.png", encoded(PIXELS[i], "PNG")),
                (f"{i:09d}.txt", caption(i).encode()),
                (f"{i:09d}.json", json.dumps({"caption": "unused", "status": "success"}).encode()),
            ]
        write_tar(folder / f"{t:05d}.tar", members)
        (folder / f"{t:05d}_stats.json").write_text("{}")


# --- the layouts


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (("image", "caption"), "captions.csv"),
        (("FilePath", "Title"), "a.csv"),
        (("file_name", "text"), "a.tsv"),
        (("\ufefffilename", " caption "), "a.csv"),
    ],
)
def test_rows_with_the_same_image_are_its_captions(header, name, tmp_path):
    make_table(tmp_path, header, name)
    train, test = (load_source(f"captions:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and train.class_names == test.class_names == ("image",)
    assert set(train.labels) == {0}
    both = sorted((*train.captions, *test.captions))
    assert both == [(f"caption {i} 0", f"caption {i} 1") for i in range(10)]
    number = int(test.captions[1][0].split()[1])
    np.testing.assert_array_equal(test.read([1])[0], np.asarray(Image.open(tmp_path / f"photos/{number:02d}.png")))
    assert any("a fifth of the images" in note for note in train.notes)


def test_long_captions_are_read_and_the_limit_of_other_csv_readers_is_kept(tmp_path):
    write_images(tmp_path / "photos", 5)
    before, long = csv.field_size_limit(), "x " * 100_000
    assert len(long) > before
    write_table(tmp_path / "a.csv", [(f"photos/{i:02d}.png", long) for i in range(5)])
    assert load_source(f"captions:{tmp_path}", "train").captions[0] == (long.strip(),)
    assert csv.field_size_limit() == before


def test_coco_has_five_captions_of_each_image_and_its_own_splits(tmp_path):
    make_coco(tmp_path)
    train, test = (load_source(f"captions:{tmp_path}", split) for split in ("train", "test"))
    assert [len(train), len(test)] == [4, 4]
    assert train.captions[3] == tuple(f"train2017 3 {j}" for j in range(5))
    assert test.captions[0] == tuple(f"val2017 0 {j}" for j in range(5))
    assert not np.array_equal(train.read([0])[0], test.read([0])[0])  # equal names in two folders
    assert train.fingerprint != test.fingerprint


def test_members_of_tar_files_belong_together(tmp_path):
    make_tars(tmp_path)
    train, test = (load_source(f"captions:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    for source in (train, test):
        for i, image in enumerate(source.read(range(len(source)))):
            np.testing.assert_array_equal(image, PIXELS[int(source.captions[i][0].split()[1])])


def test_folders_name_the_splits_of_tar_files(tmp_path):
    make_tars(tmp_path / "train", count=2)
    make_tars(tmp_path / "val", count=1)
    assert [len(load_source(f"captions:{tmp_path}", split)) for split in ("train", "test")] == [10, 5]
    assert len(load_source(f"captions:{tmp_path}?train_fraction=0.2", "train")) == 3


def test_a_caption_of_the_description_is_used_without_a_text(tmp_path):
    members = [(f"{i}.png", encoded(PIXELS[i], "PNG")) for i in range(5)]
    members += [(f"{i}.json", json.dumps({"caption": f" of   {i}\n"}).encode()) for i in range(5)]
    write_tar(tmp_path / "0.tar", members)
    source = load_source(f"captions:{tmp_path}", "train")
    assert all(caption[0].startswith("of ") for caption in source.captions)


def test_images_option_draws_nested_random_subsets_of_any_training_split(tmp_path):
    make_table(tmp_path)
    name = f"captions:{tmp_path}"
    few, more = (set(load_source(f"{name}?images={n}", "train").captions) for n in (3, 6))
    assert len(few) == 3 and len(more) == 6 and few < more
    assert len(load_source(f"{name}?images=3", "test")) == 2
    digits = load_source("embedded:digits?images=50", "train")
    assert len(digits) == 50 and len(load_source("embedded:digits?images=50", "train", seed=1)) == 50


# --- captions from the names of classes


def test_templates_give_eight_different_captions_with_the_name_of_the_class():
    source = load_source("embedded:digits?captions=templates", "train")
    assert len(source.captions) == len(source)
    for label, captions in zip(source.labels, source.captions, strict=True):
        assert len(set(captions)) == 8 and set(captions) <= set(captions_of(source.class_names[label]))
    used = {caption.replace(source.class_names[k], "{}") for k, c in zip(source.labels, source.captions, strict=True)
            for caption in c}  # fmt: skip
    assert used == set(TEMPLATES)
    again = load_source("embedded:digits?captions=templates", "train")
    other = load_source("embedded:digits?captions=templates", "train", seed=1)
    assert again.captions == source.captions != other.captions
    plain = load_source("embedded:digits", "train")
    assert plain.captions == () and plain.fingerprint == source.fingerprint  # the images are the same


def test_names_are_the_only_caption_and_follow_a_subset():
    source = load_source("embedded:digits?captions=names&classes=3+7&per_class=4", "train")
    assert list(source.captions) == [(source.class_names[k],) for k in source.labels]


def test_class_names_are_spoken():
    source = from_arrays(np.zeros((1, 8, 8), np.uint8), [0], class_names=["African_Bush  Elephant"])
    assert all("african bush elephant" in caption for caption in with_templates(source, 0).captions[0])


def test_another_word_for_captions_is_refused():
    with pytest.raises(InputError, match=r"captions must be templates or names or attributes, got 'all'"):
        load_source("embedded:digits?captions=all", "train")


# --- TFDS


class Records(list):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    "value",
    [
        {"id": [1, 2], "text": np.array([b"one  cat", b"a cat"], object)},
        [{"id": 1, "text": "one cat"}, {"id": 2, "text": b"a cat"}],
        [b"one cat", b"a cat", b" "],
    ],
)
def test_captions_of_tfds_records(value):
    assert read_captions(Records([{"captions": value}] * 300), "captions", "x") == (("one cat", "a cat"),) * 300


def test_a_tfds_record_without_captions_is_counted():
    with pytest.raises(InputError, match=r"x: images without a caption: 2 \(such as number 1\)"):
        read_captions(Records([{"caption": "a"}, {"caption": ""}, {"caption": ""}]), "caption", "x")


# --- what may be wrong


def break_missing(folder):
    make_table(folder)
    (folder / "photos" / "03.png").unlink()


def break_empty(folder):
    make_tars(folder, caption=lambda i: " " if i in (2, 4) else "a")


def break_bare(folder):
    make_coco(folder)
    path = folder / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    path.write_text(json.dumps(content))


def break_table(folder):
    """Leaves two images out of the tables; those of the other split in the same folder have captions."""
    make_table(folder)
    rows = [(f"photos/{i:02d}.png", f"caption {i}") for i in range(8)]
    (folder / "captions.csv").unlink()
    write_table(folder / "train.csv", rows[:5], ("image", "caption"))
    write_table(folder / "test.csv", rows[5:], ("image", "caption"))


PROBLEMS = {
    "captions without an image": (break_missing, r"captions without an image: 2 \(such as photos/03\.png\)"),
    "an empty caption": (break_empty, r"empty captions: 2 \(such as 00000\.tar: 000000002\.png\)"),
    "images in no table": (break_table, r"images without a caption: 2 \(such as photos/08\.png\)"),
    "an image without a caption": (break_bare, r"images without a caption: 1 \(such as train2017/02\.png\)"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_named_and_counted_or_left_out(problem, tmp_path, caplog):
    make, message = PROBLEMS[problem]
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_source(f"captions:{tmp_path}", "train")
    assert "\n" not in str(caught.value) and "on_corrupt" in str(caught.value)
    left = load_source(f"captions:{tmp_path}", "train", on_corrupt="skip")
    assert any("Left out, " in note for note in left.notes) and "left out" in caplog.text
    assert all(captions and all(captions) for captions in left.captions)
    left.read(range(len(left)))


def test_damaged_images_are_left_out_or_named_when_read(tmp_path):
    make_table(tmp_path)
    (tmp_path / "photos" / "05.png").write_bytes(b"no image")
    sources = [load_source(f"captions:{tmp_path}", split) for split in ("train", "test")]
    with pytest.raises(InputError, match=r"05\.png: cannot be read as an image"):
        [source.read(range(len(source))) for source in sources]
    left = [load_source(f"captions:{tmp_path}", split, on_corrupt="skip") for split in ("train", "test")]
    assert sum(map(len, left)) == 9 and any("damaged images: 1" in note for note in left[0].notes)
    make_tars(tmp_path / "tars")
    path = tmp_path / "tars" / "00000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x89PNG", b"\x00PNG", 1))
    with pytest.raises(InputError, match=r"00000\.tar: 000000000\.png: cannot be read as an image"):
        [s.read(range(len(s))) for s in (load_source(f"captions:{tmp_path}/tars", x) for x in ("train", "test"))]


def truncated_tar(folder):
    make_tars(folder, count=1)
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:700])


FILES = {
    "a missing folder": (lambda f: None, r"x: no such folder"),
    "an empty folder": (lambda f: f.mkdir(), r"an empty folder; expected tar files"),
    "images alone": (lambda f: write_images(f, 3), r"no known layout; expected tar files"),
    "a table without captions": (lambda f: make_table(f, ("image", "label")), r"captions\.csv: no column caption or"),
    "an empty table": (lambda f: (f.mkdir(), (f / "a.csv").write_text("")), r"a\.csv: no column .*an empty file"),
    "a table of bytes": (
        lambda f: (f.mkdir(), (f / "a.csv").write_bytes(b"image,caption\n\xff\xfe,\xff")),
        "cannot be",
    ),
    "a quote without end": (
        lambda f: (f.mkdir(), (f / "a.csv").write_text('image,caption\n"a,b')),
        r"a\.csv cannot be",
    ),
    "a table without rows": (lambda f: (f.mkdir(), (f / "a.csv").write_text("image,caption\n")), r"has no images with"),
    "half a JSON": (lambda f: (f.mkdir(), (f / "a.json").write_text('{"images": [')), r"a\.json cannot be read"),
    "another JSON": (lambda f: (f.mkdir(), (f / "a.json").write_text("[1]")), r"a\.json is not a JSON of captions"),
    "half a tar": (truncated_tar, r"00000\.tar cannot be read"),
    "no tar": (lambda f: (f.mkdir(), (f / "a.tar").write_bytes(b"x" * 2000)), r"a\.tar cannot be read"),
    "a test split alone": (lambda f: make_coco(f, ("val2017",)), r"captions_val2017\.json is no training split"),
}


@pytest.mark.parametrize("case", FILES)
def test_unusable_folders_are_refused_in_one_line(case, tmp_path):
    make, message = FILES[case]
    make(tmp_path / "x")
    with pytest.raises(InputError, match=message) as caught:
        load_source(f"captions:{tmp_path / 'x'}", "train")
    assert "\n" not in str(caught.value)


def test_a_single_image_leaves_none_for_testing(tmp_path):
    write_images(tmp_path, 1)
    write_table(tmp_path / "a.csv", [("00.png", "one")])
    with pytest.raises(InputError, match="has no images to test on"):
        load_source(f"captions:{tmp_path}", "test")


# --- three splits


def make_karpathy(folder, split_of=("train", "restval", "val", "test", "test"), sentences=2):
    write_images(folder / "images" / "val2014", len(split_of))
    entries = [
        {
            "split": split,
            "filepath": "val2014",
            "filename": f"{i:02d}.png",
            "sentences": [{"raw": f"image {i} sentence {j}"} for j in range(sentences)],
        }
        for i, split in enumerate(split_of)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return entries


def test_karpathys_file_has_three_splits_and_restval_joins_train(tmp_path):
    make_karpathy(tmp_path)
    splits = {split: load_source(f"captions:{tmp_path}", split) for split in ("train", "validation", "test")}
    assert {split: len(source) for split, source in splits.items()} == {"train": 2, "validation": 1, "test": 2}
    assert splits["train"].captions[1] == ("image 1 sentence 0", "image 1 sentence 1")
    assert splits["validation"].captions == (("image 2 sentence 0", "image 2 sentence 1"),)
    expected = np.asarray(Image.open(tmp_path / "images/val2014/03.png"))
    np.testing.assert_array_equal(splits["test"].read([0])[0], expected)
    assert len({source.fingerprint for source in splits.values()}) == 3
    capped = load_source(f"captions:{tmp_path}?validation=1&test=1", "test")
    assert len(capped) == 1 and len(load_source(f"captions:{tmp_path}?test=1", "validation")) == 1


def test_karpathys_missing_and_bare_images_are_named(tmp_path):
    entries = make_karpathy(tmp_path)
    entries[0]["filename"], entries[1]["sentences"] = "gone.png", []
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(InputError, match=r"captions without an image: 2 \(such as val2014/gone\.png\)"):
        load_source(f"captions:{tmp_path}", "train")
    make_karpathy(tmp_path / "b", sentences=0)
    with pytest.raises(InputError, match=r"images without a caption: 2 \(such as images/val2014/03\.png\)"):
        load_source(f"captions:{tmp_path / 'b'}", "test")
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(InputError, match=r"dataset_coco\.json is not a JSON of Karpathy"):
        load_source(f"captions:{tmp_path}", "train")


def test_a_folder_with_three_splits_has_a_validation_split_and_one_with_two_has_none(tmp_path):
    make_coco(tmp_path / "three", ("train2017", "val2017", "test2017"))
    validation, test = (load_source(f"captions:{tmp_path / 'three'}", split) for split in ("validation", "test"))
    assert validation.captions[0][0] == "val2017 0 0" and test.captions[0][0] == "test2017 0 0"
    assert validation.notes == test.notes == ()
    make_coco(tmp_path / "two")
    make_table(tmp_path / "one")
    for name in ("two", "one"):
        with pytest.raises(NoValidation, match="has no validation split beside its training and test split"):
            load_source(f"captions:{tmp_path / name}", "validation")


def test_a_validation_split_of_tfds_is_one_that_is_not_trained_or_tested_on():
    of = catalog.CATALOG.get
    assert _validation(of("coco_captions"), ("train", "restval", "val", "test")) == "val"
    assert _validation(None, ("train", "validation", "test")) == "validation"
    assert _validation(None, ("train", "validation")) == _validation(of("dtd"), ("train", "validation", "test")) == ""


def test_captions_from_attributes_name_the_class_and_the_colours():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0, :4], images[0, 4:] = (200, 30, 30), (30, 30, 200)  # red above blue
    images[1] = 250
    source = from_arrays(images, [0, 1], class_names=["Owl", "tree_frog"])
    first, second = with_attributes(source, seed=0).captions
    assert first[0] == "a dark photo of an owl, red and red above, blue and blue below."
    assert second[2].startswith("white is the main colour of this bright image of a tree frog,") and len(first) == 5
    assert with_attributes(source, 0).notes == (NOTE,) and with_attributes(source, 0).fingerprint == source.fingerprint
