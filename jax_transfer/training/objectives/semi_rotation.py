"""S4L-Rotation: labels for some images, rotations for all (Zhai et al., 2019, arXiv:1905.03670)."""

import functools

import jax
import jax.numpy as jnp

from jax_transfer.fields import NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import LABELLED, Objective, head_and_backbone
from jax_transfer.training.objectives.parts import in_one_pass, loss_and_accuracy, new_linear
from jax_transfer.training.objectives.rotation import four_rotations, rotation_loss_and_accuracy


def semi_rotation(net: Net, augment: tuple[str, ...], weight: NotNegative = 1.0) -> Objective:
    """Makes the objective "mean cross-entropy on the labelled images + weight * that of predicting rotations".

    Equation 1 of S4L. The feeds are "train", all images, whose labels are not used, and "labelled", images of the same
    classes with labels, such as 10 % of the first (`tfds:cifar10?fraction=0.1`). Images of both are seen in all four
    rotations, in one pass. The cross-entropy on the labels averages over the rotations too, as in the paper; that of
    the rotations is over "train", which holds the labelled images among all others.

    Args:
      net: a net with a head for the classes of the labelled images.
      augment: names of the augmentations of both feeds.
      weight: weight of the loss on the rotations, w in the paper.

    Returns:
      The objective. Its metrics are "accuracy" on the rotated labelled images, "rotation_loss" and
      "rotation_accuracy", in training mode. Its model is the net without the head for rotations.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> semi_rotation(resnet10(num_classes=5, width=8), ("flip",)).views
      {'train': (('flip',),), 'labelled': (('flip',),)}
    """

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return {"net": params, "head": new_linear(jax.random.fold_in(key, 1), net.feature_dim, 4)}, {"stats": stats}

    def loss(params, aux, views, key):
        images = [four_rotations(views[feed].images[0]) for feed in ("train", LABELLED)]
        (of_all, of_labelled), stats = in_one_pass(net, params["net"], aux["stats"], images, key)
        labels = jnp.repeat(views[LABELLED].labels, 4, axis=0)
        value, accuracy = loss_and_accuracy(of_labelled.logits, labels)
        rotation_loss, rotation_accuracy = rotation_loss_and_accuracy(params["head"], of_all.features)
        metrics = {"accuracy": accuracy, "rotation_loss": rotation_loss, "rotation_accuracy": rotation_accuracy}
        return value + weight * rotation_loss, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,), LABELLED: (augment,)},
        groups=functools.partial(head_and_backbone, (("net", *net.classifier), ("head",))),
    )
