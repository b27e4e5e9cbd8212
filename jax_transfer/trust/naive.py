"""Naive lists: orders of checkpoints that need no data of the target, which a score has to beat to earn its cost."""

import math
from collections.abc import Sequence

from jax_transfer.choose import choose
from jax_transfer.models import Net
from jax_transfer.models.net import num_parameters


def naive_values(
    net: Net,
    gigaflops: float,
    source_accuracy: float | None = None,
    epoch: float | None = None,
    place: float | None = None,
) -> dict[str, float]:
    """Returns the values of a checkpoint in the lists of `evidence.NAIVE`, without those that are not known.

    Parameters and work are those of the net without its head: the head depends on the number of source classes, which
    would order checkpoints of one architecture.

    Args:
      gigaflops: work of a forward pass on one image, with the head, in GFLOP.
      source_accuracy: accuracy in [0, 1] on test images of the pre-training data.
      epoch: epoch of the pre-training.
      place: value in the order that the user gives (`static_values`).

    >>> from jax_transfer.models import MODELS
    >>> naive_values(MODELS["resnet10"](num_classes=10, width=8), gigaflops=0.0078, epoch=5)
    {'num_parameters': 78312.0, 'forward_gflops': 0.007799, 'last_epoch': 5}
    """
    head = 2 * net.feature_dim * net.num_classes / 1e9
    values = {
        "num_parameters": float(num_parameters(net)),
        "forward_gflops": float(f"{gigaflops - head:.4g}"),  # so few digits that the head's bias adds nothing
        "source_accuracy": source_accuracy,
        "last_epoch": epoch,
        "static": place,
    }
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def static_values(order: Sequence[str], checkpoints: Sequence[str]) -> dict[str, float]:
    """Returns the values of checkpoints in an order that the user gives, the best one first; higher is better.

    Args:
      order: names of checkpoints, or how they begin up to a "/": "resnet50" stands for "resnet50/imagenet/90" too. The
        first entry that fits a checkpoint counts; those that no entry fits share the last place.
      checkpoints: all names.

    Returns:
      Name of each checkpoint -> value; empty without an order.

    Raises:
      InputError: if an entry fits no checkpoint; the message lists what does.

    >>> static_values(("resnet50", "resnet18"), ("resnet18/5", "resnet50/5", "vit/5"))
    {'resnet18/5': -1.0, 'resnet50/5': 0.0, 'vit/5': -2.0}
    """
    fits = {entry: [c for c in checkpoints if c == entry or c.startswith(f"{entry}/")] for entry in order}
    beginnings = {"/".join(c.split("/")[: i + 1]) for c in checkpoints for i in range(c.count("/") + 1)}
    for entry in order:
        choose(dict.fromkeys(beginnings), entry, "checkpoint (config.static)")
    if not order:
        return {}
    return {c: 0.0 - next((i for i, entry in enumerate(order) if c in fits[entry]), len(order)) for c in checkpoints}
