"""Data types that several parts of the package use, the names of the metrics, and the error for invalid user input."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


class InputError(ValueError):
    """An error in the user's input. The message is one line that says what is wrong, what was expected and what to do.

    `main` prints it without a traceback and exits with code 2.
    """


# Characters that break a line or cannot be written: control characters, line separators and lone surrogates (which
# Python uses for bytes that are not UTF-8).
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text) -> str:
    r"""Escapes the characters that a one-line message cannot show, such as a line break in a file name.

    >>> print(printable("cat\n1.png"))
    cat\n1.png
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


# Metrics of a target: column of results/transfer.jsonl -> name of the metric in a sentence.
METRICS = {"accuracy": "accuracy", "mean_class_accuracy": "mean class accuracy"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of images, as yielded by a feed.

    Attributes:
      images: uint8 [b, h, w, 3], central squares; None if every view of the batch is a random crop.
      labels: int32 [b].
      mask: bool [b], False where a row is padding.
      extra: name -> additional array [b, ...], such as the tokens of captions (`Source.extra`).
      windows: uint8 [b, image_size, image_size, 3] for each view that is a random crop of the full images.
    """

    images: Any
    labels: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    extra: Mapping[str, jax.Array | np.ndarray] = dataclasses.field(default_factory=dict)
    windows: tuple[jax.Array | np.ndarray, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """A batch as an objective sees it. Each view is separately augmented, cropped to the model's size and normalised.

    Attributes:
      images: one float32 array [b, h, w, 3] for each view.
      labels: int32 [b]; or, if the first view mixes images, float32 [b, c] with the weight of each class.
      mask: bool [b], as in `Batch`.
      extra: additional arrays, as in `Batch`.
    """

    images: tuple[jax.Array, ...]
    labels: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    extra: Mapping[str, jax.Array | np.ndarray] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Features and logits that a checkpoint computes for a data set.

    Attributes:
      features: float32 [n, d].
      logits: float32 [n, s] over the s source classes; s = 0 if the checkpoint has no head.
      labels: int32 [n], the labels of the data set.
    """

    features: jax.Array | np.ndarray
    logits: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
