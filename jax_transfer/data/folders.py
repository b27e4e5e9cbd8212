"""Finds the images of class folders."""

import logging
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jax_transfer.data.subsets import stratified_split
from jax_transfer.data.transforms import decode_file
from jax_transfer.records import InputError, printable

logger = logging.getLogger(__name__)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
TEST_FOLDERS = ("test", "val", "validation")  # the first one there is the test split


def find_images(root: pathlib.Path, split: str) -> tuple[tuple[str, ...], list[pathlib.Path], np.ndarray]:
    """(class names, paths, labels int32 [n]) of a split of the images below `root`.

    Layouts: `train/<class>/...` and `test/<class>/...` (or `val`, `validation`; folders beside them are not read);
    without a test folder, or with `<class>/...` right below `root`, a fifth of each class is the test split: the same
    images on every call. Classes are sorted by name and those of train; images may lie in folders below their class.
    Names that start with a dot are not read; files that are no images are counted in a warning.

    Raises:
      InputError: for a folder that is missing or has no class folders, a class without images, a class of test that
        train lacks, and links that leave `root`; each names the path.
    """
    if not root.is_dir():
        raise InputError(f"folder:{root}: {'not a folder' if root.exists() else 'no such folder'}.")
    train, test = _split_folders(root)
    for folder in {train, test} - {root, None}:
        _check_link(folder, root.resolve())
    class_names = tuple(folder.name for folder in _class_folders(train))
    if split == "test" and test is not None:
        extra = sorted({folder.name for folder in _class_folders(test)} - set(class_names))
        if extra:
            raise InputError(
                f"{test / extra[0]}: class {extra[0]!r} is not in {train}; train needs every class of test."
            )
    folder = test if split == "test" and test is not None else train
    paths, labels = _images_of_classes(folder, class_names, root)
    if test is not None:
        return class_names, paths, labels
    chosen = stratified_split(labels)[("train", "test").index(split)]
    if len(chosen) == 0:
        raise InputError(f"{train}: no class has 2 images, so none are left to test on; add images or a test folder.")
    return class_names, [paths[i] for i in chosen], labels[chosen]


def leave_out_damaged(
    root: pathlib.Path,
    split: str,
    class_names: Sequence[str],
    paths: list[pathlib.Path],
    labels: np.ndarray,
    threads: int,
) -> tuple[list[pathlib.Path], np.ndarray]:
    """The (paths, labels) whose files decode; a warning counts and names the others.

    Raises:
      InputError: if a class would be left without images to train on, or none at all to test on.
    """
    with ThreadPoolExecutor(threads) as pool:
        problems = list(pool.map(_problem, paths))
    good = np.array([problem is None for problem in problems])
    if not good.all():
        named = "\n  ".join(problem for problem in problems if problem)
        count = (~good).sum()
        logger.warning(
            "%d of %d images in %s are damaged and left out:\n  %s", count, len(good), printable(root), named
        )
    lost = sorted(set(labels) - set(labels[good]))
    if lost and (split == "train" or not good.any()):
        raise InputError(
            f"{root}: all images of class {class_names[lost[0]]!r} in the {split} split are damaged; replace them."
        )
    return [path for path, is_good in zip(paths, good, strict=True) if is_good], labels[good]


def _problem(path: pathlib.Path) -> str | None:
    try:
        decode_file(path)
    except InputError as error:
        return str(error)
    return None


def _split_folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """(train, test or None). A folder `train` that holds images itself and stands alone is a class of that name."""
    train = root / "train"
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if train.is_dir() and (test is not None or _subfolders(train)):
        return train, test
    if test is not None and _subfolders(test):
        raise InputError(f"{root}: has {test.name}/ but no train/; add train/ with the same class folders.")
    return root, None


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    broken = {path for path in entries if path.is_symlink() and not path.exists()}  # `_files` raises for them
    return [path for path in entries if (path.is_dir() or path in broken) and not path.name.startswith(".")]


def _class_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    classes = _subfolders(folder)
    if not classes:
        raise InputError(f"{folder}: no class folders; expected one folder of images per class.")
    return classes


def _images_of_classes(folder, class_names, root) -> tuple[list[pathlib.Path], np.ndarray]:
    paths, labels, others = [], [], Counter()
    for class_folder in _class_folders(folder):
        files = list(_files(class_folder, root.resolve(), set()))
        images = [path for path in files if path.suffix.lower() in EXTENSIONS]
        if not images:
            raise InputError(f"{class_folder}: no images in this class; expected {', '.join(sorted(EXTENSIONS))}.")
        others.update(path.suffix.lower() or "no extension" for path in files if path.suffix.lower() not in EXTENSIONS)
        paths += images
        labels += [class_names.index(class_folder.name)] * len(images)
    if others:
        kinds = printable(", ".join(sorted(others)))
        logger.warning("%s: %d files are no images and are not read (%s).", printable(folder), others.total(), kinds)
    return paths, np.asarray(labels, dtype=np.int32)


def _files(folder: pathlib.Path, resolved_root: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """All visible files below `folder`, sorted in each folder; none of `seen`, which it adds to, is read again.

    Links between a few folders could otherwise make endlessly many paths.
    """
    _check_link(folder, resolved_root)
    if folder.resolve() in seen:
        raise InputError(
            f"{folder}: leads to {folder.resolve()}, whose images are in this class already; remove the link."
        )
    seen.add(folder.resolve())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = pathlib.Path(entry.path)
        if entry.name.startswith("."):
            continue
        _check_link(path, resolved_root)
        if entry.is_dir():
            yield from _files(path, resolved_root, seen)
        else:
            yield path


def _check_link(path: pathlib.Path, resolved_root: pathlib.Path) -> None:
    """A link may point to files and folders below the root, except to a folder it lies in."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: a link to nothing ({os.readlink(path)}); repair or remove it.") from error
    if not target.is_relative_to(resolved_root):
        raise InputError(f"{path}: a link that leaves {resolved_root}; replace it by a copy of {target}.")
    if path.parent.resolve().is_relative_to(target):
        raise InputError(f"{path}: a link to a folder it lies in; remove it.")
