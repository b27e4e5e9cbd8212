"""Cache of features for studies, fine-tuned models and rankings.

The name of a file is a hash of everything that determines the features: the weights, the model, the data, the
preprocessing and the precision of the computation.
"""

import functools
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices
from jax_transfer.checkpoints.checkpoint import Checkpoint
from jax_transfer.data.batches import Feed
from jax_transfer.data.source import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features.extract import extract, forward_gigaflops, make_forward
from jax_transfer.logs import log
from jax_transfer.models import Net, Output
from jax_transfer.records import Features
from jax_transfer.results import write_atomically

# Part of each file name. Version 2 decodes, crops and splits images differently from version 1, whose file names
# consist of the hash alone.
VERSION = 2


class FeatureCache:
    """Features of checkpoints on data sets, read from disk, or extracted and then saved to disk.

        features = FeatureCache(workdir / "features", feeds, mesh, batch_size=512)
        features(checkpoint, source).features  # float32 [n, d]

    Args:
      folder: the folder for the files, or None to save nothing.
      feeds: (source, preprocessing) -> the feed of the source's images, read at the size that the preprocessing needs.
      mesh: the devices to extract on.
      batch_size: number of images in a forward pass, over all devices.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        feeds: Callable[[Source, Preprocessing], Feed],
        mesh: Mesh,
        batch_size: int,
    ):
        self._folder, self._feeds, self._mesh, self._batch_size = folder, feeds, mesh, batch_size
        self._forwards: dict[tuple[Net, Preprocessing], Callable[..., Output]] = {}
        self._gigaflops: dict[tuple[Net, Preprocessing], float] = {}

    def __call__(self, checkpoint: Checkpoint, source: Source) -> Features:
        """Returns the features of every image of a source, in the order of the source."""
        path = self.path(checkpoint, source)
        features = load(path) if path else None
        if features is None:
            forward = self._forward(checkpoint.net, checkpoint.preprocessing)
            feed = self._feeds(source, checkpoint.preprocessing)
            features = extract(forward, devices.replicate(checkpoint.model, self._mesh), feed, self._batch_size)
            if path:
                save(path, features)
        return features

    def path(self, checkpoint: Checkpoint, source: Source) -> pathlib.Path | None:
        """Returns the file for these features, whether it exists or not, or None if nothing is saved."""
        if self._folder is None:
            return None
        determined_by = [
            checkpoint.fingerprint,
            json.dumps({"name": checkpoint.net.name, **checkpoint.settings}, sort_keys=True),
            json.dumps(checkpoint.preprocessing.to_json(), sort_keys=True),
            source.fingerprint,
            jnp.dtype(devices.compute_dtype()).name,
        ]
        digest = hashlib.blake2b("\n".join(determined_by).encode(), digest_size=16).hexdigest()
        return self._folder / f"v{VERSION}-{digest}.npz"

    def is_kept(self, checkpoint: Checkpoint, source: Source) -> bool:
        """Returns whether the file of these features exists."""
        path = self.path(checkpoint, source)
        return path is not None and path.exists()

    def gigaflops_per_image(self, net: Net, preprocessing: Preprocessing) -> float:
        """Computes the work of the forward pass on one image, in GFLOP, from shapes alone."""
        key = net, preprocessing
        if key not in self._gigaflops:
            self._gigaflops[key] = forward_gigaflops(self._forward(*key), *key, self._batch_size)
        return self._gigaflops[key]

    def _forward(self, net: Net, preprocessing: Preprocessing) -> Callable[..., Output]:
        """Returns the compiled forward pass, shared by all checkpoints with the same net and preprocessing."""
        key = net, preprocessing
        if key not in self._forwards:
            self._forwards[key] = make_forward(*key, self._mesh)
        return self._forwards[key]

    def clear(self) -> None:
        """Releases the compiled programs; the files stay."""
        self._forwards.clear()
        self._gigaflops.clear()


def save(path: pathlib.Path, features: Features) -> None:
    """Writes features to a file.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "features.npz"
    >>> save(path, Features(np.zeros((4, 2)), np.zeros((4, 3)), np.arange(4)))
    >>> load(path).features.shape
    (4, 2)
    """
    buffer = io.BytesIO()
    np.savez(buffer, features=features.features, logits=features.logits, labels=features.labels)
    write_atomically(path, buffer.getvalue())


def load(path: pathlib.Path) -> Features | None:
    """Reads features from a file; returns None if it does not exist or, with a warning, cannot be read."""
    if not path.exists():
        _warn_of_outdated(path.parent)
        return None
    try:
        with np.load(path) as arrays:
            return Features(**{name: arrays[name] for name in ("features", "logits", "labels")})
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        log.warning("%s cannot be read (%s): the features are extracted again.", path, error)
        return None


@functools.cache  # once for each folder
def _warn_of_outdated(folder: pathlib.Path) -> None:
    outdated = [path for path in folder.glob("*.npz") if not path.name.startswith(f"v{VERSION}-")]
    if outdated:
        log.warning(
            "%s holds %d files of features that an earlier version extracted from differently prepared images: "
            "they are ignored, and the features are extracted again.",
            folder,
            len(outdated),
        )
