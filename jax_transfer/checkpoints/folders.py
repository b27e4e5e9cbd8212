"""Lists the checkpoints at a path: epochs of a trajectory, files in a folder, snapshots in the cache of a hub."""

import os
import pathlib
import re

from jax_transfer.checkpoints.descriptions import is_nameless
from jax_transfer.checkpoints.torch_files import ENDINGS, ENDINGS_TEXT, PART, has_ending
from jax_transfer.records import InputError, printable

# Files that training scripts save beside the weights, with the same extensions.
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state)[\w-]*\.")


def expand(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints at a path.

    - For the folder of a trajectory: its epochs, in ascending order.
    - For a repository in a hub's cache: the files of its snapshots.
    - For any other folder: its files of weights (torch_files.ENDINGS), sorted by name. If a model.safetensors is also
      saved in other formats, only one of these files is listed.
    - For a file or an epoch: the path itself.

    Raises:
      InputError: if a folder has no checkpoints.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.safetensors", "a.pth", "notes.txt"):
    ...         (pathlib.Path(folder) / name).touch()
    ...     [path.name for path in expand(folder)]
    ['a.pth', 'b.safetensors']
    """
    path = expanded(path)
    if os.path.isdir(path) and not (path.name.isdecimal() and not _files(path)):
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        epochs = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name))
        snapshots = [p for p in (folder / "snapshots").glob("*") if p.is_dir()] if folder.name[:8] == "models--" else []
        files = [file for parent in (sorted(snapshots) or [folder]) for file in _files(parent)]
        if not epochs and not files:
            raise InputError(
                f"{printable(path)}: holds no checkpoints; expected folders named after epochs, such as "
                f"{printable(path / '5')}, or {ENDINGS_TEXT} files."
            )
        return epochs or files
    return [path]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of weights in a folder, sorted by name; only one if a model is saved in several formats."""
    files = sorted(p for p in folder.iterdir() if has_ending(p) and not NO_WEIGHTS.match(p.name))
    nameless = sorted((p for p in files if is_nameless(p)), key=_ending_index)
    return [p for p in files if p not in nameless[1:]]


def _ending_index(path: pathlib.Path) -> int:
    return next(i for i, ending in enumerate(ENDINGS) if path.name.lower().endswith(ending))


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the path with `~` replaced by the home folder."""
    return pathlib.Path(os.path.expanduser(path))  # unlike Path.expanduser, it does not raise for an unknown ~user


def only_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the only file of weights in a folder or, if there is none, the folder itself, which the caller rejects.

    Raises:
      InputError: if there are several files of weights.
    """
    try:
        files = [file for file in expand(folder) if file != folder and not is_epoch(file)]
    except InputError:  # the caller's error names the folder
        return folder
    if len(files) > 1 and not all(PART.search(file.name) for file in files):  # the error on parts is raised later
        raise InputError(f"{folder}: holds {len(files)} checkpoints; name one, such as {files[0]}.")
    return files[0] if files else folder


def is_epoch(path: pathlib.Path) -> bool:
    """Returns whether a path is an epoch of a trajectory."""
    return path.name.isdecimal() and (path / "model").is_dir()
