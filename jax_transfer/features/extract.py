"""Features of a data set: one compiled forward pass for all checkpoints, and a cache on disk.

The cache's key is a hash of all that determines the features: the parameters themselves, the model,
the data with its size, the preprocessing and the precision of the computation.
"""

import collections
import functools
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices, logs
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed, abstract_batch
from jax_transfer.data.sources import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net, Output
from jax_transfer.records import Batch, Features


def make_forward(net: Net, preprocessing: Preprocessing, mesh: Mesh) -> Callable:
    """Compiles forward(model, batch) -> Output(logits [b, s], features [b, d]), without maps and projection."""

    @jax.jit
    def forward(model, batch: Batch):
        images = devices.constrain(batch, mesh, "data").images
        output = net.apply(model["params"], model["stats"], augment.evaluation_view(images, preprocessing))
        return Output(output.logits, output.features)

    return forward


def extract(forward: Callable, model: dict, feed: Feed, batch_size: int) -> Features:
    """Features of every image of the feed, as numpy arrays in the order of the source; logits [n, 0] without a head."""
    waiting: collections.deque = collections.deque()
    parts = []
    for batch in feed.evaluation_batches(batch_size):
        waiting.append(forward(model, batch))
        if len(waiting) > 2:  # copy a batch's features to the host while the next ones are computed
            parts.append(jax.device_get(waiting.popleft()))
    parts += jax.device_get(list(waiting))
    n = len(feed.source)  # what lies behind is padding
    features, logits = (np.concatenate([getattr(part, name) for part in parts])[:n] for name in ("features", "logits"))
    return Features(features=features, logits=logits, labels=np.asarray(feed.source.labels, np.int32))


CONSTANT = 16  # eps of its size, by which a feature may vary through rounding in the forward pass alone


def problem(features: Features, num_classes: int) -> str:
    """Why nothing can be learnt or scored from these features, naming the argument; "" if something can.

    Features do not vary if each lies, for all images, within CONSTANT eps of its largest value or of the median feature's,
    whichever is larger: one that cancels to about 0 has the rounding errors of the others.
    """
    for name in ("features", "logits"):
        values = getattr(features, name)
        if len(values) != len(features.labels):
            return f"{name} {list(values.shape)} do not match {len(features.labels)} labels"
        bad = values.size - np.count_nonzero(np.isfinite(values))
        if bad:
            return f"{name} {list(values.shape)} hold {bad:,} values that are NaN or infinite"
    labels = features.labels
    if not len(labels):
        return "there are no labels"
    if labels.min() < 0 or labels.max() >= num_classes:
        return f"labels lie in [{labels.min()}, {labels.max()}], expected 0 to {num_classes - 1}"
    if len(labels) > 1 and _are_constant(features.features):
        return f"features {list(features.features.shape)} do not vary: all images get the same ones"
    return ""


def _are_constant(x):
    x = np.asarray(x)
    spread = x.max(axis=0).astype(np.float64) - x.min(axis=0)
    size = np.abs(x).max(axis=0).astype(np.float64)
    return bool(np.all(spread <= CONSTANT * jnp.finfo(x.dtype).eps * np.maximum(size, np.median(size))))


def forward_gigaflops(forward: Callable, model: dict, preprocessing: Preprocessing, batch_size: int) -> float:
    """The work of one image's forward pass, by the compiler's cost analysis of shapes alone."""
    return devices.gigaflops(forward, model, abstract_batch(preprocessing, batch_size)) / batch_size


# Part of the name of cached features. Version 2: images are decoded, cropped and split otherwise than in version 1,
# whose files were named by the hash alone.
FEATURES_VERSION = 2


def cache_key(model_fingerprint: str, model_settings: dict, preprocessing: Preprocessing, source: Source) -> str:
    """Changes whenever the features would. `model_fingerprint` is `trees.fingerprint` of the parameters."""
    determined_by = [
        model_fingerprint,
        json.dumps(model_settings, sort_keys=True),
        json.dumps(preprocessing.to_json(), sort_keys=True),
        source.fingerprint,
        jnp.dtype(devices.compute_dtype()).name,
    ]
    return f"v{FEATURES_VERSION}-{hashlib.blake2b(chr(10).join(determined_by).encode(), digest_size=16).hexdigest()}"


def save(path: pathlib.Path, features: Features) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=features.features, logits=features.logits, labels=features.labels)
    logs.write_atomically(path, buffer.getvalue())


def load(path: pathlib.Path) -> Features | None:
    """The cached features, or None where there are none. A file that cannot be read is named and made again."""
    if not path.exists():
        _say_which_are_outdated(path.parent)
        return None
    try:
        with np.load(path) as arrays:
            return Features(**{name: arrays[name] for name in ("features", "logits", "labels")})
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        logs.log.warning("%s cannot be read (%s): the features are extracted again.", path, error)
        return None


@functools.cache  # once a folder
def _say_which_are_outdated(folder: pathlib.Path) -> None:
    outdated = [path for path in folder.glob("*.npz") if not path.name.startswith(f"v{FEATURES_VERSION}-")]
    if outdated:
        logs.log.warning(
            "%s holds %d files of features that another version made from other pixels: they are not used, and the "
            "features are extracted again.",
            folder,
            len(outdated),
        )
