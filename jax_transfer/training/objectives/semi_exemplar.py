"""S4L-Exemplar: labels for some images, exemplars for all (Zhai et al., 2019, arXiv:1905.03670)."""

import functools

import jax
import jax.numpy as jnp

from jax_transfer.fields import Count, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.exemplar import Copies
from jax_transfer.training.objectives.objective import LABELLED, Objective, head_and_backbone
from jax_transfer.training.objectives.parts import (
    check_compared_views,
    check_unmixed,
    in_one_pass,
    linear,
    loss_and_accuracy,
    new_linear,
)
from jax_transfer.training.objectives.triplet import batch_hard_triplet_loss


def semi_exemplar(
    net: Net,
    augment: tuple[str, ...],
    weight: NotNegative = 1.0,
    copies: Copies = 8,
    embedding: Count = 1000,
) -> Objective:
    """Makes the objective "mean cross-entropy on the labelled images + weight * triplet loss of copies of all images".

    Equation 1 of S4L. The feeds are "train", all images, whose labels are not used, and "labelled", images of the same
    classes with labels, such as 10 % of the first (`tfds:cifar10?fraction=0.1`). Several augmented copies of the images
    of both go through the net in one pass. The cross-entropy on the labels averages over all copies, as in the paper;
    `triplet.batch_hard_triplet_loss` compares the embeddings of those of "train", which holds the labelled images among
    all others.

    Args:
      net: a net with a head for the classes of the labelled images.
      augment: names of the augmentations of the copies; the paper crops, mirrors and changes colours.
      weight: weight of the triplet loss, w in the paper.
      copies: number of copies of each image.
      embedding: columns of the linear embedding of the features.

    Returns:
      The objective, whose loss compares the images of a batch. Its metrics are "accuracy" on the labelled copies and
      "triplet_loss", in training mode. Its model is the net without the embedding.

    Raises:
      InputError: if `augment` mixes images; from the loss, if a batch has one image.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> semi_exemplar(resnet10(num_classes=5, width=8), ("flip",), copies=2).views
      {'train': (('flip',), ('flip',)), 'labelled': (('flip',), ('flip',))}
    """
    check_unmixed("semi_exemplar", augment)

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        head = new_linear(jax.random.fold_in(key, 1), net.feature_dim, embedding)
        return {"net": params, "head": head}, {"stats": stats}

    def loss(params, aux, views, key):
        images = (*views["train"].images, *views[LABELLED].images)
        outputs, stats = in_one_pass(net, params["net"], aux["stats"], images, key)
        embedded = jnp.stack([linear(params["head"], output.features) for output in outputs[:copies]], 1)
        logits = jnp.stack([output.logits for output in outputs[copies:]], 1)
        labels = jnp.repeat(views[LABELLED].labels, copies, axis=0)
        value, accuracy = loss_and_accuracy(logits.reshape(-1, net.num_classes), labels)
        triplet_loss = batch_hard_triplet_loss(embedded)
        metrics = {"accuracy": accuracy, "triplet_loss": triplet_loss}
        return value + weight * triplet_loss, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,) * copies, LABELLED: (augment,) * copies},
        groups=functools.partial(head_and_backbone, (("net", *net.classifier), ("head",))),
        check=check_compared_views,
    )
