"""Subsets of a data set: pure functions from labels to sorted indices, and the OPTIONS that use these functions.

Every subset is the same for the same `seed` on any machine (numpy's Generator) and contains no image twice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_transfer.data.source import SPLITS, Source, of_classes, subset
from jax_transfer.records import InputError


def few_shot(labels: np.ndarray, per_class: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """Draws `per_class` random images of each class.

    With the same seed, a smaller subset is contained in each larger one.

    Args:
      labels: int [n].
      class_names: names of the c classes.

    Returns:
      Sorted indices [per_class * c] into `labels`.

    Raises:
      InputError: if a class has fewer images; the message names the class.

    >>> import numpy as np
    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> labels[few_shot(labels, 2, seed=0, class_names=("cat", "dog"))].tolist()
    [0, 0, 1, 1]
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label, class_name in enumerate(class_names):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) < per_class:
            raise InputError(
                f"per_class={per_class}: class {class_name!r} has only {len(members)} images; use a smaller per_class."
            )
        chosen.append(members[:per_class])
    return np.sort(np.concatenate(chosen))


def capped(labels: np.ndarray, most: int, seed: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """Draws at most `most` random images, keeping the proportions of the classes.

    The class counts are rounded by the largest-remainder method. Each class keeps at least one image if `most`
    is at least the number of classes.

    Args:
      labels: int [n].
      class_names: unused.

    Returns:
      Sorted indices [min(most, n)] into `labels`.

    >>> import numpy as np
    >>> labels = np.repeat([0, 1], [60, 30])
    >>> np.bincount(labels[capped(labels, 9, seed=0)]).tolist()
    [6, 3]
    """
    if most >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    shares = _shares(np.bincount(labels), most, generator)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[:share] for k, share in enumerate(shares)]
    return np.sort(np.concatenate(chosen))


def fraction(labels: np.ndarray, part: float, seed: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """Draws a random fraction `part`, in (0, 1], of the images, keeping the proportions of the classes.

    Args:
      labels: int [n].
      class_names: unused.

    Returns:
      Sorted indices [max(1, round(part * n))] into `labels`.

    >>> import numpy as np
    >>> labels = np.repeat([0, 1], [60, 30])
    >>> np.bincount(labels[fraction(labels, 0.1, seed=0)]).tolist()
    [6, 3]
    """
    return capped(labels, max(1, round(part * len(labels))), seed)


def stratified_split(labels: np.ndarray, test_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Splits each class into training and test images; the split is the same on every call.

    Every class with two or more images has at least one in each part; a single image of a class is a training image.

    Args:
      labels: int [n].
      test_fraction: fraction of each class that is used for testing.

    Returns:
      (train, test): sorted indices into `labels`.

    >>> import numpy as np
    >>> train, test = stratified_split(np.repeat([0, 1], [10, 5]))
    >>> len(train), len(test)
    (12, 3)
    """
    generator = np.random.default_rng(0)
    test = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        test.append(members[:count])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _shares(counts: np.ndarray, total: int, generator: np.random.Generator) -> np.ndarray:
    """Divides `total` among the classes in proportion to `counts` (largest remainder, ties broken at random)."""
    quotas = total * counts / counts.sum()
    shares = np.floor(quotas).astype(int)
    order = generator.permutation(len(counts))
    largest_first = order[np.argsort(-(quotas - shares)[order], kind="stable")]
    shares[largest_first[: total - shares.sum()]] += 1
    if total >= np.count_nonzero(counts):
        for k in np.flatnonzero((counts > 0) & (shares == 0)):
            shares[np.argmax(shares)] -= 1
            shares[k] = 1
    return shares


@dataclasses.dataclass(frozen=True)
class Option:
    """An option in the name of a data set, such as `per_class=10`.

    Attributes:
      splits: the splits to which the option applies.
      parse: converts the text of the value; raises ValueError if the text is invalid.
      expected: describes the valid values in error messages.
      select: select(source, value, seed) returns the part of the source that is kept.
    """

    splits: tuple[str, ...]
    parse: Callable[[str], Any]
    expected: str
    select: Callable[[Source, Any, int], Source]


def _select_by(function) -> Callable[[Source, Any, int], Source]:
    """Returns an `Option.select` that keeps the images whose indices `function`, one of the above, returns."""
    return lambda source, value, seed: subset(source, function(source.labels, value, seed, source.class_names))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(text)
    return int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def _names(text: str) -> list[str]:
    names = text.split("+")
    if not all(names):
        raise ValueError(text)
    return names


OPTIONS = {
    "classes": Option(
        SPLITS, _names, "names of classes joined by +", lambda source, names, seed: of_classes(source, names)
    ),
    "per_class": Option(("train",), _count, "a whole number of images per class, 1 or more", _select_by(few_shot)),
    "train": Option(("train",), _count, "a whole number of training images, 1 or more", _select_by(capped)),
    "test": Option(("test",), _count, "a whole number of test images, 1 or more", _select_by(capped)),
    "fraction": Option(("train",), _share, "a number in (0, 1]", _select_by(fraction)),
}
