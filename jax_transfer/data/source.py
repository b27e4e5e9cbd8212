"""One split of a data set, whatever it comes from."""

import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from jax_transfer.choose import choose
from jax_transfer.records import InputError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set: labels at hand, images read on demand.

    name: as the user wrote it. split: "train" or "test". labels: int32 [n], indices into class_names.
    read(indices): decoded uint8 images of any size, [h, w], [h, w, 1] or [h, w, 3], in the order asked; threads may
    share it, and it pickles. fingerprint: a hash of all that determines the content, found without decoding it.
    metric: what the field reports for this set, "accuracy" or "mean_class_accuracy". notes: sentences on what a reader
    of results should know of the data. extra: what else belongs to each image, arrays [n, ...] such as the tokens of its
    captions.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[Sequence[int]], list[np.ndarray]]
    fingerprint: str
    metric: str = "accuracy"
    notes: tuple[str, ...] = ()
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def subset(source: Source, indices: np.ndarray) -> Source:
    """The images at `indices` [m] of `source`, in that order."""
    indices = np.asarray(indices, dtype=np.int64)
    return dataclasses.replace(
        source,
        labels=source.labels[indices],
        read=functools.partial(_read_subset, source.read, indices),
        fingerprint=content_hash(source.fingerprint, indices.tobytes()),
        extra={name: array[indices] for name, array in source.extra.items()},
    )


def of_classes(source: Source, classes: Sequence[str | int]) -> Source:
    """The images of some classes, in the order of `source`; these are classes 0, 1, ... in the order of `classes`.

    Args:
      classes: names, or numbers in [0, source.num_classes).

    Raises:
      InputError: for a class that the source does not have, one given twice, and classes without any image.
    """
    numbers = [_class_number(source, each) for each in classes]
    repeated = [number for place, number in enumerate(numbers) if number in numbers[:place]]
    if repeated:
        raise InputError(f"class {source.class_names[repeated[0]]!r} is given twice; give each class once.")
    renumbered = np.full(source.num_classes, -1, np.int32)
    renumbered[numbers] = np.arange(len(numbers))
    indices = np.flatnonzero(renumbered[source.labels] >= 0)
    if not len(indices):
        raise InputError(f"the {source.split} split has no image of the {len(numbers)} classes; choose other ones.")
    part = subset(source, indices)
    return dataclasses.replace(
        part,
        class_names=tuple(source.class_names[number] for number in numbers),
        labels=renumbered[part.labels],
        fingerprint=content_hash(part.fingerprint, "classes", *map(str, numbers)),
    )


def _class_number(source: Source, which: str | int) -> int:
    if isinstance(which, str):
        return choose({name: number for number, name in enumerate(source.class_names)}, which, "class")
    if not 0 <= which < source.num_classes:
        raise InputError(f"Unknown class: {which!r}, expected a name, or a number from 0 to {source.num_classes - 1}.")
    return int(which)


def _read_subset(read, subset_indices, indices):
    return read(subset_indices[np.asarray(indices, dtype=np.int64)])


def content_hash(*parts: str | bytes) -> str:
    """A hash in which no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


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
    fingerprint = content_hash(*class_names, labels.astype(np.int32).tobytes(), *parts)
    read = functools.partial(read_arrays, images)
    return Source(name, split, class_names, labels.astype(np.int32), read, fingerprint)


def read_arrays(images, indices):
    return [np.asarray(images[int(i)]) for i in indices]


_SHARED: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # what the splits of a data set share


def shared(key, make: Callable):
    """`make()`, or what it gave for `key` before if something still holds that: nothing outlives its last user."""
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = make()
    return found
