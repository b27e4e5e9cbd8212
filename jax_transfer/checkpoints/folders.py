"""Lists the checkpoints at a path: epochs of a trajectory, files in a folder, snapshots in the cache of a hub."""

import os
import pathlib
import re

from jax_transfer.checkpoints.descriptions import is_nameless
from jax_transfer.checkpoints.torch_files import ENDINGS, ENDINGS_TEXT, PART, has_ending
from jax_transfer.records import InputError, printable

# Files that training code saves beside weights, with the same extensions.
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state)[\w-]*\.")


def expand(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints at a path.

    - A trajectory's folder gives its epochs, in ascending order.
    - Any other folder gives its files of weights (torch_files.ENDINGS), sorted by name. A model.safetensors that is
      also saved in other formats counts once.
    - A repository in a hub's cache gives the files of its snapshots.
    - A file, or an epoch, gives itself.

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
    """Returns the files of weights in a folder, sorted by name; of a model saved in several formats, only one."""
    files = sorted(p for p in folder.iterdir() if has_ending(p) and not NO_WEIGHTS.match(p.name))
    nameless = sorted((p for p in files if is_nameless(p)), key=_ending_index)
    return [p for p in files if p not in nameless[1:]]


def _ending_index(path: pathlib.Path) -> int:
    return next(i for i, ending in enumerate(ENDINGS) if path.name.lower().endswith(ending))


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the path with `~` replaced by the home folder."""
    return pathlib.Path(os.path.expanduser(path))  # unlike Path.expanduser, it does not raise for an unknown ~user


def only_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the only file of weights in a folder; the folder itself, which the caller rejects, if there is none.

    Raises:
      InputError: if there are several.
    """
    try:
        files = [file for file in expand(folder) if file != folder and not is_epoch(file)]
    except InputError:  # the caller's error names the folder
        return folder
    if len(files) > 1 and not all(PART.search(file.name) for file in files):  # parts have an error of their own
        raise InputError(f"{folder}: holds {len(files)} checkpoints; name one, such as {files[0]}.")
    return files[0] if files else folder


def is_epoch(path: pathlib.Path) -> bool:
    """Returns whether a path is an epoch of a trajectory."""
    return path.name.isdecimal() and (path / "model").is_dir()
