"""Which checkpoints a path stands for: epochs of a trajectory, files in a folder, snapshots in the cache of a hub."""

import os
import pathlib
import re

from jax_transfer.checkpoints.descriptions import is_nameless
from jax_transfer.checkpoints.torch_files import ENDINGS, ENDINGS_TEXT, PART, has_ending
from jax_transfer.records import InputError, printable

# What training code saves beside weights under one of their endings.
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state)[\w-]*\.")


def expand(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that a path stands for: the epochs of a trajectory's folder, ascending; the files of weights
    (torch_files.ENDINGS) of another folder, by name; or the file itself.

    A folder with a model.safetensors, such as a snapshot of a hub, is one checkpoint, whatever forms it is saved in. A
    repository in a hub's cache stands for its snapshots.
    """
    path = expanded(path)
    if os.path.isdir(path) and not (path.name.isdecimal() and not _files(path)):
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        epochs = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name))
        snapshots = [p for p in (folder / "snapshots").glob("*") if p.is_dir()] if folder.name[:8] == "models--" else []
        files = [file for place in (sorted(snapshots) or [folder]) for file in _files(place)]
        if not epochs and not files:
            raise InputError(
                f"{printable(path)}: holds no checkpoints; expected folders named by epochs, such as "
                f"{printable(path / '5')}, or {ENDINGS_TEXT} files."
            )
        return epochs or files
    return [path]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights in a folder, by name; one of those that are the same weights in several forms."""
    files = sorted(p for p in folder.iterdir() if has_ending(p) and not NO_WEIGHTS.match(p.name))
    nameless = sorted((p for p in files if is_nameless(p)), key=_by_ending)
    return [p for p in files if p not in nameless[1:]]


def _by_ending(path: pathlib.Path) -> int:
    return next(i for i, ending in enumerate(ENDINGS) if path.name.lower().endswith(ending))


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(path))  # unlike Path.expanduser, it leaves ~nobody as it is


def only_file(folder: pathlib.Path) -> pathlib.Path:
    """The one file of weights in a folder that is no epoch, or the folder itself, which will be refused."""
    try:
        files = [file for file in expand(folder) if file != folder and not is_epoch(file)]
    except InputError:  # the folder is named in what is said then
        return folder
    if len(files) > 1 and not all(PART.search(file.name) for file in files):  # parts are refused as such
        raise InputError(f"{folder}: holds {len(files)} checkpoints; name one, such as {files[0]}.")
    return files[0] if files else folder


def is_epoch(path: pathlib.Path) -> bool:
    return path.name.isdecimal() and (path / "model").is_dir()
