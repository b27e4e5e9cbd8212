"""Recognising in which order the patches of an image are shown (Noroozi and Favaro, 2016, arXiv:1603.09246)."""

import functools
import itertools
from typing import Annotated

import numpy as np
from jaxtyping import Int

from jax_transfer.fields import Count, Probability, UpTo, between
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.patches import PATCHES, classify_tuples


@functools.cache
def distant_permutations(count: int, length: int = PATCHES) -> Int[np.ndarray, "{count} {length}"]:
    """Chooses permutations of 0 to length - 1 that differ in many places, beginning with the identity.

    Each further one has the largest Hamming distance to the nearest of those already chosen; of several, the one with
    the largest mean distance, and of these the lexicographically first. Noroozi and Favaro (2016, algorithm 1) go by
    the mean distance alone, which allows two that differ in a few places only.

    Args:
      count: at most length!.

    Example:
      >>> distant_permutations(3, 3).tolist()
      [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    every = np.array(list(itertools.permutations(range(length))), np.int8)
    nearest, total = np.full(len(every), length, np.int64), np.zeros(len(every), np.int64)
    chosen = [0]
    for _ in range(count - 1):
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * (count * length) + total)))
    return every[chosen]


def jigsaw(
    net: Net,
    augment: tuple[str, ...],
    permutations: Annotated[int, between(2, 1000)] = 100,
    permutations_per_step: Annotated[int, between(1, 1000), UpTo("permutations")] = 8,
    jitter: Probability = 0.25,
    embedding: Count = 1000,
    hidden: Count = 4096,
) -> Objective:
    """Makes the objective "mean cross-entropy of recognising the order of the nine patches of an image".

    Noroozi and Favaro (2016), as Kolesnikov et al. (2019, arXiv:1901.09005) implement it: the orders are
    `distant_permutations`, and each image is shown in several of them, which costs only passes through the head. See
    `patches.classify_tuples` for the net and the head. An epoch is nine times the work of a supervised one on images of
    the size of a patch. Against shortcuts by colour, the papers also make two thirds of the images gray, which is a
    matter of `augment`.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations of the whole image.
      permutations: number of orders that are told apart.
      permutations_per_step: number of them in which the images of a step are shown.
      jitter: part of the side of a cell within which the place of a patch is random.
      embedding: columns of the embedding of a patch.
      hidden: width of the hidden layer of the head.

    Returns:
      The objective. Its metric is "patch_accuracy", in training mode.

    Example:
      >>> import jax
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = jigsaw(resnet10(num_classes=0, width=8), ("flip",), permutations=5, embedding=10, hidden=50)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["head"]["hidden"]["kernel"].shape, params["head"]["output"]["kernel"].shape
      ((90, 50), (50, 5))
    """
    orders = distant_permutations(permutations)
    return classify_tuples(net, augment, orders, permutations_per_step, jitter, embedding, hidden)
