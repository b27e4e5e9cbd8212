"""Loads data sets that TFDS has prepared on this machine."""

import dataclasses
import difflib
import functools
import logging
import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from jax_transfer import logs
from jax_transfer.data import catalog, examine
from jax_transfer.data.labels import cached_labels
from jax_transfer.data.source import SPLITS, VALIDATION, WHOLE, NoValidation, Source, content_hash, subset
from jax_transfer.data.subsets import part_of_only_split
from jax_transfer.data.transforms import DECODING_VERSION, WEAK_PEAK
from jax_transfer.records import InputError

CHUNK = 256  # number of records whose labels are read at a time
CAPTIONS = ("captions", "caption")  # names of the feature with captions
LABEL_THREADS = 16  # they mostly wait for the disk


def unknown_tfds_name(name: str) -> InputError:
    """Returns the error for a name unknown to TFDS, with similar names or the folder layout from the catalog."""
    entry = catalog.find(name)
    if entry and entry.layout:
        return InputError(
            f"TFDS cannot build {name!r}. Set TFDS_DATA_DIR to the folder with the prepared data set, or load it as "
            f"folder:DIR with the layout {entry.layout}."
        )
    names = {*tfds.list_builders(with_community_datasets=False), *catalog.CATALOG}
    close = difflib.get_close_matches(name.lower(), sorted(names), n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "See tensorflow.org/datasets for valid names."
    return InputError(f"Unknown TFDS data set: {name!r}. {hint}")


def load_tfds(rest: str, split: str, on_corrupt: str) -> Source:
    """Loads a TFDS data set prepared in ArrayRecord format below TFDS_DATA_DIR.

    For the data sets in the catalog, the splits and the metric are those of the catalog.

    Raises:
      InputError: if the data set is unknown or not prepared, or lacks the split or images with labels.
    """
    entry = catalog.find(rest)
    tfds_name = entry.tfds if entry and rest in catalog.CATALOG else rest
    folder = os.environ.get("TFDS_DATA_DIR")  # read here, since tfds reads it only once, when it is imported
    absent = InputError(
        f"tfds:{rest} is not on disk in ArrayRecord format (looked in {folder or '~/tensorflow_datasets'}). "
        f"Prepare it: python -m jax_transfer.data.prepare {rest} (or set TFDS_DATA_DIR to the folder that holds it)."
    )
    absl.logging.get_absl_logger().addFilter(_not_noise)
    try:
        builder = tfds.builder(tfds_name, data_dir=folder, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_tfds_name(rest) from error
    # An unknown version, configuration or option, or an invalid name.
    except (ValueError, AssertionError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tfds:{rest}: {message}") from error
    except ImportError as error:
        raise InputError(f'tfds:{rest} needs TensorFlow: pip install "jax_transfer[prepare]".') from error
    features: dict[str, Any] = dict(builder.info.features.items())  # pyright: ignore  tfds leaves its type open
    splits = builder.info.splits
    image, label = features.get("image"), features.get("label")
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    caption = next((name for name in CAPTIONS if name in features), "")
    if not (isinstance(image, tfds.features.Image) and (class_names or caption)):
        raise InputError(
            f"tfds:{rest} needs the features 'image' and 'label' (or captions), but has {', '.join(features)}."
        )
    if not splits:
        raise absent
    if split == VALIDATION and not _validation(entry, splits):
        raise NoValidation(f"tfds:{rest} has no validation split beside its training and test split.")
    only = next(iter(splits)) if len(splits) == 1 else ""
    expression = only or _expression(entry, split, splits)
    if not all(part in splits for part in expression.split("+")):
        raise InputError(f"tfds:{rest} has no split {expression!r} to {split} on. Its splits are: {', '.join(splits)}.")
    skip = {key: tfds.decode.SkipDecoding() for key, kind in features.items() if isinstance(kind, tfds.features.Image)}
    try:
        stats = {file: (builder.data_path / file).stat() for file in sorted(splits[expression].filenames)}
        sizes = [f"{file}={stat.length}" for file, stat in stats.items()]
        as_source: Any = builder.as_data_source  # a decorator hides its parameters from type checkers
        undecoded = as_source(split=expression, decoders=skip)
        decoded = as_source(split=expression, decoders={k: v for k, v in skip.items() if k != "image"})
    except (NotImplementedError, FileNotFoundError) as error:  # prepared as TFRecord, or files are missing
        raise absent from error
    fingerprint = content_hash(builder.info.full_name, expression, *sizes, str(DECODING_VERSION))
    # The folder and times tell apart data sets that were prepared again with the same sizes.
    key = content_hash(fingerprint, str(builder.data_path), *(str(stat.mtime) for stat in stats.values()))
    what = f"tfds:{rest} ({expression})"
    read_labels = functools.partial(_read_tfds_labels, undecoded, what)
    no_labels = np.zeros(len(undecoded), np.int32)
    source = Source(
        f"tfds:{rest}",
        split,
        class_names or ("image",),
        cached_labels(key, len(undecoded), len(class_names), read_labels) if class_names else no_labels,
        functools.partial(_read_tfds, decoded),
        fingerprint,
        entry.metric if entry else "accuracy",
        captions=read_captions(undecoded, caption, what) if caption else (),
    )
    notes = []
    if only and split in SPLITS:
        source = subset(source, part_of_only_split(source.labels, split))
        notes.append(f"It has only one split ({only}): a fifth of each class is used for testing.")
    if not len(source):
        raise InputError(f"tfds:{rest}: no class has more than one image, so no images are left for testing.")
    return dataclasses.replace(source, notes=(*notes, *_notes_on_sample(source)))


def _expression(entry: catalog.Entry | None, split: str, available: Container[str]) -> str:
    """Returns the split expression for TFDS of "train", "test" or both (WHOLE), such as "train+validation"."""
    if split == WHOLE:
        return "+".join(_expression(entry, one, available) for one in SPLITS)
    if split == VALIDATION:
        return _validation(entry, available)
    return getattr(entry, split, None) or ("validation" if split == "test" and "test" not in available else split)


def _validation(entry: catalog.Entry | None, available: Container[str]) -> str:
    """Returns the split expression for TFDS of a validation split that no other split includes; "" if there is none."""
    used = "+".join(_expression(entry, split, available) for split in SPLITS).split("+")
    return next((name for name in (VALIDATION, "val") if name in available and name not in used), "")


def _notes_on_sample(source: Source) -> list[str]:
    """Returns notes on the pixels of a sample of the images."""
    indices = examine.spread(range(len(source)))
    looks = dict(zip(indices, map(examine.look, source.read(indices)), strict=True))
    weak = [i for i, look in looks.items() if look.peak is not None and look.peak < WEAK_PEAK]
    notes = examine.notes_on_looks(looks, lambda i: f"number {i} of {source.split}")
    if weak:
        notes.append(
            f"{len(weak)} of {len(looks)} examined images use less than 1/16 of their 16-bit range and look dark "
            f"(such as number {weak[0]} of {source.split})."
        )
    return notes


def read_captions(records, feature: str, what: str) -> tuple[tuple[str, ...], ...]:
    """Returns the captions of each record.

    Args:
      records: has a length, and `__getitems__(indices)`, a list of dictionaries.
      feature: name of the captions in a record: a text, a list of texts, or a dictionary with these as "text", or a
        list of such dictionaries.
      what: names the records in messages.

    Raises:
      InputError: if a record has no captions.

    >>> class Records(list):
    ...     def __getitems__(self, indices):
    ...         return [self[i] for i in indices]
    >>> read_captions(Records([{"captions": {"text": [b"a cat", b"one cat"]}}]), "captions", "mine")
    (('a cat', 'one cat'),)
    """
    captions: list[tuple[str, ...]] = []
    for start in range(0, len(records), CHUNK):
        found = records.__getitems__(range(start, min(start + CHUNK, len(records))))
        captions += [tuple(filter(None, _texts(record[feature]))) for record in found]
    if bare := [i for i, texts in enumerate(captions) if not texts]:
        raise InputError(f"{what}: images without a caption: {len(bare)} (such as number {bare[0]}).")
    return tuple(captions)


def _texts(value) -> list[str]:
    """Returns the texts of the feature "captions" of a record, see `read_captions`."""
    if isinstance(value, Mapping):
        return _texts(value["text"])
    if isinstance(value, bytes | str):
        return [" ".join((value.decode() if isinstance(value, bytes) else value).split())]
    return [text for element in value for text in _texts(element)]


def _read_tfds_labels(data_source, what: str) -> np.ndarray:
    def read(chunk: range) -> list[int]:
        return [record["label"] for record in data_source.__getitems__(chunk)]

    n, labels = len(data_source), []
    chunks = [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    with logs.progress(n, f"read the labels of {what}", "images") as bar, ThreadPoolExecutor(LABEL_THREADS) as pool:
        for part in pool.map(read, chunks):
            labels += part
            bar.update(len(part))
    if not labels or min(labels) < 0:
        raise InputError(f"{what} has no images with labels; choose a labelled data set.")
    return np.asarray(labels, dtype=np.int32)


def _read_tfds(data_source, indices):
    return [record["image"] for record in data_source.__getitems__([int(i) for i in indices])]


def _not_noise(record: logging.LogRecord) -> bool:
    """Returns False for two messages of TFDS: on reading speed, and on missing files, which we report ourselves."""
    return "created with group size" not in str(record.msg) and "Variant folder" not in str(record.msg)
