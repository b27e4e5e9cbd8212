"""Notes on the images of a data set: what they report, and that they are logged once."""

import gc
import shutil
import struct
import weakref
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from helpers.images import png, write_images
from jax_transfer import devices
from jax_transfer.data import examine, source, tfds_sets
from jax_transfer.data.batches import make_feed
from jax_transfer.data.sources import from_arrays, load_source
from jax_transfer.data.transforms import Preprocessing, decode_file
from jax_transfer.records import InputError


def drawings(seed=0, count=12):
    """Yields names and gray 8-bit images [h, w] of two classes: a bright or a dark square on noise."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        for label in (0, 1):
            image = generator.integers(90, 130, (20, 24))
            image[4:14, 6 + i % 9 : 14 + i % 9] = (220, 40)[label]
            yield f"{'ab'[label]}/{i}", image.astype(np.uint8)


def write_drawings(root, save, suffix="png", **options):
    for name, image in drawings(**options):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save(image, root / f"{name}.{suffix}")
    return root


def as_png(pixels, path):
    Image.fromarray(pixels).save(path)


def notes(root, on_corrupt="error"):
    return load_source(f"folder:{root}", "train", on_corrupt=on_corrupt).notes


def notes_in_both_modes(root):
    """Returns the notes, which must not depend on whether all images or only a sample is decoded."""
    found = notes(root)
    assert found == notes(root, "skip")
    return found


# ---- copies


def copy(root, source, target):
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / source, root / target)


@pytest.mark.parametrize("count", [1, 3])
def test_exact_copies_are_counted(tmp_path, count):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        write_images(tmp_path / name, 4, seed=len(name) + ord(name[1]))
    for i in range(count):
        copy(tmp_path, "train/a/00.png", f"train/a/copy{i}.png")
    (note,) = notes_in_both_modes(tmp_path)
    expected = "1 image is an exact copy" if count == 1 else "3 images are exact copies"
    assert note == f"{expected} of another image (such as train/a/copy0.png of train/a/00.png)."


def test_copies_across_splits_and_classes_are_distinguished(tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        write_images(tmp_path / name, 4, seed=len(name) + ord(name[1]))
    copy(tmp_path, "train/a/00.png", "test/a/leak.png")
    copy(tmp_path, "train/a/01.png", "train/b/wrong.png")
    copy(tmp_path, "train/a/01.png", "train/b/wrong2.png")
    mislabelled, leaked, copies = notes_in_both_modes(tmp_path)
    assert mislabelled.startswith("2 copies are in another class than the original (such as train/b/wrong.png and")
    assert leaked.startswith("1 test image is also in the training split (such as test/a/leak.png and train/a/00.png)")
    assert copies.startswith("3 images are exact copies of another image")


def test_files_of_equal_size_need_equal_contents_to_be_copies(tmp_path):
    """The files differ only in the middle, which is compared last."""
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for i, name in enumerate(("a/0", "a/1", "b/0", "b/1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image[30, 30] = i
        Image.fromarray(image).save(tmp_path / f"{name}.bmp")
    assert notes_in_both_modes(tmp_path) == ()


def test_only_files_of_equal_size_are_compared(tmp_path, monkeypatch):
    write_drawings(tmp_path, as_png)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.png")]
    opened = []
    monkeypatch.setattr(examine, "_ends", lambda path: opened.append(path))
    notes(tmp_path)
    assert len(opened) == sum(sizes.count(size) > 1 for size in sizes)


# ---- pixels

SIXTEEN = {
    "gray png": ("png", lambda a: Image.fromarray(a)),
    "gray tiff": ("tif", lambda a: Image.fromarray(a)),
    "32-bit tiff": ("tif", lambda a: Image.fromarray(a.astype(np.int32))),
    "gray pgm": ("pgm", lambda a: Image.fromarray(a.astype(np.int32))),
}


def save_sixteen_bit_png(pixels, path):
    """Writes 16-bit gray with alpha, RGB or RGBA [h, w, 2, 3 or 4] as PNG, which PIL cannot."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(png(head, zlib.compress(rows)))


def save_sixteen_bit_ppm(pixels, path):
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n%d %d\n65535\n" % (width, height) + pixels.astype(">u2").tobytes())


def save_sixteen_bit(kind, image, path):
    """Writes gray uint16 values [h, w] as a file of the given kind."""
    gray, opaque = image[:, :, None], np.full((*image.shape, 1), 65535)
    if kind in SIXTEEN:
        SIXTEEN[kind][1](image).save(path)
    elif kind == "colour ppm":
        save_sixteen_bit_ppm(np.repeat(gray, 3, 2), path)
    else:
        parts = {
            "colour png": [gray] * 3,
            "png with alpha": [gray] * 3 + [opaque],
            "gray png with alpha": [gray, opaque],
        }
        parts["png with weak alpha"] = [gray] * 3 + [opaque // 257]
        save_sixteen_bit_png(np.concatenate(parts[kind], 2), path)


KINDS = {**{kind: suffix for kind, (suffix, _) in SIXTEEN.items()}, "colour ppm": "ppm", "colour png": "png",
         "png with alpha": "png", "gray png with alpha": "png", "png with weak alpha": "png"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_sixteen_bit_files_with_fewer_bits_are_scaled(tmp_path, kind, bits):
    """All images have the same scale, so that a darker one stays darker."""
    write_drawings(tmp_path, lambda a, p: save_sixteen_bit(kind, a.astype(np.uint16) << (bits - 8), p), KINDS[kind])
    (note,) = [note for note in notes_in_both_modes(tmp_path) if "16-bit" in note]
    assert f"at most {220 << (bits - 8):,} of 65,535" in note and f"{bits}-bit values" in note
    for on_corrupt in ("error", "skip"):
        for split in ("train", "test"):
            found = load_source(f"folder:{tmp_path}", split, on_corrupt=on_corrupt)
            for image in found.read(range(len(found))):
                assert image.max() in (220, 129) and 40 <= image.min() <= 90


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "weak" not in kind])
def test_full_sixteen_bit_images_keep_their_high_bytes(tmp_path, kind):
    write_drawings(tmp_path, lambda a, p: save_sixteen_bit(kind, a.astype(np.uint16) * 257, p), KINDS[kind])
    assert notes_in_both_modes(tmp_path) == ()
    for name, image in drawings():
        assert np.array_equal(decode_file(tmp_path / f"{name}.{KINDS[kind]}")[:, :, 0], image)


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_one_full_range_image_sets_the_depth_of_all(tmp_path, monkeypatch, on_corrupt):
    """It is not in the sample, but all images are examined if the sample looks suspicious."""
    monkeypatch.setattr(examine, "SAMPLE", 5)
    write_drawings(tmp_path, lambda a, p: as_png(a.astype(np.uint16), p))
    bright = np.full((9, 9), 60_000, np.uint16)
    bright[0] = 0
    as_png(bright, tmp_path / "b" / "5.png")
    found = load_source(f"folder:{tmp_path}", "train", on_corrupt=on_corrupt)
    assert max(image.max() for image in found.read(range(len(found)))) <= 60_000 // 256
    assert any("unlike the others, and look dark" in note for note in found.notes)


def test_the_depth_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    write_drawings(tmp_path, lambda a, p: as_png(a.astype(np.uint16), p))
    weak = load_source(f"folder:{tmp_path}", "train").fingerprint
    monkeypatch.setattr(examine, "sixteen_bit_depth", lambda peak: 16)
    assert load_source(f"folder:{tmp_path}", "train").fingerprint != weak


def test_drawings_are_equal_in_all_encodings(tmp_path):
    saves = {
        "eight": as_png,
        "sixteen": lambda a, path: as_png(a.astype(np.uint16), path),
        "alpha": lambda a, path: as_png(np.dstack([np.zeros((*a.shape, 3), np.uint8), a]), path),
    }
    seen = {}
    for name, save in saves.items():
        found = load_source(f"folder:{write_drawings(tmp_path / name, save)}", "train", on_corrupt="skip")
        seen[name] = np.stack(found.read(range(len(found))))
    assert np.array_equal(seen["eight"], seen["sixteen"])
    assert np.array_equal(seen["eight"], 255 - seen["alpha"])


@pytest.mark.parametrize("colour", [0, 255, 128])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_drawings_in_the_alpha_channel_are_visible_and_noted(tmp_path, colour, mode, suffix):
    def save(image, path):
        pixels = np.dstack([np.full((*image.shape, 3), colour, np.uint8), image])
        Image.fromarray(pixels).convert(mode).save(
            path, **({"lossless": True, "exact": True} if suffix == "webp" else {})
        )

    write_drawings(tmp_path, save, suffix)
    assert any("24 of 24 examined images are partly transparent" in note for note in notes_in_both_modes(tmp_path))
    for name, image in drawings():
        found = decode_file(tmp_path / f"{name}.{suffix}")[:, :, 0].astype(float)
        assert abs(np.corrcoef(found.ravel(), image.ravel())[0, 1]) > 0.99


def test_transparent_colours_of_palettes_and_keys_become_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40])
    palette.save(tmp_path / "a.png", transparency=2)
    palette.save(tmp_path / "a.gif", transparency=2)
    Image.fromarray(np.array([[10, 20], [30, 40]], np.uint8)).save(tmp_path / "b.png", transparency=30)
    for name in ("a.png", "a.gif", "b.png"):
        assert decode_file(tmp_path / name)[:, :, 0].tolist() == [[10, 20], [255, 40]], name


def test_opaque_images_with_an_alpha_channel_are_not_noted(tmp_path):
    write_drawings(tmp_path, lambda a, p: as_png(np.dstack([a, a, a, np.full_like(a, 255)]), p))
    assert notes_in_both_modes(tmp_path) == ()


@pytest.mark.parametrize("low", [4096, 30_000, 32_768 - 1_024, 61_000])
@pytest.mark.parametrize("kind", ["gray png", "colour png", "gray tiff"])
def test_sixteen_bit_values_in_a_narrow_band_are_noted(tmp_path, kind, low):
    """Such as a scanner's values plus an offset: they are far from 0 but use little of the range."""
    write_drawings(tmp_path, lambda a, p: save_sixteen_bit(kind, a.astype(np.uint16) * 15 + low, p), KINDS[kind])
    (note,) = notes_in_both_modes(tmp_path)
    assert note.startswith("24 of 24 examined images use less than 1/16 of their 16-bit range and look ")
    for values in (lambda a: a.astype(np.uint16) * 90 + 4096, lambda a: a.astype(np.uint16) * 257):
        write_drawings(tmp_path, lambda a, p, values=values: save_sixteen_bit(kind, values(a), p), KINDS[kind])
        assert notes_in_both_modes(tmp_path) == ()


@pytest.mark.parametrize("save", [as_png, lambda a, p: Image.fromarray(a).save(p, exact=True, lossless=True)])
@pytest.mark.parametrize("every", [1, 2])
def test_full_transparency_is_ignored_and_noted(tmp_path, save, every):
    number = iter(range(1000))

    def hide(image, path):
        alpha = np.full_like(image, 0 if next(number) % every == 0 else 255)
        save(np.dstack([image, image, image, alpha]), path)

    write_drawings(tmp_path, hide, "png" if save is as_png else "webp")
    (note,) = notes_in_both_modes(tmp_path)
    assert note.startswith(f"{24 // every} of 24 examined images are fully transparent although")
    for name, image in drawings():
        (found,) = tmp_path.glob(f"{name}.*")
        assert np.array_equal(decode_file(found)[:, :, 0], image)


def test_an_empty_transparent_image_is_white(tmp_path):
    as_png(np.zeros((9, 9, 4), np.uint8), tmp_path / "a.png")
    assert (decode_file(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("shade", [0, 77, 255])
def test_many_images_of_one_colour_are_noted_with_an_example(tmp_path, shade):
    write_drawings(tmp_path, as_png)
    for i in range(3):
        as_png(np.full((9, 7 + i, 3), shade, np.uint8), tmp_path / "b" / f"blank{i}.png")
    (note,) = notes_in_both_modes(tmp_path)
    assert note.startswith("3 of 27 examined images have a single colour (such as b/blank")


def test_images_of_equal_pixels_in_different_files_are_noted(tmp_path):
    write_drawings(tmp_path, as_png)
    for i, name in enumerate(("a/0", "a/1", "b/2")):
        Image.open(tmp_path / f"{name}.png").save(tmp_path / name[0] / f"again{i}.bmp")
    (note,) = notes_in_both_modes(tmp_path)
    assert note.startswith("6 of 27 examined images have the same pixels as another image (such as ")
    assert "again" in note


@pytest.mark.parametrize("different_files", [False, True])
def test_a_data_set_of_equal_images_is_refused(tmp_path, different_files):
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image = np.full((9, 9 + i * different_files, 3), 50, np.uint8)
        as_png(image, tmp_path / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(InputError, match=r"all 8 images are equal, such as a/0\.png"):
        load_source(f"folder:{tmp_path}", "train", on_corrupt="skip")
    found = load_source(f"folder:{tmp_path}", "train")
    for gigabytes in (1.0, 0.0):
        with pytest.raises(InputError, match="all 6 training images are equal"):
            make_feed(found, Preprocessing(8), devices.make_mesh(), gigabytes, 1)


def test_two_different_images_are_accepted(tmp_path):
    images = np.zeros((5, 8, 8), np.uint8)
    images[4, 0, 0] = 255
    for gigabytes in (1.0, 0.0):
        make_feed(from_arrays(images, [0, 1, 0, 1, 0]), Preprocessing(8), devices.make_mesh(), gigabytes, 1)


def test_opening_a_folder_decodes_only_a_sample(tmp_path, monkeypatch):
    decoded, read = [], examine.read_pixels
    monkeypatch.setattr(examine, "read_pixels", lambda path: decoded.append(path) or read(path))
    monkeypatch.setattr(examine, "SAMPLE", 7)
    write_drawings(tmp_path, as_png)
    splits = [load_source(f"folder:{tmp_path}", split) for split in ("train", "test")]
    assert len(decoded) == 7 and splits[0].notes == splits[1].notes == ()


# ---- logged once, released when unused


def test_notes_are_logged_once_per_loaded_data_set(tmp_path, caplog):
    write_drawings(tmp_path, as_png)
    copy(tmp_path, "a/0.png", "a/copy.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    for times in (1, 2):
        train, test = (load_source(f"folder:{tmp_path}?train=5", split) for split in ("train", "test"))
        assert train.notes == test.notes and len(train.notes) == 2 and train.metric == "accuracy"
        assert caplog.text.count("1 image is an exact copy") == times == caplog.text.count("1 file is not read")
        del train, test
        gc.collect()


def test_damaged_images_are_noted_and_named_once_per_split(tmp_path, caplog):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        write_images(tmp_path / name, 4, seed=len(name) + ord(name[1]))
    (tmp_path / "train" / "a" / "00.png").write_bytes(b"x")
    (tmp_path / "test" / "b" / "01.png").write_bytes(b"y")
    splits = [load_source(f"folder:{tmp_path}", split, on_corrupt="skip") for split in ("train", "test")]
    assert [found.notes for found in splits] == [
        ("2 of 16 images are damaged and left out (such as test/b/01.png).",)
    ] * 2
    assert caplog.text.count("1 of 8 images in") == 2 and caplog.text.count("01.png: cannot be read") == 1


@pytest.mark.parametrize("name", ["embedded:mnist_5k", "embedded:digits", "folder"])
def test_unused_data_sets_are_released(tmp_path, name):
    if name == "folder":
        write_drawings(tmp_path, as_png)
        name = f"folder:{tmp_path}"
    splits = [load_source(name, split) for split in ("train", "test")]
    shared = [weakref.ref(held) for held in source._SHARED.values()]
    assert len(shared) == 1
    del splits
    gc.collect()
    assert [ref() for ref in shared] == [None]


# ---- prepared sets


def test_a_prepared_set_with_one_split_is_split(tfds_dir, monkeypatch, caplog):
    builder = tfds.builder("caltech101", data_dir=tfds_dir, try_gcs=False)
    single = {"train": builder.info.splits["train"]}
    monkeypatch.setattr(type(builder.info), "splits", property(lambda info: single))
    found = [load_source("tfds:caltech101", split) for split in ("train", "test")]
    assert sum(map(len, found)) == single["train"].num_examples
    counts = [np.bincount(part.labels, minlength=102) for part in found]
    assert (counts[1] == np.maximum(1, np.round(0.2 * (counts[0] + counts[1])))).all()
    assert found[0].fingerprint != found[1].fingerprint and found[0].read([0])[0].ndim == 3
    expected = "It has only one split (train): a fifth of each class is used for testing."
    assert all(expected in part.notes for part in found) and caplog.text.count(expected) == 1


def test_prepared_sets_are_examined(monkeypatch):
    images = np.zeros((6, 8, 8, 3), np.uint16)
    images[:3, 0] = np.arange(8)[:, None]
    notes = tfds_sets._notes_on_sample(from_arrays(list(images), [0, 1] * 3))
    assert "3 of 6 examined images have a single colour (such as number 3 of train)." in notes
    assert any("6 of 6 examined images use less than 1/16 of their 16-bit range" in note for note in notes)
