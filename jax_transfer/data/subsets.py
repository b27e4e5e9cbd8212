"""Subsets of a data set: pure functions from labels to sorted indices, and the OPTIONS that use these functions.

Every subset is the same for the same `seed` on any machine (numpy's Generator) and contains no image twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_transfer.data.attributes import with_attributes
from jax_transfer.data.source import SPLITS, VALIDATION, WHOLE, Source, of_classes, subset
from jax_transfer.data.templates import with_names, with_templates
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


def random_images(labels: np.ndarray, most: int, seed: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """Draws at most `most` random images, whatever their classes; a smaller subset is contained in each larger one.

    Args:
      labels: int [n].
      class_names: unused.

    Returns:
      Sorted indices [min(most, n)] into `labels`.

    >>> len(random_images(np.zeros(90, int), 9, seed=0))
    9
    """
    return np.sort(np.random.default_rng(seed).permutation(len(labels))[:most])


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


def pareto(positions: np.ndarray) -> np.ndarray:
    """Returns the exponents of a long tail after a Pareto distribution: log10(1 + 9 x) at each position x in [0, 1].

    With a ratio of 10, class sizes fall as 1 / (1 + 9 x): fast at first, then slowly.

    >>> pareto(np.array([0.0, 0.5, 1.0])).round(2).tolist()
    [0.0, 0.74, 1.0]
    """
    return np.log1p(9 * positions) / math.log(10)


def exponential(positions: np.ndarray) -> np.ndarray:
    """Returns the exponents of a long tail that falls by the same factor from class to class: the positions.

    Cui et al., 2019, "Class-balanced loss based on effective number of samples", section 5.1.
    """
    return positions


def long_tail(
    labels: np.ndarray,
    ratio: float,
    seed: int,
    class_names: Sequence[str],
    shape: Callable[[np.ndarray], np.ndarray] = pareto,
) -> np.ndarray:
    """Draws random images so that the classes, in their order, become smaller and smaller.

    Class i of c keeps n r^(-shape(i / (c - 1))) images, where n is the size of the largest class and r the ratio; this
    number is rounded to the nearest whole number (halves to even), and is at least 1 and at most the size of the class.
    The first class keeps n, the last one n / r. A single class keeps all its images, and so does every class if the
    ratio is 1. With the same seed, a larger ratio keeps some of the images of a smaller one, and `pareto` some of those
    of `exponential`.

    Args:
      labels: int [n].
      ratio: size of the first class divided by that of the last one, at least 1.
      class_names: names of the c classes.
      shape: `pareto` or `exponential`: maps positions in [0, 1] to exponents, rising from 0 to 1.

    Returns:
      Sorted indices into `labels`.

    >>> labels = np.repeat(np.arange(4), 40)
    >>> np.bincount(labels[long_tail(labels, 10, seed=0, class_names="abcd")]).tolist()
    [40, 10, 6, 4]
    >>> np.bincount(labels[long_tail(labels, 10, seed=0, class_names="abcd", shape=exponential)]).tolist()
    [40, 19, 9, 4]
    """
    generator = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=len(class_names))
    kept = np.rint(counts.max() * ratio ** -shape(np.linspace(0, 1, len(counts)))).astype(int)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[: max(1, number)] for k, number in enumerate(kept)]
    return np.sort(np.concatenate(chosen))


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


def part_of_only_split(labels: np.ndarray, split: str) -> np.ndarray:
    """Returns the images of a split of a data set that has only one: `stratified_split`, or all images for WHOLE.

    Returns:
      Sorted indices into `labels`.

    >>> import numpy as np
    >>> [len(part_of_only_split(np.repeat([0, 1], [10, 5]), split)) for split in ("train", "test", WHOLE)]
    [12, 3, 15]
    """
    return np.arange(len(labels)) if split == WHOLE else stratified_split(labels)[SPLITS.index(split)]


def resplit(source: Source, train_fraction: float, seed: int) -> Source:
    """Returns the split `source.split` of a random division of all images, which keeps the proportions of the classes.

    The training split holds a fraction `train_fraction` of the images, and the test split all others.

    Args:
      source: all images of a data set, with the name of the split to return.

    Raises:
      InputError: if a class is left without training images, or no images are left for testing.

    >>> import numpy as np
    >>> from jax_transfer.data.source import from_arrays
    >>> source = from_arrays(np.zeros((20, 8, 8), np.uint8), np.repeat([0, 1], 10), split="test")
    >>> np.bincount(resplit(source, 0.3, seed=0).labels).tolist()
    [7, 7]
    """
    train = fraction(source.labels, train_fraction, seed)
    if lost := sorted(set(source.labels.tolist()) - set(source.labels[train].tolist())):
        raise InputError(
            f"train_fraction={train_fraction:g} of {len(source)} images leaves class {source.class_names[lost[0]]!r} "
            "without a training image; use a larger one."
        )
    test = np.setdiff1d(np.arange(len(source)), train)
    if not len(test):
        raise InputError(
            f"train_fraction={train_fraction:g} of {len(source)} images leaves none for testing; use a smaller one."
        )
    return subset(source, train if source.split == "train" else test)


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
      whole: whether `select` takes the images of both splits, with the name of the one to return.
    """

    splits: tuple[str, ...]
    parse: Callable[[str], Any]
    expected: str
    select: Callable[[Source, Any, int], Source]
    whole: bool = False


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


def _ratio(text: str) -> float:
    if not 1 <= float(text) < math.inf:
        raise ValueError(text)
    return float(text)


def _part(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError(text)
    return float(text)


def _names(text: str) -> list[str]:
    names = text.split("+")
    if not all(names):
        raise ValueError(text)
    return names


def _captions(text: str) -> Callable[[Source, int], Source]:
    if text not in CAPTIONS:
        raise ValueError(text)
    return CAPTIONS[text]


ALL = (*SPLITS, VALIDATION)
CAPTIONS = {"templates": with_templates, "names": with_names, "attributes": with_attributes}
OPTIONS = {
    "train_fraction": Option(SPLITS, _part, "a number between 0 and 1", resplit, whole=True),
    "classes": Option(
        ALL, _names, "names of classes joined by +", lambda source, names, seed: of_classes(source, names)
    ),
    "per_class": Option(("train",), _count, "a whole number of images per class, 1 or more", _select_by(few_shot)),
    "train": Option(("train",), _count, "a whole number of training images, 1 or more", _select_by(capped)),
    "images": Option(("train",), _count, "a whole number of training images, 1 or more", _select_by(random_images)),
    "test": Option(("test",), _count, "a whole number of test images, 1 or more", _select_by(capped)),
    "validation": Option((VALIDATION,), _count, "a whole number of validation images, 1 or more", _select_by(capped)),
    "fraction": Option(("train",), _share, "a number in (0, 1]", _select_by(fraction)),
    "imbalance": Option(("train",), _ratio, "a finite number of at least 1", _select_by(long_tail)),
    "exponential_imbalance": Option(
        ("train",),
        _ratio,
        "a finite number of at least 1",
        _select_by(functools.partial(long_tail, shape=exponential)),
    ),
    "captions": Option(ALL, _captions, " or ".join(CAPTIONS), lambda source, make, seed: make(source, seed)),
}
FIRST = ("train_fraction", "classes")  # applied first, in this order, since the others apply to what they leave
EXCLUSIVE = ("imbalance", "exponential_imbalance")  # two shapes of the same long tail, of which a name has one
