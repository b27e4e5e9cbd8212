"""Reads files of torch weights, .safetensors and torch pickles, without running any code in them.

Besides weights, training scripts save only a few kinds of objects, such as options, counters and paths. These are
loaded through torch's allow-list as inert stand-ins, which only keep what the file says about the objects: not even
code of NumPy or pathlib runs on them.
"""

import pathlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from jax_transfer.records import InputError

# Extensions of files of weights: those that are listed in a folder, and one that is read only if the file is named.
ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".pt.tar", ".ckpt", ".bin")
ALSO_READ = (".tar",)
# For messages.
ENDINGS_TEXT = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
# Errors that `torch.load` raises for a file that is damaged or not a checkpoint, in addition to those of pickle.
TORCH_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RecursionError, RuntimeError, TypeError, ValueError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
# Number of bytes by which an archive may expand: torch compresses only the code of a TorchScript program.
COMPRESSED = 2**24
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # dtypes in a .safetensors file
PART = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")  # names of the files of a checkpoint that is split
UNREAD = re.compile(r"(^|\.)num_batches_tracked$")  # counters of any dtype, which are not read

# Classes that a pickle may name besides tensors. All become `Inert`.
INERT = {
    "argparse": ("Namespace",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "builtins": ("dict", "list", "tuple", "int", "float", "str", "bool"),  # the types of a defaultdict's values
}
NUMERIC = re.compile(r"[<>=|]?([fiu][1248]|b1|\?)")  # codes of NumPy's numeric dtypes


class Inert:
    """A stand-in for an object of a file: it keeps its `arguments` and `state`, and does nothing with them."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments):
        self: Any = object.__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state

    def __reduce__(self):
        raise TypeError("a stand-in for an object of a file cannot be saved")


class _DefaultDict:
    """Replaces `collections.defaultdict` by a plain dictionary, the only mapping that torch fills."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments):
        return {}


class _NoBytes:
    """Replaces the call `bytes()`, which pickle protocol 2 writes for an empty byte string."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments):
        return b""


def _named(module: str, name: str, base: type) -> type:
    """Returns a subclass of `base` that torch's allow-list accepts as `module.name`."""
    return type(name, (base,), {"__module__": module, "__qualname__": name})


ALLOWED = [_named(module, name, Inert) for module, names in INERT.items() for name in names]
ALLOWED += [_named("collections", "defaultdict", _DefaultDict), _named("builtins", "bytes", _NoBytes)]


def has_ending(path: pathlib.Path, endings: tuple[str, ...] = ENDINGS) -> bool:
    """Returns whether a file has one of these extensions; case is ignored."""
    return path.name.lower().endswith(endings)


def read(path: pathlib.Path) -> object:
    """Reads a file of weights as nested mappings and lists of NumPy, JAX or torch arrays. No code in it is run.

    Raises:
      InputError: if the file is missing, truncated or not a checkpoint, holds code, or needs torch, which is not
        installed.
    """
    if PART.search(path.name):
        raise InputError(f"{path}: is part of a checkpoint that is split over several files; save it as one file.")
    if has_ending(path, (".safetensors",)):
        return _read_safetensors(path)
    if has_ending(path, (*ENDINGS, *ALSO_READ)):
        return _read_torch(_existing(path))
    raise InputError(f"{path}: expected a {ENDINGS_TEXT} file, or an epoch such as run/checkpoints/5.")


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Reads the metadata of a .safetensors file; only its header is read.

    Raises:
      InputError: if the file is missing, truncated or not a safetensors file.

    >>> import tempfile
    >>> import safetensors.numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "a.safetensors"
    ...     safetensors.numpy.save_file({"weight": np.zeros(2, np.float32)}, path, metadata={"format": "pt"})
    ...     read_metadata(path), list(read(path))
    ({'format': 'pt'}, ['weight'])
    """
    return _with_safetensors(path, lambda file: file.metadata() or {})


def is_array(x: object) -> bool:
    """Returns whether an object is an array of NumPy, JAX or torch, and not a nested tensor."""
    return not getattr(x, "is_nested", False) and hasattr(x, "shape") and hasattr(x, "dtype")


def to_numpy(x, path: pathlib.Path, name: str) -> np.ndarray:
    """Converts an array of a file to float32.

    Raises:
      InputError: if it is sparse, quantised or complex, has 8-bit numbers (quantised weights without their scale), or
        overlaps itself in memory; the message names the file and the array.
    """
    if re.fullmatch(r"(torch\.)?(u?int8|float8\w*|bool)", str(x.dtype)):
        raise InputError(f"{path}: {name} is quantised ({x.dtype}); save it as a dense float32 tensor.")
    if isinstance(x, np.ndarray) or not hasattr(x, "untyped_storage"):
        return np.asarray(x, np.float32)
    if not _is_dense(x):
        raise InputError(
            f"{path}: {name} is sparse, quantised or complex, or overlaps itself in memory; save it as a dense float32 "
            "tensor."
        )
    return x.detach().resolve_neg().float().numpy()


def _read_safetensors(path):
    """Reads the arrays of a .safetensors file: name -> array."""

    def read_arrays(file):
        names = [name for name in file.keys() if not UNREAD.search(name)]  # noqa: SIM118
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
        if unsupported := [name for name in names if dtypes[name] not in READABLE]:
            first = unsupported[0]
            raise InputError(f"{path}: {first} has dtype {dtypes[first]}; save it as float32 or float16.")
        return {name: file.get_tensor(name) for name in names}

    return _with_safetensors(path, read_arrays)


def _with_safetensors(path, use):
    """Opens a .safetensors file and returns `use(file)`.

    Raises:
      InputError: if the file cannot be read.
    """
    try:
        with safetensors.safe_open(_existing(path), framework="flax") as file:  # NumPy alone has no bfloat16
            return use(file)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is not a safetensors file or is truncated ({reason}); download it again.") from error


def _existing(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a file that exists and can be opened.

    Raises:
      InputError: if the file does not exist or cannot be opened.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such checkpoint file.")
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}).") from error
    return path


def _read_torch(path):
    """Reads a torch pickle with torch's restricted unpickler, and with `Inert` for all allowed objects but tensors."""
    try:
        import torch  # an optional dependency, needed here only
    except ImportError as error:
        raise InputError(
            f"{path}: reading it needs torch (pip install 'jax_transfer[torch]'); a .safetensors file does not."
        ) from error
    advice = "If you trust its source, load it with torch and save its state_dict() alone, preferably as .safetensors."
    _check_not_compressed(path)
    allowed: list[Any] = list(ALLOWED)
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # recorded, since an error message below needs one of them
            contents = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(contents, {})
    except pickle.UnpicklingError as error:
        protocol = re.search(r"Detected pickle protocol ([3-5])", " ".join(str(warning.message) for warning in warned))
        if protocol and "Unsupported operand" in str(error):
            raise InputError(
                f"{path}: is saved with pickle protocol {protocol[1]}, which torch reads only by running code: "
                "refused. If you trust its source, load it with torch and save its state_dict() with the default "
                "protocol."
            ) from error
        objects = re.search(
            r"(?:Unsupported (?:global|class)|unsupported GLOBAL|not an allowed global)[^\n]*", str(error)
        )
        if not objects:
            raise InputError(f"{path}: is not a torch checkpoint or is truncated; download it again.") from error
        class_name = re.search(r"GLOBAL ([\w.]+)", objects[0])
        kind = f" ({class_name[1]})" if class_name else ""
        raise InputError(
            f"{path}: holds Python objects besides tensors{kind}, which could run code when loaded: refused. {advice}"
        ) from error
    except TORCH_ERRORS as error:
        if "TorchScript" in str(error):
            raise InputError(f"{path}: is a TorchScript program, not a checkpoint: refused. {advice}") from error
        raise InputError(f"{path}: is not a torch checkpoint or is truncated; download it again.") from error


def _plain(x, seen: dict):
    """Converts the contents of a pickle to mappings, lists, arrays and plain values.

    NumPy arrays and Namespaces are rebuilt from their `Inert` objects.

    Args:
      x: an object that torch loaded.
      seen: id -> (object, its conversion). An object in a pickle may contain itself, or occur many times.
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
    """Rebuilds a numeric NumPy array from a pickle; returns None for any other object.

    The array is made from its dtype code, shape and bytes. NumPy's own unpickling trusts the dtype in the file and
    could interpret bytes as addresses of objects.
    """
    if type(x).__name__ != "_reconstruct" or not isinstance(x.state, tuple) or len(x.state) != 5:
        return None
    _, shape, dtype, is_fortran, data = x.state
    code, order = _dtype_code(dtype)
    if not NUMERIC.fullmatch(code) or not isinstance(data, bytes):
        return None
    values = np.frombuffer(data, np.dtype(code).newbyteorder(order))
    return values.reshape(shape, order="F" if is_fortran else "C")


def _dtype_code(dtype) -> tuple[str, Any]:
    """Returns the code and the byte order of a NumPy dtype in a pickle; ("", "=") if it has no code."""
    arguments, state = (dtype.arguments, dtype.state) if isinstance(dtype, Inert) else ((), None)
    code = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    return code, order if order in ("<", ">", "=", "|") else "="


def _check_not_compressed(path) -> None:
    """Checks that an archive does not expand to much more than its size: torch does not compress weights.

    Raises:
      InputError: if it does, since it might not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, LookupError, struct.error):
        return  # a file in the older format, or a damaged one, which torch will report
    claimed = sum(entry.file_size for entry in entries)
    if claimed > path.stat().st_size + COMPRESSED:
        raise InputError(
            f"{path}: is an archive that expands to {claimed:,} bytes, which is too much for a torch file: refused."
        )


def _is_dense(x) -> bool:
    """Returns whether a tensor has memory for each of its elements: with strides of 0, it can claim to have more."""
    if str(x.layout) != "torch.strided" or x.is_quantized or x.is_complex() or x.device.type != "cpu":
        return False
    return x.numel() * x.element_size() <= x.untyped_storage().nbytes()
