"""Weights of torch models in .safetensors, .pth and .pt files, from and to our dictionaries, by names.

Our parameters have the names of the released torch checkpoints, with "/" for "." and another word for the last part, so
that one rule serves every model (`_torch_name`). Files that call the same parts otherwise are renamed: see `renamings`.
"""

import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from jax_transfer import trees
from jax_transfer.models import renamings
from jax_transfer.models.net import Net, with_new_head
from jax_transfer.models.renamings import State
from jax_transfer.records import InputError

ENDINGS = (".safetensors", ".pth", ".pt")  # of files of weights, when a folder is looked through
ALSO_READ = (".bin", ".tar")  # when named
# Our last part of a name -> torch's, for parameters that are matrices or kernels, and for the rest.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Where training code keeps the weights among other things; averaged ones first, as timm does.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
# In front of every name, put there by wrappers.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# In front of the names of the network that gives features, beside others that are not wanted: of MoCo the query encoder.
CONTRASTIVE = ("encoder_q.", "base_encoder.")
ENCODERS = (*CONTRASTIVE, "backbone.")
# Not weights of the network that gives features: counters, and heads used in training alone.
IGNORED = re.compile(r"(^|\.)num_batches_tracked$|^(AuxLogits|aux1|aux2|aux_head)\.|^mask_token$")
# What `torch.load` raises for a file that is none, or is damaged, besides pickle's own.
TORCH_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
# Bytes that the compressed parts of an archive may unfold to: torch compresses the code of a TorchScript program.
COMPRESSED = 2**24
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # types in a .safetensors file


class File(NamedTuple):
    """What a file holds.

    state: name -> float32 array, without wrappers' prefixes and what is no weight. metadata: of .safetensors, else {}.
    contrastive: it is of a contrastive method, whose head classifies nothing.
    """

    state: State
    metadata: dict[str, str]
    contrastive: bool


def read_state(path: pathlib.Path) -> File:
    """Reads the weights of a file. No code in it is run.

    Raises:
      InputError: if the file is missing, is no checkpoint, is cut off, holds code, or needs torch where there is none.
    """
    if path.suffix == ".safetensors":
        metadata, state = read_metadata(path), _read_safetensors(path)
    elif path.suffix in (*ENDINGS, *ALSO_READ):
        metadata, state = {}, _read_torch(_existing(path))
    else:
        raise InputError(f"{path}: expected a .safetensors, .pth or .pt file, or an epoch such as run/checkpoints/5.")
    names = {name: name for name in state}
    while wrapper := next((w for w in WRAPPERS if names and all(n.startswith(w) for n in names.values())), None):
        names = {full: name.removeprefix(wrapper) for full, name in names.items()}
    encoder = next((e for e in ENCODERS if any(name.startswith(e) for name in names.values())), "")
    names = {full: name.removeprefix(encoder) for full, name in names.items() if name.startswith(encoder)}
    found = {name: np.asarray(state[full], np.float32) for full, name in names.items() if not IGNORED.search(name)}
    if not found:
        raise InputError(f"{path}: holds no weights.")
    if broken := [name for name, value in found.items() if not np.isfinite(value).all()]:
        raise InputError(f"{path}: {broken[0]} holds values that are NaN or infinite ({len(broken)} such tensors).")
    return File(found, metadata, encoder in CONTRASTIVE)


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a .safetensors file; only its header is read.

    Raises:
      InputError: if it is missing, is no such file, or is cut off.
    """
    return _with_safetensors(path, lambda file: file.metadata() or {})


def _read_safetensors(path):
    def read(file):
        names = [name for name in file.keys() if not IGNORED.search(name)]  # noqa: SIM118
        types = {name: file.get_slice(name).get_dtype() for name in names}
        if strange := [name for name in names if types[name] not in READABLE]:
            raise InputError(f"{path}: {strange[0]} is of type {types[strange[0]]}; save it as float32 or float16.")
        return {name: file.get_tensor(name) for name in names}

    return _with_safetensors(path, read)


def _with_safetensors(path, use):
    try:
        with safetensors.safe_open(_existing(path), framework="flax") as file:  # numpy alone knows no bfloat16
            return use(file)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is no safetensors file, or is cut off ({reason}); fetch it again.") from error


def _existing(path: pathlib.Path) -> pathlib.Path:
    try:
        if not path.is_file():
            raise InputError(f"{path}: there is no such checkpoint file.")
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}).") from error
    return path


def _read_torch(path):
    try:
        import torch  # an extra: nothing else needs it
    except ImportError as error:
        raise InputError(
            f"{path}: reading it needs torch (pip install 'jax_transfer[torch]'); a .safetensors file does not."
        ) from error
    advice = (
        "If you trust where it comes from, load it with torch and save its state_dict() alone, best as .safetensors."
    )
    _check_not_compressed(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = re.search(r"(?:Unsupported (?:global|class)|not an allowed global)[^\n]*", str(error))
        if not objects:
            raise InputError(f"{path}: is no torch checkpoint, or is cut off; fetch it again.") from error
        named = re.search(r"GLOBAL ([\w.]+)", objects[0])
        kind = f" ({named[1]})" if named else ""
        raise InputError(
            f"{path}: holds Python objects besides tensors{kind}, which could run code when loaded: refused. {advice}"
        ) from error
    except TORCH_ERRORS as error:
        if "TorchScript" in str(error):
            raise InputError(f"{path}: is a TorchScript program, not a checkpoint: refused. {advice}") from error
        raise InputError(f"{path}: is no torch checkpoint, or is cut off; fetch it again.") from error
    container = next((c for c in CONTAINERS if isinstance(found, Mapping) and isinstance(found.get(c), Mapping)), None)
    found = found[container] if container else found
    items = found.items() if isinstance(found, Mapping) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, torch.Tensor)}
    if strange := [name for name, x in tensors.items() if not _is_dense(x, torch)]:
        raise InputError(
            f"{path}: {strange[0]} is sparse or quantised, is complex, or repeats its numbers; save it as a "
            "dense float32 tensor."
        )
    return {name: value.detach().resolve_neg().float().numpy() for name, value in tensors.items()}


def _check_not_compressed(path) -> None:
    """torch does not compress weights; what is compressed may unfold to more than the memory holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, LookupError, struct.error):
        return  # of the older format, or damaged, as torch will say
    claimed = sum(entry.file_size for entry in entries)
    if claimed > path.stat().st_size + COMPRESSED:
        raise InputError(
            f"{path}: is an archive that unfolds to {claimed:,} bytes, which torch does not write: refused."
        )


def _is_dense(x, torch) -> bool:
    """Whether a tensor has a number in memory for each of its own: a small file can claim more by strides of 0."""
    if x.layout != torch.strided or x.is_quantized or x.is_complex() or x.device.type != "cpu":
        return False
    return x.numel() * x.element_size() <= x.untyped_storage().nbytes()


def from_torch(
    state: Mapping[str, np.ndarray], net: Net, what: str, contrastive: bool = False
) -> tuple[dict, dict, str]:
    """(params, stats, note): the weights of a torch state dict as a net's dictionaries, by name and strictly.

    Args:
      state: name -> array in torch's layout, as `read_state` gives it.
      net: the model they are for. A head for another number of classes, or of another kind, is left out; a new one
        (seed 0) stands in for it, and the note says so. "" if there is nothing to say.
      what: how a message calls the file.
      contrastive: leave the head out in any case, for it was trained to tell images apart, not classes.

    Raises:
      InputError: if any other name or shape differs; it lists the first of each kind.
    """
    state = renamings.to_ours(state, what)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    wanted = {
        _torch_name(name): (name, leaf) for name, leaf in trees.flatten({"params": params, "stats": stats}).items()
    }
    shapes = {name: _torch_shape(*pair) for name, pair in wanted.items()}
    head = ".".join(net.classifier) + "."
    own = {name: value.shape for name, value in state.items() if name.startswith(head)}
    note = ""
    if contrastive or own != {name: shape for name, shape in shapes.items() if name.startswith(head)}:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in own.items())
        reason = "is a contrastive loss's" if contrastive else f"is not one of {net.num_classes} classes"
        note = f"its head ({listed}) {reason} and was left out" if own else "it holds no head"
        state = {name: value for name, value in state.items() if name not in own}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(head)}
    expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {n.replace("/", ":"): jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in state.items()}
    if different := trees.difference(expected, found, limit=10**6):
        raise InputError(f"{what} does not fit {net.name}: {_shortened(different.splitlines())}")
    ours = {wanted[name][0]: jnp.asarray(_from_torch_layout(wanted[name][0], state[name])) for name in shapes}
    tree = trees.unflatten(ours)
    params = tree.get("params", {})
    return with_new_head(params, net, jax.random.key(0)) if note else params, tree.get("stats", {}), note


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


def _torch_shape(name: str, leaf) -> tuple[int, ...]:
    return _to_torch_layout(name, np.broadcast_to(np.zeros(1, bool), leaf.shape)).shape
