"""Files of torch weights, read without running anything that they hold: .safetensors, and pickles of torch.

What training code saves beside the weights is of few kinds: options, counters, paths. Such objects load through torch's
allow-list, as stand-ins that keep what the file says and do nothing: not even NumPy's or pathlib's own code sees it.
"""

import pathlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import safetensors

from jax_transfer.records import InputError

# How the names of files of weights end: those that a folder is looked through for, and one more that is read when named.
ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".pt.tar", ".ckpt", ".bin")
ALSO_READ = (".tar",)
# For messages.
ENDINGS_TEXT = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
# What `torch.load` raises for a file that is none, or is damaged, besides pickle's own.
TORCH_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RecursionError, RuntimeError, TypeError, ValueError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
# Bytes that the compressed parts of an archive may unfold to: torch compresses the code of a TorchScript program.
COMPRESSED = 2**24
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # types in a .safetensors file
PART = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")  # of weights that are split over several files
UNREAD = re.compile(r"(^|\.)num_batches_tracked$")  # counters, of any type

# What a pickle may name besides tensors. All are inert here: see `Inert`.
INERT = {
    "argparse": ("Namespace",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "builtins": ("dict", "list", "tuple", "int", "float", "str", "bool"),  # what a defaultdict makes
}
NUMERIC = re.compile(r"[<>=|]?([fiu][1248]|b1|\?)")  # codes of NumPy's types of numbers


class Inert:
    """Stands for an object of a file: `arguments` and `state` are what the file gives it, and nothing is done with them."""

    def __new__(cls, *arguments):
        self = object.__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state

    def __reduce__(self):
        raise TypeError("a stand-in for an object of a file cannot be saved")


class _DefaultDict:
    """A `collections.defaultdict` without its factory: a plain dictionary, which alone torch fills."""

    def __new__(cls, *arguments):
        return {}


class _NoBytes:
    """`bytes()`, as which protocol 2 saves what is empty."""

    def __new__(cls, *arguments):
        return b""


def _named(module: str, name: str, base: type) -> type:
    """A class that torch's allow-list takes for `module.name`."""
    return type(name, (base,), {"__module__": module, "__qualname__": name})


ALLOWED = [_named(module, name, Inert) for module, names in INERT.items() for name in names]
ALLOWED += [_named("collections", "defaultdict", _DefaultDict), _named("builtins", "bytes", _NoBytes)]


def has_ending(path: pathlib.Path, endings: tuple[str, ...] = ENDINGS) -> bool:
    return path.name.lower().endswith(endings)


def read(path: pathlib.Path) -> object:
    """What a file holds: nested mappings and lists with arrays (of NumPy, JAX or torch). No code in it is run.

    Raises:
      InputError: if the file is missing, is no checkpoint, is cut off, holds code, or needs torch where there is none.
    """
    if PART.search(path.name):
        raise InputError(f"{path}: is part of a checkpoint that is split over several files; save it as one file.")
    if has_ending(path, (".safetensors",)):
        return _read_safetensors(path)
    if has_ending(path, (*ENDINGS, *ALSO_READ)):
        return _read_torch(_existing(path))
    raise InputError(f"{path}: expected a {ENDINGS_TEXT} file, or an epoch such as run/checkpoints/5.")


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a .safetensors file; only its header is read.

    Raises:
      InputError: if it is missing, is no such file, or is cut off.
    """
    return _with_safetensors(path, lambda file: file.metadata() or {})


def is_array(x: object) -> bool:
    return not getattr(x, "is_nested", False) and hasattr(x, "shape") and hasattr(x, "dtype")


def to_numpy(x, path: pathlib.Path, name: str) -> np.ndarray:
    """An array of a file as float32.

    Raises:
      InputError: if it is sparse, quantised or complex, of numbers of 8 bits, which are quantised weights without their
        scale, or repeats its numbers; it names the file and the array.
    """
    if re.fullmatch(r"(torch\.)?(u?int8|float8\w*|bool)", str(x.dtype)):
        raise InputError(f"{path}: {name} is of type {x.dtype}: quantised; save it as a dense float32 tensor.")
    if isinstance(x, np.ndarray) or not hasattr(x, "untyped_storage"):
        return np.asarray(x, np.float32)
    if not _is_dense(x):
        raise InputError(
            f"{path}: {name} is sparse or quantised, is complex, or repeats its numbers; save it as a "
            "dense float32 tensor."
        )
    return x.detach().resolve_neg().float().numpy()


def _read_safetensors(path):
    def take(file):
        names = [name for name in file.keys() if not UNREAD.search(name)]  # noqa: SIM118
        types = {name: file.get_slice(name).get_dtype() for name in names}
        if strange := [name for name in names if types[name] not in READABLE]:
            raise InputError(f"{path}: {strange[0]} is of type {types[strange[0]]}; save it as float32 or float16.")
        return {name: file.get_tensor(name) for name in names}

    return _with_safetensors(path, take)


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
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # kept here: what matters of them is said below
            found = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(found, {})
    except pickle.UnpicklingError as error:
        protocol = re.search(r"Detected pickle protocol ([3-5])", " ".join(str(warning.message) for warning in warned))
        if protocol and "Unsupported operand" in str(error):
            raise InputError(
                f"{path}: is saved with pickle protocol {protocol[1]}, which torch reads only by running code: refused. "
                "If you trust where it comes from, load it with torch and save its state_dict() with the default protocol."
            ) from error
        objects = re.search(
            r"(?:Unsupported (?:global|class)|unsupported GLOBAL|not an allowed global)[^\n]*", str(error)
        )
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


def _plain(x, seen: dict):
    """What torch loaded as mappings, lists, arrays and plain values; NumPy's arrays and Namespaces are unfolded.

    seen: what is unfolded already, by id: a pickle may hold itself, or one thing any number of times.
    """
    if id(x) in seen:
        return seen[id(x)][1]
    if isinstance(x, Mapping):
        new: object = {}
        seen[id(x)] = (x, new)
        new.update((str(key), _plain(value, seen)) for key, value in x.items() if isinstance(key, str | int))
    elif isinstance(x, list | tuple) and not is_array(x):
        new = []
        seen[id(x)] = (x, new)
        new.extend(_plain(value, seen) for value in x)
    elif isinstance(x, Inert):
        new = _plain(x.state, seen) if isinstance(x.state, Mapping) else _array(x)
    else:
        return x
    seen[id(x)] = (x, new)
    return new


def _array(x: Inert) -> np.ndarray | None:
    """A NumPy array of numbers that a pickle describes; None for anything else.

    It is made from its type's code, its shape and its bytes: NumPy's own restoring believes what a file says of a type,
    and would take bytes for addresses of objects.
    """
    if type(x).__name__ != "_reconstruct" or not isinstance(x.state, tuple) or len(x.state) != 5:
        return None
    _, shape, kind, by_columns, data = x.state
    code, order = _code(kind)
    if not NUMERIC.fullmatch(code) or not isinstance(data, bytes):
        return None
    values = np.frombuffer(data, np.dtype(code).newbyteorder(order))
    return values.reshape(shape, order="F" if by_columns else "C")


def _code(kind) -> tuple[str, str]:
    """The code and the byte order of a NumPy type in a pickle; ("", "=") if it is none of numbers."""
    arguments, state = (kind.arguments, kind.state) if isinstance(kind, Inert) else ((), None)
    code = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    return code, order if order in ("<", ">", "=", "|") else "="


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


def _is_dense(x) -> bool:
    """Whether a tensor has a number in memory for each of its own: a small file can claim more by strides of 0."""
    if str(x.layout) != "torch.strided" or x.is_quantized or x.is_complex() or x.device.type != "cpu":
        return False
    return x.numel() * x.element_size() <= x.untyped_storage().nbytes()
