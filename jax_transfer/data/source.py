"""`Source`: one split of a data set, independent of where the data comes from."""

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
VALIDATION = "validation"  # a third split, which only some data sets have, see `NoValidation`
WHOLE = "train+test"  # all images of both splits, which only `train_fraction` loads, to split them anew


class NoValidation(InputError):
    """The error for a data set without a validation split of its own; a part of the training split can serve as one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set, with labels in memory and images that are read on demand.

    Attributes:
      name: name of the data set, as the user wrote it.
      split: "train", "test" or "validation".
      class_names: names of the c classes.
      labels: int32 [n], indices into class_names.
      read: read(indices) returns decoded uint8 images, [h, w], [h, w, 1] or [h, w, 3] and of any size, in the order of
        `indices`. It is thread-safe and can be pickled.
      fingerprint: hash of everything that determines the content, computed without decoding the images.
      metric: the metric that papers report on this data set, "accuracy" or "mean_class_accuracy".
      notes: sentences on what readers of the results should know about the data.
      extra: name -> array [n, ...] with further data for each image, such as the tokens of its captions.
      captions: the captions of each image, at least one; () for a data set without captions.
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
    captions: tuple[tuple[str, ...], ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without images."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def subset(source: Source, indices: np.ndarray) -> Source:
    """Returns the images at `indices` [m] of `source`, in that order.

    >>> import numpy as np
    >>> source = from_arrays(np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1])
    >>> subset(source, np.array([3, 0])).labels.tolist()
    [1, 0]
    """
    indices = np.asarray(indices, dtype=np.int64)
    return dataclasses.replace(
        source,
        labels=source.labels[indices],
        read=functools.partial(_read_subset, source.read, indices),
        fingerprint=content_hash(source.fingerprint, indices.tobytes()),
        extra={name: array[indices] for name, array in source.extra.items()},
        captions=tuple(source.captions[i] for i in indices) if source.captions else (),
    )


def of_classes(source: Source, classes: Sequence[str | int]) -> Source:
    """Returns the images of some classes, in the order of `source`.

    Args:
      classes: names of classes, or numbers in [0, source.num_classes). They become classes 0, 1, ... in this order.

    Raises:
      InputError: if a class is unknown or given twice, or there are no images of these classes.

    >>> import numpy as np
    >>> source = from_arrays(np.zeros((4, 8, 8), np.uint8), [0, 1, 2, 2], class_names=["cat", "dog", "owl"])
    >>> part = of_classes(source, ["owl", "cat"])
    >>> part.class_names, part.labels.tolist()
    (('owl', 'cat'), [1, 0, 0])
    """
    numbers = [_class_number(source, name_or_number) for name_or_number in classes]
    repeated = [number for i, number in enumerate(numbers) if number in numbers[:i]]
    if repeated:
        raise InputError(f"class {source.class_names[repeated[0]]!r} is given twice; give each class once.")
    renumbered = np.full(source.num_classes, -1, np.int32)
    renumbered[numbers] = np.arange(len(numbers))
    indices = np.flatnonzero(renumbered[source.labels] >= 0)
    if not len(indices):
        raise InputError(f"the {source.split} split has no images of the {len(numbers)} chosen classes; choose others.")
    part = subset(source, indices)
    return dataclasses.replace(
        part,
        class_names=tuple(source.class_names[number] for number in numbers),
        labels=renumbered[part.labels],
        fingerprint=content_hash(part.fingerprint, "classes", *map(str, numbers)),
    )


def _class_number(source: Source, name_or_number: str | int) -> int:
    if isinstance(name_or_number, str):
        return choose({name: number for number, name in enumerate(source.class_names)}, name_or_number, "class")
    if not 0 <= name_or_number < source.num_classes:
        raise InputError(
            f"Unknown class: {name_or_number!r}, expected a name, or a number from 0 to {source.num_classes - 1}."
        )
    return int(name_or_number)


def _read_subset(read, subset_indices, indices):
    return read(subset_indices[np.asarray(indices, dtype=np.int64)])


def content_hash(*parts: str | bytes) -> str:
    """Returns a SHA-256 hash of the parts; the boundaries between parts affect the hash too.

    >>> content_hash("ab", "c") == content_hash("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def from_arrays(images, labels, name="arrays", split="train", class_names=None) -> Source:
    """Makes a source from arrays in memory.

    Args:
      images: uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3], or a list of n images of any size.
      labels: int [n], at least 0.
      class_names: names of the classes; by default "0", "1", ...

    Raises:
      InputError: if there are no images, the numbers of labels and images differ, or a label has no class name.

    >>> import numpy as np
    >>> source = from_arrays(np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 1], name="mine")
    >>> len(source), source.num_classes, source.read([2])[0].shape
    (3, 2, (8, 8, 3))
    """
    labels = np.asarray(labels)
    if len(images) == 0 or labels.shape != (len(images),):
        raise InputError(
            f"{name}: expected at least one image, and one label for each image, got {len(images)} images and "
            f"labels of shape {list(labels.shape)}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(f"{name}: labels must be whole numbers of at least 0, got {labels[0]} ({labels.dtype}).")
    class_names = tuple(class_names or map(str, range(labels.max() + 1)))
    if labels.max() >= len(class_names):
        raise InputError(
            f"{name}: label {labels.max()} is out of range: expected labels from 0 to {len(class_names) - 1}, one for "
            f"each of the {len(class_names)} class names."
        )
    pixels = [images] if isinstance(images, np.ndarray) else images
    parts = [part for array in map(np.asarray, pixels) for part in (f"{array.dtype}{array.shape}", array.tobytes())]
    fingerprint = content_hash(*class_names, labels.astype(np.int32).tobytes(), *parts)
    read = functools.partial(read_arrays, images)
    return Source(name, split, class_names, labels.astype(np.int32), read, fingerprint)


def read_arrays(images, indices):
    """Returns the images at `indices` as a list of arrays."""
    return [np.asarray(images[int(i)]) for i in indices]


_SHARED: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # objects that the splits of a data set share


def shared(key, make: Callable):
    """Returns the object that was made for `key` if it is still in use, else a new one from `make()`.

    References to it are weak, so an object is freed when nothing else refers to it.
    """
    value = _SHARED.get(key)
    if value is None:
        value = _SHARED[key] = make()
    return value
