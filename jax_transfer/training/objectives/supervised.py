"""Cross-entropy on the labels of the source or target data."""

import jax.numpy as jnp
import optax

from jax_transfer.models.net import Net
from jax_transfer.records import Batch


def supervised(net: Net, params, stats, batch: Batch, key, label_smoothing: float = 0.0):
    """Mean softmax cross-entropy over the batch.

    Args:
      batch: images already augmented and normalised, float32 [b, h, w, 3].

    Returns:
      loss [], (new BatchNorm statistics, metrics {"loss": [], "accuracy": []}).
    """
    output, stats = net.apply_train(params, stats, batch.images, key)
    targets = optax.smooth_labels(jnp.eye(net.num_classes)[batch.labels], label_smoothing)
    loss = optax.softmax_cross_entropy(output.logits, targets).mean()
    accuracy = (output.logits.argmax(-1) == batch.labels).mean()
    return loss, (stats, {"loss": loss, "accuracy": accuracy})
