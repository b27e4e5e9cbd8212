"""Which folders are splits, which are classes, and which are neither, under names that people and systems use."""

import itertools
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from helpers.images import write_images
from jax_transfer.data import layout
from jax_transfer.data.sources import load_source
from jax_transfer.records import InputError


def load_both(root):
    return [load_source(f"folder:{root}", split) for split in ("train", "test")]


def make_split(folder, classes=("a", "b"), count=3):
    for i, name in enumerate(classes):
        write_images(folder / name, count, seed=[*folder.name.encode(), i])


def recognised(root, train, test, classes=("a", "b")):
    """Creates and removes `root` with two folders; returns whether they are recognised as the splits."""
    make_split(root / train, classes, 3)
    make_split(root / test, classes, 2)
    sources = load_both(root)
    shutil.rmtree(root)
    return sources[0].class_names == tuple(classes) and [len(source) for source in sources] == [6, 4]


# ---- split folders

TRAIN = ("train", "training", "trn")
TEST = ("test", "testing", "val", "valid", "validation", "dev", "eval", "tst")
AFFIXES = ("{}", "{}_set", "{}ing_set", "{}-images", "{} data", "seg_{}", "x_{}", "{}2017", "01_{}", "{}set", "img_{}",
           "{}_folder", "MRI {} scans", "chest-{}", "dataset_{}", "{}_dataset", "{}.split", "imgs{}")  # fmt: skip
CASES = {"lower": str.lower, "upper": str.upper, "title": str.title}


@pytest.mark.parametrize("affix", AFFIXES)
def test_a_role_is_recognised_in_any_case_and_affix(affix):
    for word, case in itertools.product(TRAIN + TEST, CASES.values()):
        if "{}ing" in affix and word not in ("train", "test"):
            continue
        role, words = layout.role(case(affix.format(word)))
        assert role == ("train" if word in TRAIN else "test" if word in ("test", "testing", "tst") else "val")
        assert words == layout.role(case(affix.format("train")))[1]


@pytest.mark.parametrize("affix", AFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_split_folders_are_recognised_in_any_case_and_affix(tmp_path, affix, case):
    index = AFFIXES.index(affix)
    train, test = ("train", "test") if "{}ing" in affix else (TRAIN[index % len(TRAIN)], TEST[index % len(TEST)])
    assert recognised(tmp_path / "root", *(CASES[case](affix.format(word)) for word in (train, test)))


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("TRAIN", "TEST"), ("TrainImages", "TestImages"), ("training_set", "test_set"),
     ("train", "test_set"), ("train_images", "test"), ("x_train", "x_val"), ("trainval", "test"), ("train_val", "test"),
     ("train", "dev"), ("trainingData", "validationData"), ("train", "holdout"), ("Train", "val"),
     ("train", "seg_test"), ("mri_train", "test")],
)  # fmt: skip
def test_split_folders_of_published_sets_are_recognised(tmp_path, train, test):
    assert recognised(tmp_path / "root", train, test)


def test_nested_split_folders_of_the_same_name_are_read(tmp_path):
    """The layout of an archive of natural scenes, which also has a folder of unlabelled images."""
    make_split(tmp_path / "seg_train" / "seg_train")
    make_split(tmp_path / "seg_test" / "seg_test", count=2)
    write_images(tmp_path / "seg_pred" / "seg_pred", 3)
    train, test = load_both(tmp_path)
    assert train.class_names == ("a", "b") and (len(train), len(test)) == (6, 4)
    used = "seg_train/seg_train/ is used for training and seg_test/seg_test/ for testing"
    assert any(used in note for note in train.notes)
    assert any("seg_pred/ beside seg_train/seg_train/ is not read" in note for note in train.notes)


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
@pytest.mark.parametrize("unlabelled", ["flat", "images", "unknown", "empty", "test", "TestSet"])
def test_validation_replaces_a_test_split_without_labels(tmp_path, caplog, val, unlabelled):
    make_split(tmp_path / "train")
    make_split(tmp_path / val, count=2)
    (tmp_path / "test").mkdir()
    if unlabelled != "empty":
        write_images(tmp_path / "test" / ("" if unlabelled == "flat" else unlabelled), 3)
    train, test = load_both(tmp_path)
    assert (len(train), len(test)) == (6, 4) and train.class_names == ("a", "b")
    expected = f"train/ is used for training and {val}/ for testing, because test/ has no class folders."
    assert expected in train.notes and expected in test.notes and caplog.text.count(expected) == 1


def test_a_fifth_of_train_replaces_an_unlabelled_test_split(tmp_path):
    make_split(tmp_path / "train", count=5)
    write_images(tmp_path / "test", 3)
    train, test = load_both(tmp_path)
    assert (len(train), len(test)) == (8, 2)
    expected = "test/ has no class folders: a fifth of each class of train/ is used for testing"
    assert any(expected in note for note in train.notes)


def test_test_is_preferred_to_validation(tmp_path):
    for name, count in (("train", 3), ("val", 4), ("test", 2)):
        make_split(tmp_path / name, count=count)
    train, test = load_both(tmp_path)
    assert (len(train), len(test)) == (6, 4) and "val/ beside train/ is not read." in train.notes


def test_plain_splits_have_no_notes(tmp_path):
    make_split(tmp_path / "train")
    make_split(tmp_path / "test")
    assert load_both(tmp_path)[0].notes == ()


@pytest.mark.parametrize(
    "names",
    [("test_tube", "train_station"), ("train", "bus"), ("dev_board", "laptop"), ("Training shoes", "boots"),
     ("contest", "strain"), ("trainer", "tester"), ("evaluation_kit", "val d'isere"), ("detrain", "latest")],
)  # fmt: skip
def test_class_names_may_contain_split_words(tmp_path, names):
    for name in names:
        write_images(tmp_path / name, 3)
    assert set(load_source(f"folder:{tmp_path}", "train").class_names) == set(names)


def test_ambiguous_splits_are_named(tmp_path):
    for name in ("train_2014", "train_2017", "test"):
        make_split(tmp_path / name)
    with pytest.raises(InputError, match="train_2014/, train_2017/ could each be the train split"):
        load_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("test", ["hold-out", "held_out", "Hold Out", "valid_test", "test+val", "ＴＥＳＴ"])
def test_split_names_may_have_two_words_or_wide_letters(tmp_path, test):
    assert recognised(tmp_path / "root", "ｔｒａｉｎ" if test == "ＴＥＳＴ" else "train", test)


@pytest.mark.parametrize("pattern", ["{split}_{name}", "{name}-{split}", "{name} {split}ing", "{split}Set{name}"])
@pytest.mark.parametrize("names", [("real", "fake"), ("Cat", "Dog", "Emu")])
def test_folders_named_by_class_and_split_are_refused(tmp_path, pattern, names):
    for split, name in itertools.product(("train", "test"), names):
        write_images(tmp_path / pattern.format(split=split, name=name), 2)
    with pytest.raises(InputError, match=r"seem to be two splits of one class; arrange the images as train/<class>/"):
        load_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("around", ["", "train"])
@pytest.mark.parametrize("name", ["brain_tumor_dataset", "animals", "zoo", "A"])
@pytest.mark.parametrize("names", [("no", "yes"), ("cat", "dog", "emu")])
def test_a_nested_copy_of_the_data_set_is_refused(tmp_path, around, name, names):
    """Some archives contain their own folder a second time."""
    root = tmp_path / around
    make_split(root, names)
    make_split(root / name, names)
    with pytest.raises(
        InputError, match=f"{name}: holds folders with the names of the classes beside it .*{names[0]}, {names[1]}"
    ):
        load_source(f"folder:{tmp_path}", "train")
    shutil.rmtree(root / name)
    assert load_source(f"folder:{tmp_path}", "train").class_names == names


@pytest.mark.parametrize("name", ["train", "training", "Train"])
@pytest.mark.parametrize(
    "others", [("bus", "car"), ("running", "cycling"), ("bus/single", "car/taxi"), ("control/p3", "control/p4")]
)
def test_image_folders_beside_the_only_split_are_refused(tmp_path, name, others):
    """The folder may be the class of vehicles, with subfolders of its kinds."""
    make_split(tmp_path / name, ("steam", "electric"))
    for other in others:
        write_images(tmp_path / other, 2)
    first = min(other.split("/")[0] for other in others)
    expected = rf"{name}/ may be a split or a class, since {first}/.* beside it holds? other images\. "
    expected += "To read it alone, name "
    with pytest.raises(InputError, match=expected) as caught:
        load_source(f"folder:{tmp_path}", "train")
    assert "\n" not in str(caught.value)
    assert load_source(f"folder:{tmp_path / name}", "train").class_names == ("electric", "steam")
    for image in (tmp_path / name).rglob("*.png"):
        image.rename(tmp_path / name / f"{image.parent.name}_{image.name}")
    for folder in ("steam", "electric"):
        (tmp_path / name / folder).rmdir()
    assert name in load_source(f"folder:{tmp_path}", "train").class_names


@pytest.mark.parametrize(
    "beside", ["unlabelled/0.png", "predict/0.png", "docs/readme.txt", "gallery/a/0.png", "images/0.png"]
)
def test_other_folders_beside_the_only_split_are_noted(tmp_path, beside):
    make_split(tmp_path / "train")
    (tmp_path / beside).parent.mkdir(parents=True)
    (tmp_path / "train" / "a" / "00.png").rename(tmp_path / beside)
    train, _ = load_both(tmp_path)
    assert train.class_names == ("a", "b") and train.notes == (f"{beside.split('/')[0]}/ beside train/ is not read.",)


@pytest.mark.parametrize(
    ("split", "other"), [("test", "learn"), ("Test", "Entraînement"), ("val", "fit"), ("test", "")]
)
def test_a_test_split_without_train_suggests_a_rename(tmp_path, split, other):
    for name in filter(None, (split, other)):
        make_split(tmp_path / name)
    expected = f"rename {other}/ to train/ if that is the training set" if other else "add it with the same classes"
    with pytest.raises(
        InputError, match=f"has {split}/ but no train/; {expected}, or rename {split}/ if it is a class"
    ):
        load_source(f"folder:{tmp_path}", "train")


# ---- structure below class folders

STRUCTURES = [
    ("fold1", "fold2"), ("2019", "2020", "2021"), ("hospital A", "hospital B"), ("batch_a", "batch_b", "batch_c"),
    ("apprentissage", "essai"), ("lernen", "prüfen"), ("train_station", "test_tube"), ("cat", "dog"),
]  # fmt: skip


@pytest.mark.parametrize("names", STRUCTURES)
@pytest.mark.parametrize("below", [("a", "b"), ("0", "1", "2"), ("train", "test")])
@pytest.mark.parametrize("inside", ["", "train"])
def test_folders_with_equal_subfolders_are_refused(tmp_path, names, below, inside):
    for name in names:
        make_split(tmp_path / inside / name, below, 1)
    if inside:
        make_split(tmp_path / "test", ("a", "b"), 1)
    with pytest.raises(
        InputError, match=r"all hold the same folders \(.*\), so they do not seem to be classes"
    ) as caught:
        load_source(f"folder:{tmp_path}", "train")
    assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in names[:3])


def test_a_single_outer_folder_is_named(tmp_path):
    make_split(tmp_path / "archive" / "Training")
    make_split(tmp_path / "archive" / "Testing")
    with pytest.raises(
        InputError, match=r"its only folder archive/ holds the folders Testing, Training.*/archive as the"
    ):
        load_source(f"folder:{tmp_path}", "train")
    assert load_source(f"folder:{tmp_path / 'archive'}", "train").class_names == ("a", "b")


@pytest.mark.parametrize(
    "below", [{"a": ("x", "y"), "b": ("y", "z")}, {"a": ("images",), "b": ("images",)}, {"a": ("x",)}]
)
def test_subfolders_belong_to_their_class_and_are_noted(tmp_path, below):
    for name in ("a", "b"):
        for sub in below.get(name, ("",)):
            write_images(tmp_path / name / sub, 2, seed=ord(name))
    train, test = load_both(tmp_path)
    assert train.class_names == ("a", "b")
    assert len(train) + len(test) == sum(2 * len(below.get(name, ("",))) for name in ("a", "b"))
    assert any(f"{len(below)} of 2 class folders contain subfolders (such as a/" in note for note in train.notes)


# ---- names of classes


@pytest.mark.parametrize("name", ["café", "Ångström", "한국어", "Việt Nam", "é" * 20, "ḍ̇"])
@pytest.mark.parametrize("forms", list(itertools.product(("NFC", "NFD"), repeat=2)))
def test_class_names_compare_in_one_unicode_form(tmp_path, name, forms):
    for split, form in zip(("train", "test"), forms, strict=True):
        make_split(tmp_path / split, (unicodedata.normalize(form, name), "other"))
    train, test = load_both(tmp_path)
    assert train.class_names == test.class_names == tuple(sorted([unicodedata.normalize("NFC", name), "other"]))
    assert np.bincount(test.labels).tolist() == [3, 3]


def test_folders_of_equal_normalized_names_are_one_class(tmp_path):
    for form in ("NFC", "NFD"):
        write_images(tmp_path / unicodedata.normalize(form, "café"), 5, seed=len(form + form[2:] * ord(form[2])))
    write_images(tmp_path / "tea", 5)
    train, test = load_both(tmp_path)
    assert train.class_names == ("café", "tea")
    assert (np.bincount(train.labels) + np.bincount(test.labels)).tolist() == [10, 5]


def test_class_names_are_case_sensitive(tmp_path):
    make_split(tmp_path / "train", ("Cat", "cat"))
    make_split(tmp_path / "test", ("Cat", "CAT"))
    with pytest.raises(InputError, match="class 'CAT' is not in"):
        load_source(f"folder:{tmp_path}", "train")
    shutil.rmtree(tmp_path / "test")
    assert load_source(f"folder:{tmp_path}", "train").class_names == ("Cat", "cat")


def test_the_log_names_the_classes(tmp_path, caplog):
    make_split(tmp_path / "Training")
    make_split(tmp_path / "Testing")
    with caplog.at_level("INFO"):
        load_both(tmp_path)
    assert caplog.text.count("2 classes (a, b)") == 1
    assert caplog.text.count("Training/ is used for training and Testing/ for testing.") == 1


# ---- system files and folders

SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle", "System Volume Information", "@tmp",
                  ".Trash-1000", ".ipynb_checkpoints", ".git", "RECYCLER", "#snapshot", "found.000", "@Recycle",
                  "__pycache__", ".AppleDouble", "LOST.DIR", "@SynoResource", "Recycle.Bin", "$WinREAgent", "MSOCache",
                  ".dropbox.cache", ".stversions")  # fmt: skip
SYSTEM_FILES = ("Thumbs.db", ".DS_Store", "._x.jpg", "desktop.ini", "ehthumbs.db", ".hidden.png", "Icon\r",
                "Picasa.ini", "~$labels.xlsx", "0.png:Zone.Identifier", "Thumbs.db:encryptable")  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_system_folders_are_ignored_at_every_level(tmp_path, name):
    make_split(tmp_path / "train")
    make_split(tmp_path / "test")
    before = [source.fingerprint for source in load_both(tmp_path)]
    for folder in ("", "train", "test", "train/a"):
        for spelt in {name, name.lower(), name.upper()}:
            write_images(tmp_path / folder / spelt / "1.png", 1)
    assert [source.fingerprint for source in load_both(tmp_path)] == before
    shutil.rmtree(tmp_path / "test")
    assert load_source(f"folder:{tmp_path / 'train'}", "train").class_names == ("a", "b")


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_system_files_are_ignored(tmp_path, name):
    make_split(tmp_path)
    for folder in ("", "a"):
        (tmp_path / folder / name).write_bytes(b"Mac OS X")
    train, test = load_both(tmp_path)
    assert (len(train), len(test)) == (4, 2) and train.notes == ()


@pytest.mark.parametrize(
    "name",
    ["@home", "found", "recycle", "lost", "macosx", "thumbs", "snapshot #1", "System", "$1 bill", "bin",
     "~tilde", "recovery", "zone.identifier"],
)  # fmt: skip
def test_similar_names_are_not_system_names(name):
    assert not layout.is_system(name)


# ---- extensions

FORMATS = {
    ".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".apng": "PNG", ".ppm": "PPM",
    ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".dib": "BMP",
    ".gif": "GIF", ".webp": "WEBP",
}  # fmt: skip


@pytest.mark.parametrize("extension", FORMATS)
def test_supported_extensions_are_read(tmp_path, extension):
    mode = {".pbm": "1", ".pgm": "L"}.get(extension, "RGB")
    generator = np.random.default_rng(0)
    for i, name in itertools.product(range(2), "ab"):
        (tmp_path / name).mkdir(exist_ok=True)
        image = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).convert(mode)
        image.save(tmp_path / name / f"{i}{extension.upper() if i else extension}", format=FORMATS[extension])
    source = load_source(f"folder:{tmp_path}", "train", on_corrupt="skip")
    assert len(source) == 2 and source.read([0])[0].shape == (9, 9, 3) and source.notes == ()


def test_all_supported_extensions_are_tested():
    assert set(FORMATS) == layout.EXTENSIONS


@pytest.mark.parametrize("extension", [".heic", ".avif", ".dcm", ".npy", ".psd", ".CR2", ".txt", ""])
def test_files_with_other_extensions_are_counted_and_named(tmp_path, extension):
    make_split(tmp_path)
    write_images(tmp_path / "c", 1)
    for i in range(3):
        (tmp_path / "c" / f"photo{i}{extension}").write_bytes(b"something")
    (note,) = load_source(f"folder:{tmp_path}", "train").notes
    assert "3 files are not read" in note and f"c/photo0{extension}" in note
    (tmp_path / "c" / "00.png").unlink()
    with pytest.raises(InputError, match=r"c: none of its 3 files is an image \(such as photo0"):
        load_source(f"folder:{tmp_path}", "train")


def test_images_beside_the_class_folders_are_counted(tmp_path):
    make_split(tmp_path / "train")
    make_split(tmp_path / "test")
    write_images(tmp_path / "train", 2)
    (note,) = load_source(f"folder:{tmp_path}", "train").notes
    assert note == "2 images are outside the class folders and are not read (such as train/00.png)."
    (tmp_path / "train" / "00.png").unlink()
    (note,) = load_source(f"folder:{tmp_path}", "train").notes
    assert note == "1 image is outside the class folders and is not read (such as train/01.png)."
