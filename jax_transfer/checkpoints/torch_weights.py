"""Converts weights in torch's layout to our dictionaries and back, by their names.

Our parameters have the names of the released torch checkpoints, with "/" instead of "." and a different last part, so
that one rule serves every model (`_torch_name`). Files with other names for the same arrays are renamed, see
`renamings`.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_transfer import trees
from jax_transfer.checkpoints import renamings
from jax_transfer.checkpoints.renamings import State
from jax_transfer.checkpoints.torch_files import ALSO_READ as ALSO_READ
from jax_transfer.checkpoints.torch_files import ENDINGS as ENDINGS
from jax_transfer.models.net import Net, with_new_head
from jax_transfer.records import InputError

# Last part of our names -> last part of torch's.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def expected_shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Returns torch's name -> shape in torch's layout, for each array of a net."""
    return {_torch_name(name): _torch_shape(name, shape) for name, shape in net.shapes.items()}


def from_torch(
    state: Mapping[str, np.ndarray], net: Net, what: str, contrastive: bool = False
) -> tuple[dict, dict, str]:
    """Converts a torch state dict to the dictionaries of a net; names and shapes must match exactly.

    A head for another number of classes or of another kind is left out and replaced by a new one (seed 0).

    Args:
      state: name -> array in torch's layout, as `state_dicts.find` returns it.
      net: the model.
      what: the name of the file, for messages.
      contrastive: leave out the head in any case, since it was trained to distinguish images rather than classes.

    Returns:
      (params, stats, note). The note says why the head is new; it is "" if the head is not new or the net has none.

    Raises:
      InputError: if any other name or shape differs; the message lists the first ones.

    >>> from jax_transfer.models.resnet import resnet10
    >>> net = resnet10(num_classes=5, width=8)
    >>> state = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(net).items()}
    >>> params, stats, note = from_torch(state, net, "mine.pth")
    >>> params["conv1"]["kernel"].shape, note
    ((7, 7, 3, 8), '')
    """
    state = renamings.to_ours(state, what)
    ours, shapes = {_torch_name(name): name for name in net.shapes}, expected_shapes(net)
    head = ".".join(net.classifier) + "."
    own_head = {name: value.shape for name, value in state.items() if name.startswith(head)}
    note = ""
    if not net.num_classes:
        state = {name: value for name, value in state.items() if name not in own_head}
    elif contrastive or own_head != {name: shape for name, shape in shapes.items() if name.startswith(head)}:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in own_head.items())
        reason = "belongs to a contrastive loss" if contrastive else _reason(own_head.get(f"{head}weight", ()), net)
        note = f"its head ({listed}) {reason} and was left out" if own_head else "the file has no head"
        state = {name: value for name, value in state.items() if name not in own_head}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(head)}
    expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {n.replace("/", ":"): jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in state.items()}
    if different := trees.difference(expected, found, limit=10**6):
        raise InputError(f"{what} does not fit {net.name}: {_shortened(different.splitlines())}")
    tree = trees.unflatten({ours[name]: jnp.asarray(_from_torch_layout(ours[name], state[name])) for name in shapes})
    params = tree.get("params", {})
    return with_new_head(params, net, jax.random.key(0)) if note else params, tree.get("stats", {}), note


def _reason(shape: tuple[int, ...], net: Net) -> str:
    """Returns why a head whose kernel has this shape (in torch's layout) does not fit the net."""
    if len(shape) == 2 and shape[1] != net.feature_dim:
        return f"takes {shape[1]} features where {net.name} has {net.feature_dim} (maybe they are pooled differently)"
    return f"does not have {net.num_classes} classes"


def _shortened(lines: list[str], limit: int = 3) -> str:
    """Joins the first lines of each kind, since the many missing names of a wrong model would hide the others."""
    parts = []
    for kind in ("missing", "unexpected", "differs"):
        of_kind = [line for line in lines if line.startswith(kind)]
        parts += of_kind[:limit]
        parts += [f"{kind}: {len(of_kind) - limit} more"] if len(of_kind) > limit else []
    return "; ".join(parts)


def to_torch(params: dict, stats: dict) -> State:
    """Converts the dictionaries of a net to name -> array in torch's layout, with timm's names.

    `from_torch` reverses it; `checkpoints.export` lists the names.
    """
    flat = jax.device_get(trees.flatten({"params": params, "stats": stats}))
    state = {_torch_name(name): _to_torch_layout(name, np.asarray(x)) for name, x in flat.items()}
    return {name: np.ascontiguousarray(x) for name, x in renamings.to_released(state).items()}


def save_safetensors(path: pathlib.Path, params: dict, stats: dict, metadata: Mapping[str, str]) -> None:
    """Writes the weights with timm's names and torch's layout, and the metadata."""
    safetensors.numpy.save_file(to_torch(params, stats), path, metadata=dict(metadata))


def _torch_name(name: str) -> str:
    """Returns torch's name of an array: params/layer1/0/conv1/kernel -> layer1.0.conv1.weight."""
    *parents, leaf = name.split("/")[1:]
    return ".".join([*parents, LEAVES.get(leaf, leaf)])


def _to_torch_layout(name: str, x):
    """Transposes kernels: [h, w, i, o] -> [o, i, h, w] and [i, o] -> [o, i]."""
    return np.transpose(x, {2: (1, 0), 4: (3, 2, 0, 1)}[x.ndim]) if name.endswith("/kernel") else x


def _from_torch_layout(name: str, x):
    """Transposes kernels: [o, i, h, w] -> [h, w, i, o] and [o, i] -> [i, o]."""
    return np.transpose(x, {2: (1, 0), 4: (2, 3, 1, 0)}[x.ndim]) if name.endswith("/kernel") else x


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(name, np.broadcast_to(np.zeros(1, bool), shape)).shape
