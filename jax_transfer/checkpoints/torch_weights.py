"""Weights in torch's layout, from and to our dictionaries, by names.

Our parameters have the names of the released torch checkpoints, with "/" for "." and another word for the last part, so
that one rule serves every model (`_torch_name`). Files that call the same parts otherwise are renamed: see `renamings`.
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

# Our last part of a name -> torch's, for parameters that are matrices or kernels, and for the rest.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def expected_shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """torch's name -> shape in torch's layout, of each array of a net."""
    return {_torch_name(name): _torch_shape(name, shape) for name, shape in net.shapes.items()}


def from_torch(
    state: Mapping[str, np.ndarray], net: Net, what: str, contrastive: bool = False
) -> tuple[dict, dict, str]:
    """(params, stats, note): the weights of a torch state dict as a net's dictionaries, by name and strictly.

    Args:
      state: name -> array in torch's layout, as `state_dicts.find` gives it.
      net: the model they are for. A head for another number of classes, or of another kind, is left out; a new one
        (seed 0) stands in for it, and the note says so. "" if there is nothing to say, or the net has no head.
      what: how a message calls the file.
      contrastive: leave the head out in any case, for it was trained to tell images apart, not classes.

    Raises:
      InputError: if any other name or shape differs; it lists the first of each kind.
    """
    state = renamings.to_ours(state, what)
    ours, shapes = {_torch_name(name): name for name in net.shapes}, expected_shapes(net)
    head = ".".join(net.classifier) + "."
    own = {name: value.shape for name, value in state.items() if name.startswith(head)}
    note = ""
    if not net.num_classes:
        state = {name: value for name, value in state.items() if name not in own}
    elif contrastive or own != {name: shape for name, shape in shapes.items() if name.startswith(head)}:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in own.items())
        reason = "is a contrastive loss's" if contrastive else _reason(own.get(f"{head}weight", ()), net)
        note = f"its head ({listed}) {reason} and was left out" if own else "it holds no head"
        state = {name: value for name, value in state.items() if name not in own}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(head)}
    expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {n.replace("/", ":"): jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in state.items()}
    if different := trees.difference(expected, found, limit=10**6):
        raise InputError(f"{what} does not fit {net.name}: {_shortened(different.splitlines())}")
    tree = trees.unflatten({ours[name]: jnp.asarray(_from_torch_layout(ours[name], state[name])) for name in shapes})
    params = tree.get("params", {})
    return with_new_head(params, net, jax.random.key(0)) if note else params, tree.get("stats", {}), note


def _reason(shape: tuple[int, ...], net: Net) -> str:
    """Why a head of this shape is not the net's."""
    if len(shape) == 2 and shape[1] != net.feature_dim:
        return f"takes {shape[1]} features where {net.name} has {net.feature_dim}, so these may be pooled otherwise,"
    return f"is not one of {net.num_classes} classes"


def _shortened(lines: list[str], limit: int = 3) -> str:
    """The first lines of each kind: all that a wrong model misses would hide what the file has instead."""
    parts = []
    for kind in ("missing", "unexpected", "differs"):
        of_kind = [line for line in lines if line.startswith(kind)]
        parts += of_kind[:limit]
        parts += [f"{kind}: {len(of_kind) - limit} more"] if len(of_kind) > limit else []
    return "; ".join(parts)


def to_torch(params: dict, stats: dict) -> State:
    """name -> array in torch's layout, with timm's names; `from_torch` undoes it. See `checkpoints.export`."""
    flat = jax.device_get(trees.flatten({"params": params, "stats": stats}))
    state = {_torch_name(name): _to_torch_layout(name, np.asarray(x)) for name, x in flat.items()}
    return {name: np.ascontiguousarray(x) for name, x in renamings.to_released(state).items()}


def save_safetensors(path: pathlib.Path, params: dict, stats: dict, metadata: Mapping[str, str]) -> None:
    """Writes the weights with timm's names and torch's layout, and words about them."""
    safetensors.numpy.save_file(to_torch(params, stats), path, metadata=dict(metadata))


def _torch_name(name: str) -> str:
    """params/layer1/0/conv1/kernel -> layer1.0.conv1.weight."""
    *parents, leaf = name.split("/")[1:]
    return ".".join([*parents, LEAVES.get(leaf, leaf)])


def _to_torch_layout(name: str, x):
    """[h, w, i, o] -> [o, i, h, w] and [i, o] -> [o, i] for kernels."""
    return np.transpose(x, {2: (1, 0), 4: (3, 2, 0, 1)}[x.ndim]) if name.endswith("/kernel") else x


def _from_torch_layout(name: str, x):
    return np.transpose(x, {2: (1, 0), 4: (2, 3, 1, 0)}[x.ndim]) if name.endswith("/kernel") else x


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(name, np.broadcast_to(np.zeros(1, bool), shape)).shape
