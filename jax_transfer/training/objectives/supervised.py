"""Cross-entropy on the labels of the source or target data."""

import functools

import jax.numpy as jnp
import optax

from jax_transfer.fields import Probability
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone


def supervised(net: Net, augment: tuple[str, ...], label_smoothing: Probability = 0.0) -> Objective:
    """Mean softmax cross-entropy over the batch.

    Its feed is "train"; labels are float [b, c], with the weight of each class, where images are mixed.

    Args:
      label_smoothing: probability taken from the true class and spread over all.

    Returns:
      The objective; its metric "accuracy" is that in training mode, for a mixed image on the class with the larger weight.
    """

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return params, {"stats": stats}

    def loss(params, aux, views, key):
        (images,), labels = views["train"].images, views["train"].labels
        output, stats = net.apply_train(params, aux["stats"], images, key)
        mixed = labels.ndim == 2
        targets = labels if mixed else jnp.eye(net.num_classes)[labels]
        value = optax.softmax_cross_entropy(output.logits, optax.smooth_labels(targets, label_smoothing)).mean()
        accuracy = (output.logits.argmax(-1) == (targets.argmax(-1) if mixed else labels)).mean()
        return value, ({"stats": stats}, {"accuracy": accuracy})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params, "stats": aux["stats"]},
        views={"train": (augment,)},
        groups=functools.partial(head_and_backbone, net),
    )
