"""Folders with any contents: images, or a one-line error that names the path; `skip` keeps all valid images."""

import itertools
import logging
import os
import pathlib
import re
import shutil
import socket
import struct
import tempfile
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.hostile import accepted_or_refused, examples, watchdog
from helpers.images import encoded, png
from jax_transfer.data import folders, layout, sources
from jax_transfer.data.sources import load_source, materialize
from jax_transfer.data.transforms import decode_file
from jax_transfer.records import InputError, printable

pytestmark = pytest.mark.filterwarnings("ignore")  # PIL warns about damaged tags and large images
RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def turned(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, kind, exif=exif)


def png_that_claims(width, height):
    """Returns a PNG file with a valid header and too few pixels."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(100)))


FRAMES = [Image.new("P", (9, 9), colour) for colour in (0, 5, 9)]
VALID = {
    "rgb.png": encoded(RGB, "PNG"),
    "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.png": encoded(
        FRAMES[0].convert("RGB"), "PNG", save_all=True, append_images=[f.convert("RGB") for f in FRAMES]
    ),
    "animated.webp": encoded(FRAMES[0].convert("RGBA"), "WEBP", save_all=True, append_images=FRAMES[1:]),
    "palette_with_a_hole.png": encoded(FRAMES[1], "PNG", transparency=5),
    "cmyk.jpeg": encoded(Image.new("CMYK", (8, 8), (0, 200, 255, 9)), "JPEG"),
    "sixteen.png": encoded(RGB[:, :, 0].astype(np.uint16) * 257, "PNG"),
    "sixteen.tif": encoded(RGB[:, :, 0].astype(np.uint16) * 257, "TIFF"),
    "pages.tiff": encoded(FRAMES[0].convert("L"), "TIFF", save_all=True, append_images=[FRAMES[1].convert("L")]),
    "alpha.png": encoded(np.dstack([RGB, RGB[:, :, 0]]), "PNG"),
    "alpha.webp": encoded(np.dstack([RGB, RGB[:, :, 0]]), "WEBP", lossless=True),
    "gray_alpha.png": encoded(Image.fromarray(RGB).convert("LA"), "PNG"),
    "bits.bmp": encoded(Image.fromarray(RGB).convert("1"), "BMP"),
    "lab.tif": encoded(Image.fromarray(RGB).convert("LAB"), "TIFF"),
    "pixel.png": encoded(RGB[:1, :1], "PNG"),
    "strip.png": encoded(np.zeros((1, 5000), np.uint8), "PNG"),
    "pole.jpg": encoded(np.zeros((5000, 1), np.uint8), "JPEG"),
    "png_called.jpg": encoded(RGB, "PNG"),
    "CAPITALS.JPG": encoded(RGB, "JPEG"),
    **{f"turned_{i}.jpg": turned("JPEG", i) for i in (2, 5, 6, 8, 77)},
}
DAMAGED = {
    "empty.jpg": b"",
    "bomb.png": png_that_claims(100_000, 100_000),
    "claims.png": png_that_claims(3000, 3000),
    "no_side.png": png_that_claims(0, 9),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch it_ran) (w) file closefile\n",
    "vectors.gif": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "text.tif": b"no image",
    "floats.tif": encoded(np.ones((4, 4), np.float32), "TIFF"),
}
SUFFIXES = sorted(layout.EXTENSIONS)
NAMES = st.one_of(
    st.sampled_from(
        ["猫 и щенок", "كلب", "\u202etxt", "a\nb", "\x1b[2J", "👩‍🔬🐕", "e\u0301", "%s%d", "$(touch it_ran)", "-rf",
         "~", "a?b=1", "CON",
         os.fsdecode(b"\xff\xfe"), "z" * 240, "ü" * 120, " ", "..a", "'\"", "\\"]
    ),
    st.text(st.characters(blacklist_characters="/\x00", blacklist_categories=["Cs"]), min_size=1, max_size=12),
)  # fmt: skip
CONTENTS = st.one_of(
    st.sampled_from(sorted(VALID)).map(lambda name: ("valid", name, VALID[name])),
    st.sampled_from(sorted(DAMAGED)).map(lambda name: ("damaged", name, DAMAGED[name])),
    st.tuples(st.just("unknown"), st.sampled_from(SUFFIXES), st.binary(max_size=60)),
    st.tuples(st.sampled_from(sorted(VALID)), st.floats(0, 0.999)).map(
        lambda of: ("unknown", of[0], VALID[of[0]][: int(of[1] * len(VALID[of[0]]))])
    ),
    st.tuples(st.sampled_from(sorted(VALID)), st.floats(0, 0.999), st.integers(1, 255)).map(
        lambda of: ("unknown", of[0], flipped(VALID[of[0]], of[1], of[2]))
    ),
    st.sampled_from(("fifo", "socket", "folder", "outside", "dangling", "loop", "inside")).map(
        lambda kind: (kind, "x.png", b"")
    ),
)
LINKS = ("dangling", "loop")


def flipped(data, place, mask):
    place = int(place * len(data))
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def put(path, kind, data, root):
    """Writes one entry of a class folder."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket address has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as held:
                held.bind(path.name[-20:] if len(os.fsencode(path.name)) > 90 else path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
        (path / "inner.png").write_bytes(VALID["rgb.png"])
    elif kind in ("outside", "dangling", "loop", "inside"):
        inside = root / "cat" / "0.png"
        path.symlink_to({"outside": __file__, "dangling": "/no/such", "loop": path.name, "inside": inside}[kind])
    else:
        path.write_bytes(data)


def fill(root, entries):
    """Returns (number of valid images, paths that must be reported, links that must be refused)."""
    valid, damaged, links = 0, [], []
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(12):  # enough for some in the test split
            shade = Image.new("RGB", (9, 9), (9 * i, 20 * len(name), 7))  # since equal images are an error
            (root / name / f"{i}.png").write_bytes(encoded(shade, "PNG"))
            valid += 1
    for place, (in_cat, stem, (kind, name, data)) in enumerate(entries):
        suffix = name if name.startswith(".") else pathlib.PurePath(name).suffix
        path = root / ("cat" if in_cat else "dog") / f"{stem}{place}{suffix}"
        if len(os.fsencode(path.name)) > 255:
            continue
        put(path, kind, data, root)
        if path.name.startswith("."):
            continue
        valid += kind in ("valid", "folder", "inside")
        if kind in ("damaged", "fifo", "outside"):  # the file outside is not an image
            damaged.append(path)
        if kind in LINKS:
            links.append(path)
    return valid, damaged, links


def both_splits(root, on_corrupt):
    """Loads both splits of a folder with a final slash, so that a?b=1 is not an option; returns the image count."""
    found = [materialize(load_source(f"folder:{root}", split, on_corrupt=on_corrupt), 8) for split in ("train", "test")]
    for images, labels in found:
        assert images.dtype == np.uint8 and images.shape == (len(labels), 8, 8, 3) and set(labels) <= {0, 1}
    return sum(len(labels) for _, labels in found)


@examples(60)
@given(st.lists(st.tuples(st.booleans(), NAMES, CONTENTS), max_size=5), NAMES)
def test_any_files_in_class_folders(entries, root_name):
    outer = pathlib.Path(tempfile.mkdtemp())
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    sources.logger.addHandler(handler)
    try:
        root = outer / (root_name if root_name not in (".", "..") else "dots")
        valid, damaged, links = fill(root, entries)
        stopped = accepted_or_refused("folder: error", lambda: both_splits(f"{root}/", "error"), "cat", "dog")
        assert stopped is None or not (damaged or links)
        kept = accepted_or_refused(
            "folder: skip", lambda: both_splits(f"{root}/", "skip"), *(map(str, links or [root]))
        )
        assert (kept is None) == bool(links)
        if kept is not None:
            messages = "\n".join(records)
            assert valid <= kept <= valid + len(entries)
            assert all(printable(path) in messages for path in damaged)
        assert not list(outer.rglob("it_ran")) and not pathlib.Path("it_ran").exists()
    finally:
        sources.logger.removeHandler(handler)
        shutil.rmtree(outer)


@examples(150)
@given(CONTENTS)
def test_any_file_decodes_or_is_named(content):
    kind, name, data = content
    outer = pathlib.Path(tempfile.mkdtemp())
    try:
        path = outer / f"one{pathlib.PurePath(name).suffix or name}"
        put(path, kind, data, outer)
        image = accepted_or_refused(f"image: {kind}", lambda: decode_file(path), str(path))
        assert image is not None or kind != "valid"
        if image is not None:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and 0 not in image.shape
    finally:
        shutil.rmtree(outer)


# --- any tree of folders

FOLDER_NAMES = st.sampled_from(
    [
        "train",
        "Training",
        "TEST",
        "val",
        "Valid",
        "seg_train",
        "seg_test",
        "x_val",
        "train_images",
        "test_set",
        "dev",
        "test_tube",
        "cat",
        "dog",
        "images",
        "unknown",
        "0",
        "1",
        "café",
        "cafe\u0301",
        "@eaDir",
        "__MACOSX",
        ".git",
        "lost+found",
    ]
)
FILE_NAMES = st.sampled_from(["1.png", "2.JFIF", "3.pgm", "4.heic", "notes.txt", "._1.jpg", "Thumbs.db", "no_ending"])
TREES = st.recursive(
    st.lists(FILE_NAMES, min_size=1, max_size=5, unique=True),
    lambda inner: st.one_of(inner, st.dictionaries(FOLDER_NAMES, inner, min_size=1, max_size=5)),
    max_leaves=12,
)


def grow(folder, tree, colours):
    """Writes a tree of folders (dictionaries) with files (lists); every image has another colour."""
    folder.mkdir()
    for name in tree:
        if isinstance(tree, dict):
            grow(folder / name, tree[name], colours)
        elif layout.is_image(pathlib.Path(name)):
            i = next(colours)
            (folder / name).write_bytes(encoded(Image.new("RGB", (3, 3), (i % 256, i // 256, 99)), "PNG"))
        else:
            (folder / name).write_bytes(b"no image")


@examples(150)
@given(TREES)
def test_any_tree_of_folders_is_read_or_noted(tree):
    outer = pathlib.Path(tempfile.mkdtemp())
    try:
        root = outer / "root"
        grow(root, tree, itertools.count())
        found = accepted_or_refused("folder: trees", lambda: folders.find_images(root), str(root))
        if found is None:
            return
        data = [path for path in root.rglob("*") if not any(map(layout.is_system, path.relative_to(root).parts))]
        images = {path for path in data if path.is_file() and layout.is_image(path)}
        read = [path for paths, _ in found.splits.values() for path in paths]
        assert len(read) == len(set(read)) and set(read) <= images
        assert set(read) == images or any("not read" in note or "no class folders" in note for note in found.notes)
        assert not any(layout.is_system(name) for name in found.class_names)
        assert found.class_names == tuple(sorted({unicodedata.normalize("NFC", name) for name in found.class_names}))
        for paths, labels in found.splits.values():
            for path, label in zip(paths, labels, strict=True):
                parts = {unicodedata.normalize("NFC", part) for part in path.relative_to(root).parts}
                assert found.class_names[label] in parts
        others = [path for path in data if path.is_file() and not layout.is_image(path)]
        below = [path for path in others if any(path.is_relative_to(one.parent) for one in read)]
        assert not below or any("not read" in note for note in found.notes)
    finally:
        shutil.rmtree(outer)


# --- fixed examples


def test_links_between_folders_do_not_lead_to_endless_paths(tmp_path):
    rooms = [tmp_path / "maze" / f"room{i}" for i in range(12)]
    for room in rooms:
        room.mkdir(parents=True)
        (room / "0.png").write_bytes(VALID["rgb.png"])
    for room in rooms:
        for other in rooms:
            if other != room:
                (room / other.name).symlink_to(other)
    with watchdog(), pytest.raises(InputError, match=r"room\d+: (leads to|a link to a folder)"):
        load_source(f"folder:{tmp_path / 'maze'}", "train")


@pytest.mark.parametrize(
    "name",
    ["~no_such_user_here/x", "/" + "z" * 5000, "/\x00", "a\nb", "/dev/null", "/dev/stdin", os.fsdecode(b"/\xff")],
)
def test_an_impossible_root_is_named(name):
    assert accepted_or_refused("folder: root", lambda: load_source(f"folder:{name}", "train"), "folder:") is None


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    fill(tmp_path / "x", [])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # not by permissions, since root may read every folder
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "x")) + r".*cannot be read \(Permission denied\)"):
        load_source(f"folder:{tmp_path / 'x'}", "train")


def test_a_png_file_never_starts_another_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **options: started.append(arguments))
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **options: started.append(arguments))
    (tmp_path / "a.png").write_bytes(DAMAGED["postscript.png"])
    with pytest.raises(InputError, match="not an image"):
        decode_file(tmp_path / "a.png")
    assert not started


# --- names of data sets

ADDRESSES = st.one_of(
    st.sampled_from(("embedded:digits", "embedded:digit", "embedded:", "tfds:mnist", "tfds:mnist:9.9.9", "tfds:../x",
    "tfds:a/b/c",
                     "tfds:mnist/x=1", "tfds:os:system", "tfds:huggingface:x", "tfds:\x00", "tfds:MNIST", "tfds::",
                     "tfds:mnist:",
                     "folder:/", "folder:.", "folder:", "kaggle:x", "", ":", "?", "tfds")),
    st.builds(lambda kind, rest: f"{kind}:{rest}", st.sampled_from(("tfds", "folder", "embedded", "x")),
    st.text(max_size=12)),
)  # fmt: skip
VALUES = st.one_of(
    st.integers(-2, 400).map(str),
    st.sampled_from(("nan", "inf", "0.5", "1e-9", "9" * 5000, "", "٣", "1_0")),
    st.text(max_size=4),
)
OPTIONS = st.lists(
    st.tuples(st.sampled_from(("train", "test", "classes", "per_class", "fraction", "trian", "x")), VALUES).map(
        "=".join
    ),
    max_size=3,
)


@examples(60)
@given(ADDRESSES, OPTIONS, st.sampled_from(("train", "test")))
def test_any_name_of_a_data_set(address, options, split):
    empty = tempfile.mkdtemp()
    before, here = os.environ.get("TFDS_DATA_DIR"), os.getcwd()
    os.environ["TFDS_DATA_DIR"] = empty
    os.chdir(empty)  # for folder:. and relative names
    try:
        name = "?".join([address, "&".join(options)] if options else [address])
        if address != "folder:/":
            found = accepted_or_refused("data set: a name", lambda: load_source(name, split))
            assert found is None or (
                len(found) > 0 and 0 <= found.labels.min() <= found.labels.max() < found.num_classes
            )
    finally:
        os.chdir(here)
        os.rmdir(empty)
        os.environ.pop("TFDS_DATA_DIR")
        if before is not None:
            os.environ["TFDS_DATA_DIR"] = before
