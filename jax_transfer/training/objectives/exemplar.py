"""Recognising the copies of an image among those of others (Dosovitskiy et al., 2014, arXiv:1406.6909)."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from jax_transfer.fields import Count, Positive, between
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import (
    check_compared_views,
    check_unmixed,
    in_one_pass,
    linear,
    new_linear,
)
from jax_transfer.training.objectives.triplet import semi_hard_triplet_loss

Copies = Annotated[int, between(2, 100)]


def exemplar(
    net: Net,
    augment: tuple[str, ...],
    copies: Copies = 8,
    margin: Positive = 0.5,
    embedding: Count = 1000,
) -> Objective:
    """Makes the objective "triplet loss of the embeddings of several augmented copies of each image".

    Each image is a class of its own, whose examples are its copies (Dosovitskiy et al., 2014). As in Kolesnikov et al.
    (2019, arXiv:1901.09005), there is no weight for each image, but a triplet loss with semi-hard negatives in the
    batch (`triplet.semi_hard_triplet_loss`), on a linear embedding of the features. The copies go through the net in
    one pass.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations of the copies, which should be strong: the paper crops, mirrors, changes
        colours and makes two thirds of the images gray.
      copies: number of copies of each image.
      margin: margin of the loss.
      embedding: columns of the embedding.

    Returns:
      The objective, whose loss compares the images of a batch. Its model is the net without the embedding.

    Raises:
      InputError: if `augment` mixes images; from the loss, if a batch has one image.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> exemplar(resnet10(num_classes=0, width=8), ("flip",), copies=3).views
      {'train': (('flip',), ('flip',), ('flip',))}
    """
    check_unmixed("exemplar", augment)

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        head = new_linear(jax.random.fold_in(key, 1), net.feature_dim, embedding)
        return {"net": params, "head": head}, {"stats": stats}

    def loss(params, aux, views, key):
        outputs, stats = in_one_pass(net, params["net"], aux["stats"], views["train"].images, key)
        embedded = jnp.stack([linear(params["head"], output.features) for output in outputs], 1)
        return semi_hard_triplet_loss(embedded, margin), ({"stats": stats}, {})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,) * copies},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("head",),)),
        check=check_compared_views,
    )
