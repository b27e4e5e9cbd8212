"""What the parts exchange: batches, views and features, the names of the metrics, and the error that users see."""

import dataclasses
import re

import jax
import numpy as np


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, what was expected, what to do.

    `main` prints it without a traceback and exits with code 2.
    """


# Characters that break a line or cannot be written: control characters, separators, and bytes that were no UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text) -> str:
    """As one line for a message: characters that cannot be shown or written, as names of files may hold, are escaped."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


# What may count on a target: column of results/transfer.jsonl -> its name in a sentence.
METRICS = {"accuracy": "accuracy", "mean_class_accuracy": "mean class accuracy"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images as a feed gives them.

    images: uint8 [b, h, w, 3]; labels: int32 [b]; mask: bool [b], False where a row is padding; extra: further arrays
    [b, ...] by name, such as the tokens of captions (`Source.extra`).
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """A batch as an objective sees it: augmented, cut to the model's size and normalised, once for each view.

    images: a tuple of float32 [b, h, w, 3], one entry a view. labels: int32 [b], or float32 [b, c] with the weight of each
    class where the first view mixes images. mask and extra are those of the batch.
    """

    images: tuple[jax.Array, ...]
    labels: jax.Array
    mask: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What a checkpoint says of a data set: features float32 [n, d], logits float32 [n, s], labels int32 [n]."""

    features: jax.Array | np.ndarray
    logits: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
