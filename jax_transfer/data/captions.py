"""Data sets of images with captions: a table, COCO's JSON, or the tar files of img2dataset (webdataset).

`captions:DIR` reads DIR in one of these layouts; the first one that fits is used:

- `*.tar`, with NAME.jpg (or another image) and NAME.txt; or NAME.json with a "caption" if there is no NAME.txt.
- `*.csv` or `*.tsv`, with a header that names the columns of the image's path (image, filepath, file_name, ...) and of
  the caption (caption, text, title, ...). Several rows with the same image are several captions.
- `dataset_*.json` as Karpathy's for COCO: {"images": [{"split", "filename", "sentences": [{"raw"}]}]}, with "filepath"
  for the folder of an image. It says the splits itself: train and restval, val, and test.
- `*.json` as in COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}. If the names of some
  contain "caption", as in `annotations/captions_train2017.json`, the others are not read.

These files are in DIR, in DIR/annotations, or in folders of the splits, such as DIR/train and DIR/val. Their own name
or that of their folder says which split they are; without such a name, a fifth of the images is used for testing, the
same on every call. Without a test split, a validation split is used for testing. Images of a table or JSON are looked
for in its folder, in DIR, and in the folders of DIR and DIR/images, but not in that of another split.

There is one class, "image", since captions are not classes.
"""

import csv
import dataclasses
import functools
import json
import logging
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jax_transfer.data.layout import EXTENSIONS, is_system, role, subfolders
from jax_transfer.data.source import SPLITS, VALIDATION, WHOLE, NoValidation, Source, content_hash, shared
from jax_transfer.data.subsets import part_of_only_split
from jax_transfer.data.transforms import DECODING_VERSION, decode_bytes, decode_file
from jax_transfer.records import InputError, printable

logger = logging.getLogger(__name__)

# Names of the columns of a table, in small letters; the first one that the header has is used.
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "file", "image_id")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "comment")

LAYOUTS = (
    "tar files of img2dataset, a CSV with the columns image and caption, Karpathy's dataset_*.json, or COCO's "
    "captions_*.json with its images"
)
KARPATHY = {"train": "train", "restval": "train", "val": VALIDATION, "test": "test"}  # its name of a split -> ours
LONGEST_FIELD = 2**24  # characters of a field of a table


class Member(NamedTuple):
    """An image in a tar file: where its content begins, and its length, in bytes."""

    tar: pathlib.Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


Image = pathlib.Path | Member


@dataclasses.dataclass
class Found:
    """What files of captions hold.

    Attributes:
      captions: image -> its captions, none of which is empty.
      missing: names of images that have captions but do not exist.
      bare: images that exist but have no captions.
      empty: images with an empty caption.
    """

    captions: dict[Image, list[str]] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    bare: list[Image] = dataclasses.field(default_factory=list)
    empty: list[Image] = dataclasses.field(default_factory=list)

    def add(self, image: Image | None, name: str, caption: str) -> None:
        """Adds a caption of an image, which is None if there is none with this name."""
        caption = " ".join(caption.split())
        if image is None:
            self.missing.append(name)
        elif not caption:
            self.empty.append(image)
        else:
            self.captions.setdefault(image, []).append(caption)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The images of a split and their captions. `notes` say what is left out."""

    images: tuple[Image, ...]
    captions: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    fingerprint: str


def load_captions(rest: str, split: str, on_corrupt: str) -> Source:
    """Loads a folder of images with captions; the docstring of this file describes the layouts.

    With `on_corrupt` = "skip", captions without images, images without captions, empty captions and damaged images are
    left out, counted in a note and named in a warning; every image is decoded for that. With "error" each of them is an
    error; damaged images only when they are read.

    Raises:
      InputError: if the folder is missing or has none of the layouts, a file of captions cannot be read, or there are
        no images for a split; the message names the file.
    """
    try:
        root = pathlib.Path(rest).expanduser()
        if not root.is_dir():
            raise InputError(f"captions:{root}: {'not a folder' if root.exists() else 'no such folder'}.")
        files, read = _layout(root)
        by_split, notes = _by_split(root, files) if read is not _read_karpathy else (_karpathy_splits(files), [])
        if split == VALIDATION and VALIDATION not in by_split:
            raise NoValidation(f"captions:{rest} has no validation split beside its training and test split.")
        whole = "test" not in by_split
        names = SPLITS if split == WHOLE or whole else (split,)
        parts = [_split(root, tuple(by_split[name]), name, read, on_corrupt) for name in names if name in by_split]
    except OSError as error:
        raise InputError(f"captions:{rest}: {error.filename or 'it'} cannot be read ({error.strerror}).") from error
    except RuntimeError as error:  # ~name without such a user
        raise InputError(f"captions:{rest}: {error}") from error
    images = [image for part in parts for image in part.images]
    captions = [of_image for part in parts for of_image in part.captions]
    notes += [note for part in parts for note in part.notes]
    chosen = np.arange(len(images))
    if whole and split in SPLITS:
        chosen = part_of_only_split(np.zeros(len(images), np.int32), split)
        notes.append("It has only one split: a fifth of the images is used for testing.")
    if not len(chosen):
        raise InputError(f"captions:{rest} has no images to {split} on: add images, or a folder of that split.")
    return Source(
        f"captions:{rest}",
        split,
        ("image",),
        np.zeros(len(chosen), np.int32),
        functools.partial(_read, [images[i] for i in chosen], tuple(parts)),
        content_hash(*(part.fingerprint for part in parts), chosen.tobytes(), str(DECODING_VERSION)),
        notes=tuple(dict.fromkeys(notes)),
        captions=tuple(captions[i] for i in chosen),
    )


def _layout(root: pathlib.Path) -> tuple[list[pathlib.Path], Callable[..., Found]]:
    """Returns the files of captions below `root`, and the function that reads one of them, given itself and `root`.

    `_read_karpathy` also takes the split.
    """
    folders = [root, *(f for f in subfolders(root) if role(f.name)[0] or f.name == "annotations")]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if not is_system(path.name)]
    tars, tables, objects = (
        [path for path in files if path.suffix.lower() in suffixes and path.is_file()]
        for suffixes in ((".tar",), (".csv", ".tsv"), (".json",))
    )
    karpathy = [path for path in objects if path.stem.lower().startswith("dataset")]
    objects = [path for path in objects if "caption" in path.stem.lower()] or objects
    for found, read in ((tars, _read_tar), (tables, _read_table), (karpathy, _read_karpathy), (objects, _read_coco)):
        if found:
            return found, read
    raise InputError(f"captions:{root}: {'no known layout' if files else 'an empty folder'}; expected {LAYOUTS}.")


def _by_split(root: pathlib.Path, files: Sequence[pathlib.Path]) -> tuple[dict[str, list[pathlib.Path]], list[str]]:
    """Returns split -> its files, only "train" if there is no other split; and notes on files that are not read."""
    roles: dict[str | None, list[pathlib.Path]] = {}
    for path in files:
        roles.setdefault(_role(path, root), []).append(path)
    train, test = roles.get("train") or roles.get(None), roles.get("test") or roles.get("val")
    if train is None:
        raise InputError(f"captions:{root}: {files[0].name} is no training split; rename it if it is, or add one.")
    splits = {"train": train, **({"test": test} if test else {})}
    if roles.get("test") and roles.get("val"):
        splits[VALIDATION] = roles["val"]
    unread = [path for path in files if not any(path in paths for paths in splits.values())]
    note = f"Not read, captions of another split: {len(unread)} files (such as {unread[0].name})." if unread else ""
    return splits, [note] if note else []


def _role(path: pathlib.Path, root: pathlib.Path) -> str | None:
    """Returns the split that the name of a file, or of its folder, stands for."""
    return role(path.stem)[0] or (role(path.parent.name)[0] if path.parent != root else None)


def _karpathy_splits(files: list[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """Returns split -> the files of Karpathy, each of which holds all splits."""
    if len(files) > 1:
        raise InputError(f"{files[0].parent}: {files[0].name} and {files[1].name}: expected one file of splits.")
    splits = {KARPATHY.get(entry["split"]) for entry in _karpathy_entries(files[0])}
    return {split: files for split in (*SPLITS, VALIDATION) if split in splits}


def _split(root: pathlib.Path, files: tuple[pathlib.Path, ...], name: str, read: Callable, on_corrupt: str) -> Split:
    """Reads the files of a split, once for both splits and all options of a data set."""
    stats = [f"{path} {(s := path.stat()).st_size} {s.st_mtime_ns}" for path in files]
    key = content_hash(str(root.absolute()), on_corrupt, *stats)
    if read is _read_karpathy:
        key, read = content_hash(key, name), functools.partial(_read_karpathy, split=name)
    return shared(key, functools.partial(_make_split, root, files, read, on_corrupt, key))


def _make_split(root: pathlib.Path, files, read: Callable, on_corrupt: str, key: str) -> Split:
    found = Found()
    for path in files:
        part = read(path, root)
        for image, captions in part.captions.items():
            found.captions.setdefault(image, []).extend(captions)
        found.missing += part.missing
        found.bare += part.bare
        found.empty += part.empty
    if read is _read_table:
        found.bare += _in_no_table(root, files, found)
    problems = {
        "captions without an image": found.missing,
        "images without a caption": list(map(str, found.bare)),
        "empty captions": list(map(str, found.empty)),
    }
    images = list(found.captions)
    if on_corrupt == "skip":
        problems["damaged images"] = list(map(str, damaged := _damaged(images)))
        images = [image for image in images if image not in damaged]
    notes = []
    for what, names in problems.items():
        if not names:
            continue
        count = f"{what}: {len(names)} (such as {printable(names[0].removeprefix(f'{root}{os.sep}'))})"
        if on_corrupt == "error":
            raise InputError(
                f'captions:{root}: {count}; correct this, or leave them out with config.data.on_corrupt = "skip".'
            )
        listed = "\n  ".join(map(printable, names[:100]))
        logger.warning("captions:%s: %s: %d, left out:\n  %s", root, what, len(names), listed)
        notes.append(f"Left out, {count}.")
    if not images:
        raise InputError(f"captions:{root}: {', '.join(path.name for path in files[:3])} has no images with captions.")
    stats = [_content(image) for image in images]
    captions = tuple(tuple(found.captions[image]) for image in images)
    return Split(tuple(images), captions, tuple(notes), content_hash(key, *stats))


def _content(image: Image) -> str:
    """Returns what changes with the content of an image; that of a tar file is in the key of its split."""
    if isinstance(image, Member):
        return f"{image.name} {image.start}"
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}"


def _damaged(images: Sequence[Image]) -> dict[Image, None]:
    """Returns the images that cannot be decoded, as keys."""

    def is_damaged(image: Image) -> bool:
        try:
            _decode(image)
        except InputError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return {image: None for image, bad in zip(images, pool.map(is_damaged, images), strict=True) if bad}


def _read(images: Sequence[Image], parts: tuple[Split, ...], indices) -> list[np.ndarray]:
    """Decodes images; `parts` are kept so that another split or subset finds them with `shared`."""
    return [_decode(images[int(i)]) for i in indices]


def _decode(image: Image) -> np.ndarray:
    if isinstance(image, pathlib.Path):
        return decode_file(image)
    with open(image.tar, "rb") as file:
        file.seek(image.start)
        return decode_bytes(file.read(image.size), str(image))


# ---- the layouts


def _unreadable(path: pathlib.Path, error: Exception) -> InputError:
    reason = printable((str(error).splitlines() or [type(error).__name__])[0])
    return InputError(f"{path} cannot be read ({reason}); repair or remove it.")


def _finder(path: pathlib.Path, root: pathlib.Path) -> Callable[[str], pathlib.Path | None]:
    """Returns find(name), which looks for an image of a table or JSON file in the folders where it may be."""
    split, below = _role(path, root), subfolders(root)
    inside = [sub for folder in below if folder.name == "images" for sub in subfolders(folder)]
    candidates = [f for f in (*below, *inside) if role(f.name)[0] in (None, split) or split is None]
    same = [folder for folder in candidates if split and role(folder.name)[0] == split]
    folders = list(dict.fromkeys([path.parent, *same, root, *candidates]))

    def find(name: str) -> pathlib.Path | None:
        for folder in folders:
            if (image := folder / name).is_file():
                if folder is not folders[0]:  # the next one is probably there too
                    folders.remove(folder)
                    folders.insert(0, folder)
                return image
        return None

    return find


def _read_table(path: pathlib.Path, root: pathlib.Path) -> Found:
    """Reads a CSV or TSV; several rows with the same image are several captions."""
    find, found = functools.cache(_finder(path, root)), Found()
    shorter = csv.field_size_limit(LONGEST_FIELD)  # a setting of the process: other readers keep theirs
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            image, caption = _column(path, rows, IMAGE_COLUMNS), _column(path, rows, CAPTION_COLUMNS)
            for row in rows:
                name = row[image] or ""
                found.add(find(name) if name else None, name or f"line {rows.line_num}", row[caption] or "")
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    finally:
        csv.field_size_limit(shorter)
    return found


def _in_no_table(root: pathlib.Path, files: Sequence[pathlib.Path], found: Found) -> list[Image]:
    """Returns images that no table of any split names, from the folders of those that `files` caption (`found`)."""
    tables = [found, *(_read_table(path, root) for path in _layout(root)[0] if path not in files)]
    named = {os.path.normpath(str(image)) for table in tables for image in (*table.captions, *table.empty)}
    folders = sorted({image.parent for image in found.captions if isinstance(image, pathlib.Path)})
    images = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS]
    return [path for path in images if os.path.normpath(path) not in named and not is_system(path.name)]


def _column(path: pathlib.Path, rows: csv.DictReader, names: Iterable[str]) -> str:
    """Returns the column of a table that has one of the names."""
    header = {column.strip().lower(): column for column in rows.fieldnames or ()}
    for name in names:
        if name in header:
            return header[name]
    raise InputError(
        f"{path}: no column {' or '.join(list(names)[:4])} in its header ({', '.join(header) or 'an empty file'}); "
        "rename the column."
    )


def _read_coco(path: pathlib.Path, root: pathlib.Path) -> Found:
    """Reads COCO's JSON; images without annotations have no captions."""
    find, found = _finder(path, root), Found()
    try:
        content = json.loads(path.read_bytes())
        names = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        annotations = [(entry["image_id"], str(entry["caption"])) for entry in content["annotations"]]
        captioned = {number for number, _ in annotations}
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f'{path} is not a JSON of captions: expected {{"images": [{{"id", "file_name"}}], "annotations": '
            '[{"image_id", "caption"}]}, as in COCO.'
        ) from error
    images = {number: find(name) for number, name in names.items()}
    for number, caption in annotations:
        found.add(images.get(number), names.get(number, f"image_id {number}"), caption)
    found.bare += [image for number, image in images.items() if image and number not in captioned]
    return found


def _karpathy_entries(path: pathlib.Path) -> list[dict]:
    """Reads the images of Karpathy's JSON."""
    try:
        entries = json.loads(path.read_bytes())["images"]
        for entry in entries:
            _ = entry["split"], entry["filename"], [sentence["raw"] for sentence in entry["sentences"]]
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f'{path} is not a JSON of Karpathy: expected {{"images": [{{"split", "filename", "sentences": '
            '[{"raw"}]}]}; if it is COCO\'s, rename it to captions_train.json or captions_val.json.'
        ) from error
    return entries


def _read_karpathy(path: pathlib.Path, root: pathlib.Path, split: str) -> Found:
    """Reads a split of Karpathy's JSON; the file "filename" is in "filepath", if it has one."""
    find, found = _finder(path, root), Found()
    for entry in _karpathy_entries(path):
        if KARPATHY.get(entry["split"]) != split:
            continue
        name = str(pathlib.PurePath(entry.get("filepath") or "", entry["filename"]))
        image = find(name) or find(entry["filename"])
        for sentence in entry["sentences"]:
            found.add(image, name, str(sentence["raw"]))
        if image and not entry["sentences"]:
            found.bare.append(image)
    return found


def _read_tar(path: pathlib.Path, root: pathlib.Path) -> Found:
    """Reads a tar file of img2dataset: members with the same name up to the extension belong together."""
    images: dict[str, Member] = {}
    texts: dict[str, str] = {}
    described: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed, so that images can be read at their place
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                extension = extension.lower()
                if not member.isfile() or is_system(os.path.basename(member.name)):
                    continue
                if extension in EXTENSIONS:
                    images[stem] = Member(path, member.name, member.offset_data, member.size)
                elif extension in (".txt", ".json"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    text = content.read().decode()
                    if extension == ".txt":
                        texts[stem] = text
                    elif isinstance(fields := json.loads(text), dict) and fields.get("caption") is not None:
                        described[stem] = str(fields["caption"])
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error
    captions, found = {**described, **texts}, Found()
    for stem, image in images.items():
        if stem in captions:
            found.add(image, image.name, captions[stem])
        else:
            found.bare.append(image)
    found.missing += [f"{path}: {stem}" for stem in captions if stem not in images]
    return found
