"""Cross-entropy on the labels of the source or target data."""

import jax.numpy as jnp
import optax

from jax_transfer.fields import Probability
from jax_transfer.models.net import Net
from jax_transfer.records import Batch


def supervised(net: Net, params, stats, batch: Batch, key, label_smoothing: Probability = 0.0):
    """Mean softmax cross-entropy over the batch.

    Args:
      batch: images already augmented and normalised, float32 [b, h, w, 3]; labels int [b], or float [b, c] with the
        weight of each class where images were mixed.

    Returns:
      loss [], (new BatchNorm statistics, metrics {"loss": [], "accuracy": []}). The accuracy of a mixed image is that
      on the class with the larger weight.
    """
    output, stats = net.apply_train(params, stats, batch.images, key)
    mixed = batch.labels.ndim == 2
    targets = batch.labels if mixed else jnp.eye(net.num_classes)[batch.labels]
    loss = optax.softmax_cross_entropy(output.logits, optax.smooth_labels(targets, label_smoothing)).mean()
    accuracy = (output.logits.argmax(-1) == (targets.argmax(-1) if mixed else batch.labels)).mean()
    return loss, (stats, {"loss": loss, "accuracy": accuracy})
