"""The supervised objective: cross-entropy on the labels of the source or target data."""

import functools

from jax_transfer.fields import Probability
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import loss_and_accuracy


def supervised(net: Net, augment: tuple[str, ...], label_smoothing: Probability = 0.0) -> Objective:
    """Makes the objective "mean softmax cross-entropy over the batch".

    Its feed is "train". The labels are integers [b] or, if images are mixed, the weights of the classes [b, c].

    Args:
      net: a net with a classification head.
      augment: names of the augmentations.
      label_smoothing: probability that is taken from the true class and spread evenly over all classes.

    Returns:
      The objective. Its metric "accuracy" is measured in training mode; the label of a mixed image is the class with
      the largest weight.

    Example:
      >>> import types
      >>> import jax.numpy as jnp
      >>> from jax_transfer.models.net import Output
      >>> from jax_transfer.records import Views
      >>> apply_train = lambda params, stats, images, key: (Output(images @ params, images), stats)
      >>> objective = supervised(types.SimpleNamespace(num_classes=2, apply_train=apply_train, classifier=("fc",)), ())
      >>> views = {"train": Views((jnp.eye(2),), jnp.array([0, 1]), jnp.array([True, True]), {})}
      >>> loss, (aux, metrics) = objective.loss(jnp.eye(2), {"stats": {}}, views, key=None)
      >>> round(float(loss), 2), float(metrics["accuracy"])
      (0.31, 1.0)
    """

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return params, {"stats": stats}

    def loss(params, aux, views, key):
        (images,), labels = views["train"].images, views["train"].labels
        output, stats = net.apply_train(params, aux["stats"], images, key)
        value, accuracy = loss_and_accuracy(output.logits, labels, label_smoothing)
        return value, ({"stats": stats}, {"accuracy": accuracy})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params, "stats": aux["stats"]},
        views={"train": (augment,)},
        groups=functools.partial(head_and_backbone, (net.classifier,)),
    )
