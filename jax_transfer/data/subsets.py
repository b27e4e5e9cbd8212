"""Which images of a data set take part: pure functions of the labels that return sorted indices, and OPTIONS of names.

Each is reproducible from `seed` on any machine (numpy's Generator) and never repeats an image.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_transfer.data.source import SPLITS, Source, of_classes, subset
from jax_transfer.records import InputError


def few_shot(labels: np.ndarray, per_class: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """`per_class` random images of each class: sorted indices [per_class * c] into labels [n].

    With the same seed, fewer images per class are a subset of more.

    Raises:
      InputError: if a class has fewer images, naming it.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label, class_name in enumerate(class_names):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) < per_class:
            raise InputError(
                f"per_class={per_class}: class {class_name!r} has only {len(members)} images; ask for no more."
            )
        chosen.append(members[:per_class])
    return np.sort(np.concatenate(chosen))


def capped(labels: np.ndarray, most: int, seed: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """At most `most` random images, in the proportions of the classes: sorted indices [min(most, n)].

    Shares are rounded by largest remainder; each class keeps at least one image where `most` allows it.
    """
    if most >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    shares = _shares(np.bincount(labels), most, generator)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[:share] for k, share in enumerate(shares)]
    return np.sort(np.concatenate(chosen))


def fraction(labels: np.ndarray, part: float, seed: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """A random `part` in (0, 1] of the images, in the proportions of the classes: sorted indices [round(part * n)]."""
    return capped(labels, max(1, round(part * len(labels))), seed)


def stratified_split(labels: np.ndarray, test_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """(train, test): sorted indices, the same on every call. A class of one image has it in train."""
    generator = np.random.default_rng(0)
    test = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        test.append(members[:count])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _shares(counts: np.ndarray, total: int, generator: np.random.Generator) -> np.ndarray:
    """Divides `total` over classes in proportion to `counts` (largest remainder, ties at random)."""
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
    """An option of a data set's name: which splits it thins, how its value is read, and what it leaves of a source."""

    splits: tuple[str, ...]
    parse: Callable[[str], Any]
    expected: str
    select: Callable[[Source, Any, int], Source]  # (source, value, seed)


def _at(function) -> Callable[[Source, Any, int], Source]:
    """The images at the indices that one of the functions above returns."""
    return lambda source, value, seed: subset(source, function(source.labels, value, seed, source.class_names))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(text)
    return int(text)


def _part(text: str) -> float:
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
    "per_class": Option(("train",), _count, "a whole number of images per class, 1 or more", _at(few_shot)),
    "train": Option(("train",), _count, "a whole number of training images, 1 or more", _at(capped)),
    "test": Option(("test",), _count, "a whole number of test images, 1 or more", _at(capped)),
    "fraction": Option(("train",), _part, "a number in (0, 1]", _at(fraction)),
}
