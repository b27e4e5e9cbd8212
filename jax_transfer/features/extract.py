"""Feature extraction: one compiled forward pass for all checkpoints of a net."""

import collections
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed, abstract_batch
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net, Output
from jax_transfer.records import Batch, Features


def make_forward(net: Net, preprocessing: Preprocessing, mesh: Mesh) -> Callable[..., Output]:
    """Compiles the forward pass of a net in evaluation mode.

    Returns:
      forward(model, batch) -> Output(logits [b, s], features [b, d]), without maps, and with a projection if the net
      has one. The model is a dictionary of `params` and `stats`.
    """

    apply = devices.on_mesh(net.apply, mesh)

    @jax.jit
    def forward(model, batch: Batch):
        images = devices.constrain(batch, mesh, "data").images
        output = apply(model["params"], model["stats"], augment.evaluation_view(images, preprocessing))
        return output._replace(maps=None)

    return forward


def extract(forward: Callable, model: dict, feed: Feed, batch_size: int) -> Features:
    """Extracts the features of every image of a feed, as numpy arrays in the order of its source.

    Args:
      forward: the forward pass that `make_forward` returns.
      model: the weights, on the devices that run the forward pass.
      feed: the images.
      batch_size: number of images in a forward pass, over all devices.

    Returns:
      Features [n, d], logits [n, s] (s = 0 without a head) and labels [n].
    """
    in_flight: collections.deque = collections.deque()
    parts = []
    for batch in feed.evaluation_batches(batch_size):
        in_flight.append(forward(model, batch))
        if len(in_flight) > 2:  # copy a batch's features to the host while the next batches are computed
            parts.append(jax.device_get(in_flight.popleft()))
    parts += jax.device_get(list(in_flight))
    n = len(feed.source)  # later rows are padding
    features, logits = (np.concatenate([getattr(part, name) for part in parts])[:n] for name in ("features", "logits"))
    return Features(features=features, logits=logits, labels=np.asarray(feed.source.labels, np.int32))


# Rounding errors of the forward pass alone may make a feature vary by this many eps of its size.
CONSTANT = 16


def problem(features: Features, num_classes: int) -> str:
    """Explains why nothing can be learnt or scored from features, naming the array; returns "" if they are valid.

    Features count as constant if each varies by at most CONSTANT eps of its size over all images. The size of a feature
    is its largest absolute value or, if larger, the median of these values over all features: a feature that is near 0
    because terms cancel has rounding errors as large as those of other features.

    >>> import numpy as np
    >>> labels = np.array([0, 1])
    >>> problem(Features(np.eye(2, dtype=np.float32), np.zeros((2, 0), np.float32), labels), num_classes=2)
    ''
    >>> problem(Features(np.ones((2, 3), np.float32), np.zeros((2, 0), np.float32), labels), num_classes=2)
    'features [2, 3] do not vary: all images get the same ones'
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


def forward_gigaflops(forward: Callable[..., Output], net: Net, preprocessing: Preprocessing, batch_size: int) -> float:
    """Computes the work of the forward pass on one image, in GFLOP, with the compiler's cost analysis of shapes."""
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    batch = abstract_batch(preprocessing, batch_size)
    return devices.gigaflops(forward, {"params": params, "stats": stats}, batch) / batch_size


def stack(features: Sequence[Features]) -> Features:
    """Stacks the features of k checkpoints: features [k, n, d], logits [k, n, s], labels [k, n].

    Source classes that a checkpoint lacks get a logit of minus infinity, that is, a probability of 0.

    >>> import numpy as np
    >>> a, b = (Features(np.zeros((4, 2)), np.zeros((4, s)), np.arange(4)) for s in (3, 5))
    >>> stack([a, b]).logits.shape
    (2, 4, 5)
    """
    s = max(each.logits.shape[1] for each in features)
    padded = [np.pad(f.logits, ((0, 0), (0, s - f.logits.shape[1])), constant_values=-np.inf) for f in features]
    return Features(
        features=jnp.asarray(np.stack([f.features for f in features])),
        logits=jnp.asarray(np.stack(padded)),
        labels=jnp.asarray(np.stack([f.labels for f in features])),
    )
