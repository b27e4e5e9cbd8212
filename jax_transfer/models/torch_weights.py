"""Weights of torch models in .safetensors, .pth and .pt files, from and to our dictionaries, by names.

Our parameters have the names of the released torch checkpoints, with "/" for "." and another word for the last part, so
that one rule serves every model (`_torch_name`). Files that call the same parts otherwise are renamed first (`RENAMINGS`).
"""

import pathlib
import pickle
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from jax_transfer import trees
from jax_transfer.models.net import Net
from jax_transfer.records import InputError

State = dict[str, np.ndarray]

# Our last part of a name -> torch's, for parameters that are matrices or kernels, and for the rest.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Where training code keeps the weights among other things.
CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_ema", "teacher")
# In front of every name, put there by wrappers; of MoCo-v2 the query encoder.
PREFIXES = ("module.encoder_q.", "module.base_encoder.", "module.", "encoder_q.", "backbone.", "_orig_mod.")
# Not weights of the network that gives features: counters, the other encoder and queue of MoCo, heads used in training alone.
IGNORED = re.compile(
    r"(^|\.)num_batches_tracked$|^(module\.)?(encoder_k\.|queue)|^(AuxLogits|aux1|aux2|aux_head)\.|^mask_token$"
)


def read_state(path: pathlib.Path) -> tuple[State, dict[str, str]]:
    """(name -> float32 array, metadata) of a file, without wrappers' prefixes and what is no weight. No code in it is run.

    Raises:
      InputError: if the file is missing, is no checkpoint, is cut off, holds code, or needs torch where there is none.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such checkpoint file.")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin", ".tar"):
        state = _read_torch(path)
    else:
        raise InputError(f"{path}: expected a .safetensors, .pth or .pt file, or a folder of Orbax checkpoints.")
    names = [name for name in state if not IGNORED.search(name)]
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in names)), "")
    inside = [name for name in names if name.startswith(prefix)]
    found = {name.removeprefix(prefix): np.asarray(state[name], np.float32) for name in inside}
    found = {name: value for name, value in found.items() if not IGNORED.search(name)}
    if not found:
        raise InputError(f"{path}: holds no weights.")
    if broken := [name for name, value in found.items() if not np.isfinite(value).all()]:
        raise InputError(f"{path}: {broken[0]} holds values that are NaN or infinite ({len(broken)} such tensors).")
    return found, metadata


def _read_safetensors(path):
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}, metadata  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is no safetensors file, or is cut off ({reason}); fetch it again.") from error


def _read_torch(path):
    try:
        import torch  # an extra: nothing else needs it
    except ImportError as error:
        raise InputError(
            f"{path}: reading it needs torch (pip install 'jax_transfer[torch]'); a .safetensors file does not."
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not re.search(r"Unsupported (global|class)|not an allowed global", str(error)):
            raise InputError(f"{path}: is no torch checkpoint, or is cut off; fetch it again.") from error
        raise InputError(
            f"{path}: holds Python objects besides tensors, which could run code when loaded: refused. If you trust where it "
            "comes from, load it with torch yourself and save the state_dict alone, best as .safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"{path}: is no torch checkpoint, or is cut off; fetch it again.") from error
    container = next((c for c in CONTAINERS if isinstance(found, Mapping) and isinstance(found.get(c), Mapping)), None)
    found = found[container] if container else found
    tensors = found.items() if isinstance(found, Mapping) else ()
    return {str(name): value.float().numpy() for name, value in tensors if isinstance(value, torch.Tensor)}


def from_torch(state: Mapping[str, np.ndarray], net: Net, what: str) -> tuple[dict, dict, str]:
    """(params, stats, note): the weights of a torch state dict as a net's dictionaries, by name and strictly.

    Args:
      state: name -> array in torch's layout, as `read_state` gives it.
      net: the model they are for. A head for another number of classes, or of another kind, is left out; the
        net's initial one (seed 0) stands in for it, and the note says so. "" if there is nothing to say.
      what: how a message calls the file.

    Raises:
      InputError: if any other name or shape differs; it lists the first of them.
    """
    state = renamed(state)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    expected = {**trees.flatten({"params": params, "stats": stats})}
    head = ".".join(net.classifier)
    own_head = {name: value for name, value in state.items() if name == head or name.startswith(f"{head}.")}
    wanted = {_torch_name(name): (name, leaf) for name, leaf in expected.items()}
    fits = {name for name in own_head if name in wanted and own_head[name].shape == _torch_shape(*wanted[name])}
    note = ""
    if fits != {name for name in wanted if name.startswith(f"{head}.")} or len(fits) != len(own_head):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in own_head.items()) or "none"
        note = f"its classification head ({shapes}) is not one of {net.num_classes} classes and was left out"
        initial = trees.flatten(net.init(jax.random.key(0))[0])
        state = {name: value for name, value in state.items() if name not in own_head}
        for name, (ours, _) in wanted.items():
            if name.startswith(f"{head}."):
                state[name] = _to_torch_layout(ours, np.asarray(initial[ours.partition("/")[2]]))
    shapes = {name: jax.ShapeDtypeStruct(_torch_shape(*pair), jnp.float32) for name, pair in wanted.items()}
    found = {name: jax.ShapeDtypeStruct(value.shape, jnp.float32) for name, value in state.items()}
    if different := trees.difference(shapes, found, limit=6):
        raise InputError(f"{what} does not fit {net.name}: {different.replace(chr(10), '; ')}")
    ours = {name: jnp.asarray(_from_torch_layout(name, state[theirs])) for theirs, (name, _) in wanted.items()}
    tree = trees.unflatten(ours)
    return tree.get("params", {}), tree.get("stats", {}), note


def to_torch(params: dict, stats: dict) -> State:
    """name -> array in torch's layout and names; `from_torch` undoes it."""
    flat = jax.device_get(trees.flatten({"params": params, "stats": stats}))
    return {_torch_name(name): np.ascontiguousarray(_to_torch_layout(name, np.asarray(x))) for name, x in flat.items()}


def save_safetensors(path: pathlib.Path, params: dict, stats: dict, metadata: Mapping[str, str]) -> None:
    """Writes the weights with torch's names and layout, and words about them."""
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


def _torch_shape(name: str, leaf) -> tuple[int, ...]:
    return _to_torch_layout(name, np.broadcast_to(np.zeros(1, bool), leaf.shape)).shape


# --- files that name the same parts otherwise

# torchvision's ViT -> timm's, in this order.
TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def renamed(state: Mapping[str, np.ndarray]) -> State:
    """The state with the names that our models have, if it is of a library that calls the parts otherwise."""
    for is_of, names in RENAMINGS:
        if is_of in state:
            state = {name: state[name] for name in state}
            return dict(zip(names(list(state)), state.values(), strict=True))
    return dict(state)


def _torchvision_vit(names: list[str]) -> list[str]:
    for pattern, replacement in TORCHVISION_VIT:
        names = [re.sub(pattern, replacement, name) for name in names]
    return names


def _timm_mobilenet_v2(names: list[str]) -> list[str]:
    """timm's stages of blocks -> torchvision's one list: blocks.1.0.conv_dw -> features.2.conv.1.0."""
    blocks = sorted({tuple(map(int, m.groups())) for n in names if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", n))})
    place = {f"blocks.{i}.{j}.": f"features.{k}.conv." for k, (i, j) in enumerate(blocks, start=1)}
    expanded = {"conv_pw.": "0.0.", "bn1.": "0.1.", "conv_dw.": "1.0.", "bn2.": "1.1.", "conv_pwl.": "2.", "bn3.": "3."}
    plain = {"conv_dw.": "0.0.", "bn1.": "0.1.", "conv_pw.": "1.", "bn2.": "2."}
    last = len(blocks) + 1
    ends = {"conv_stem.": "features.0.0.", "bn1.": "features.0.1.", "conv_head.": f"features.{last}.0.",
            "bn2.": f"features.{last}.1.", "classifier.": "classifier.1."}  # fmt: skip

    def new(name):
        match = re.match(r"(blocks\.\d+\.\d+\.)(\w+\.)", name)
        if match:
            inner = expanded if f"{match[1]}conv_pwl.weight" in names else plain
            return place[match[1]] + inner[match[2]] + name[match.end() :]
        first = name.partition(".")[0] + "."
        return ends[first] + name.removeprefix(first) if first in ends else name

    return [new(name) for name in names]


# A name that only the files of one library have, and how its names become ours.
RENAMINGS = (
    ("encoder.layers.encoder_layer_0.ln_1.weight", _torchvision_vit),
    ("blocks.1.0.conv_pwl.weight", _timm_mobilenet_v2),
)
