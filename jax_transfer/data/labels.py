"""Labels of prepared data sets, cached in the user's cache folder.

TFDS stores a label beside its image, so reading the labels reads every image: 150 GB for ImageNet. They are therefore
kept after the first time. A cache that is damaged or cannot be written is no error: the labels are read again.
"""

import io
import logging
import os
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np

from jax_transfer.results import write_atomically

logger = logging.getLogger(__name__)

# Errors of reading a file with numpy: it is missing, unreadable or damaged, or the user has no home folder.
READ_ERRORS = (OSError, ValueError, EOFError, MemoryError, SyntaxError, RuntimeError, zipfile.BadZipFile)


def cached_labels(key: str, count: int, num_classes: int, read: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the labels of a data set, int32 [count], from the cache if it holds them, else from `read()`.

    Args:
      key: identifies the data set and its version; the name of the file.
      count: number of images.
      num_classes: labels lie in [0, num_classes).

    >>> import tempfile, unittest.mock
    >>> with (
    ...     tempfile.TemporaryDirectory() as cache,
    ...     unittest.mock.patch.dict(os.environ, XDG_CACHE_HOME=cache),
    ... ):
    ...     first = cached_labels("key", 2, 3, read=lambda: np.array([0, 2], np.int32))
    ...     print(cached_labels("key", 2, 3, read=None).tolist())  # not read again
    [0, 2]
    """
    try:
        path = folder() / f"{key}.npy"
        labels = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if _valid(labels, count, num_classes):
            return labels
        logger.info("%s does not hold the labels of this data set: they are read again.", path)
    except FileNotFoundError:
        pass
    except READ_ERRORS as error:
        logger.info("The cached labels cannot be read (%s): they are read again.", error)
    labels = read()
    if _valid(labels, count, num_classes):
        _keep(labels, key)
    return labels


def folder() -> pathlib.Path:
    """Returns the folder of cached labels, below $XDG_CACHE_HOME or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jax_transfer" / "labels"


def _valid(labels, count: int, num_classes: int) -> bool:
    if not isinstance(labels, np.ndarray) or labels.shape != (count,) or labels.dtype != np.int32:
        return False
    return bool(((labels >= 0) & (labels < num_classes)).all())


def _keep(labels: np.ndarray, key: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, labels)
    try:
        write_atomically(folder() / f"{key}.npy", buffer.getvalue())
    except (OSError, RuntimeError) as error:
        logger.info("The labels cannot be cached (%s): the next start will read them again.", error)
