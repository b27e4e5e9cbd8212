"""Predicting where a patch lies relative to the central one (Doersch et al., 2015, arXiv:1505.05192)."""

import numpy as np

from jax_transfer.fields import Count, Probability
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.patches import PATCHES, classify_tuples

CENTRE = PATCHES // 2
# Patch and centre, from left to right and down.
NEIGHBOURS = np.array([(patch, CENTRE) for patch in range(PATCHES) if patch != CENTRE])


def relative_patch(
    net: Net,
    augment: tuple[str, ...],
    jitter: Probability = 0.25,
    embedding: Count = 1000,
    hidden: Count = 4096,
) -> Objective:
    """Makes the objective "mean cross-entropy of predicting in which of eight places around the centre a patch lies".

    Doersch et al. (2015), as Kolesnikov et al. (2019, arXiv:1901.09005) implement it: all eight patches around the
    centre of a 3 x 3 grid are compared with it, and an image of 255 pixels has cells of 85 and patches of 64. See
    `patches.classify_tuples` for the net and the head. An epoch is nine times the work of a supervised one on images of
    the size of a patch. Against shortcuts by colour, the papers also make two thirds of the images gray, which is a
    matter of `augment`.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations of the whole image.
      jitter: part of the side of a cell within which the place of a patch is random.
      embedding: columns of the embedding of a patch.
      hidden: width of the hidden layer of the head.

    Returns:
      The objective. Its metric is "patch_accuracy", in training mode.

    Example:
      >>> import jax
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = relative_patch(resnet10(num_classes=0, width=8), ("flip",), embedding=10, hidden=50)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["head"]["hidden"]["kernel"].shape, params["head"]["output"]["kernel"].shape
      ((20, 50), (50, 8))
    """
    return classify_tuples(net, augment, NEIGHBOURS, len(NEIGHBOURS), jitter, embedding, hidden)
