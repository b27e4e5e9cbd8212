"""Labels and exemplars together: "Sup-Exemplar-100%" in VTAB (Zhai et al., 2019, arXiv:1910.04867)."""

import functools

import jax
import jax.numpy as jnp

from jax_transfer.fields import Count, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.exemplar import Copies
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import (
    check_compared_views,
    check_unmixed,
    in_one_pass,
    linear,
    loss_and_accuracy,
    new_linear,
)
from jax_transfer.training.objectives.triplet import batch_hard_triplet_loss


def sup_exemplar(
    net: Net,
    augment: tuple[str, ...],
    weight: NotNegative = 1.0,
    copies: Copies = 8,
    embedding: Count = 1000,
) -> Objective:
    """Makes the objective "mean cross-entropy on the labels + weight * triplet loss of copies of each image".

    S4L-Exemplar (see `semi_exemplar`) where all images have labels, so that both losses are of the same images and
    one feed, "train", is enough. Several augmented copies of each image go through the net in one pass. The
    cross-entropy averages over all of them, and `triplet.batch_hard_triplet_loss` compares their embeddings.

    Args:
      net: a net with a classification head.
      augment: names of the augmentations of the copies.
      weight: weight of the triplet loss, w in S4L.
      copies: number of copies of each image.
      embedding: columns of the linear embedding of the features.

    Returns:
      The objective, whose loss compares the images of a batch. Its metrics are "accuracy" on the copies and
      "triplet_loss", in training mode. Its model is the net without the embedding.

    Raises:
      InputError: if `augment` mixes images; from the loss, if a batch has one image.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = sup_exemplar(resnet10(num_classes=5, width=8), ("flip",), copies=2)
      >>> objective.views, objective.has_head
      ({'train': (('flip',), ('flip',))}, True)
    """
    check_unmixed("sup_exemplar", augment)

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        head = new_linear(jax.random.fold_in(key, 1), net.feature_dim, embedding)
        return {"net": params, "head": head}, {"stats": stats}

    def loss(params, aux, views, key):
        outputs, stats = in_one_pass(net, params["net"], aux["stats"], views["train"].images, key)
        logits = jnp.stack([output.logits for output in outputs], 1)
        embedded = jnp.stack([linear(params["head"], output.features) for output in outputs], 1)
        labels = jnp.repeat(views["train"].labels, copies, axis=0)
        value, accuracy = loss_and_accuracy(logits.reshape(-1, net.num_classes), labels)
        triplet_loss = batch_hard_triplet_loss(embedded)
        metrics = {"accuracy": accuracy, "triplet_loss": triplet_loss}
        return value + weight * triplet_loss, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,) * copies},
        groups=functools.partial(head_and_backbone, (("net", *net.classifier), ("head",))),
        check=check_compared_views,
    )
