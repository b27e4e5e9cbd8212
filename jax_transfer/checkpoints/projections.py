"""Reads the projection of a contrastive method, which stands in a file as the head of the network or beside it."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_transfer.checkpoints.renamings import State, our_names
from jax_transfer.models.net import Net
from jax_transfer.records import InputError


class Projection(NamedTuple):
    """A projection as `net.with_projection` takes it, and a note on what was assumed.

    Attributes:
      widths: columns of the output of each layer.
      params: {"0": {"kernel", "bias"}, "2": ..., ...}.
      note: a sentence.
    """

    widths: tuple[int, ...]
    params: dict
    note: str


def read_projection(state: Mapping[str, np.ndarray], what: str, net: Net) -> Projection:
    """Reads linear layers with ReLU between them: "weight", or "0.weight", "2.weight", ..., with or without biases.

    Args:
      state: name in the projection -> array in torch's layout.
      what: the file and the place in it, for messages: "moco.pth (fc)".
      net: the net whose features are projected.

    Raises:
      InputError: if it has other layers, such as BatchNorm, or does not fit the features.

    >>> from jax_transfer.models.resnet import resnet10
    >>> state = {f"{i}.weight": np.zeros(shape, np.float32) for i, shape in ((0, (32, 64)), (2, (16, 32)))}
    >>> projection = read_projection(state, "moco.pth (fc)", resnet10(num_classes=5, width=8))
    >>> projection.widths, projection.params["0"]["kernel"].shape
    ((32, 16), (64, 32))
    """
    layers = {name if "." in name else f"0.{name}": x for name, x in state.items()}
    kernels = [layers.get(f"{2 * i}.weight") for i in range(sum(name.endswith(".weight") for name in layers))]
    widths = tuple(len(x) for x in kernels if x is not None and x.ndim == 2)
    shapes = {}
    for i, (width_in, width) in enumerate(itertools.pairwise((net.feature_dim, *widths))):
        shapes |= {f"{2 * i}.weight": (width, width_in), f"{2 * i}.bias": (width,)}
    if len(widths) < len(kernels) or not widths or any(shapes.get(name) != x.shape for name, x in layers.items()):
        listed = ", ".join(f"{name} {list(x.shape)}" for name, x in itertools.islice(layers.items(), 6))
        more = f" and {len(layers) - 6} more" if len(layers) > 6 else ""
        raise InputError(
            f"{what}: its projection holds {listed}{more}, but only linear layers 0, 2, ... with ReLU between them, "
            f"from {net.feature_dim} features, can be kept; load it without keep_projection."
        )
    params = {
        f"{2 * i}": {
            "kernel": jnp.asarray(layers[f"{2 * i}.weight"].T),
            "bias": jnp.asarray(layers.get(f"{2 * i}.bias", np.zeros(width, np.float32))),
        }
        for i, width in enumerate(widths)
    }
    sizes = " to ".join(map(str, (net.feature_dim, *widths)))
    assumed = "; ReLU between its layers is assumed, since weights do not show it" if len(widths) > 1 else ""
    return Projection(widths, params, f"Its projection from {sizes} is kept{assumed}.")


def split_head(state: State, net: Net) -> tuple[State, State]:
    """Splits a state into the arrays of the network, named as in the file, and those of its head, named as in the head.

    >>> from jax_transfer.models.resnet import resnet10
    >>> network, head = split_head({"conv1.weight": np.zeros(1), "fc.0.weight": np.zeros(1)}, resnet10(5))
    >>> list(network), list(head)
    (['conv1.weight'], ['0.weight'])
    """
    prefix, ours = ".".join((*net.classifier, "")), our_names(state)
    head = {ours[name].removeprefix(prefix): x for name, x in state.items() if ours[name].startswith(prefix)}
    return {name: x for name, x in state.items() if not ours[name].startswith(prefix)}, head


def classifies(head: State) -> bool:
    """Returns whether a head is one linear layer, as classifiers have.

    >>> classifies({"weight": np.zeros((5, 64)), "bias": np.zeros(5)}), classifies({"0.weight": np.zeros((5, 64))})
    (True, False)
    """
    return bool(head) and not any("." in name for name in head)
