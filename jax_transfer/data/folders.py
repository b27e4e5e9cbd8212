"""Finds the images of class folders and their splits."""

import dataclasses
import itertools
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jax_transfer.data import layout
from jax_transfer.data.source import WHOLE
from jax_transfer.data.subsets import stratified_split
from jax_transfer.records import InputError

Split = tuple[tuple[pathlib.Path, ...], np.ndarray]  # paths, labels int32 [n]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images below a folder.

    Attributes:
      root: the folder.
      class_names: names of the classes, sorted.
      splits: "train" and "test", or WHOLE -> (paths, labels int32 [n]).
      notes: sentences on what readers of the results should know about the folder.
      notes_on_splits: the same on how the images were assigned to the splits.
    """

    root: pathlib.Path
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...]
    notes_on_splits: tuple[str, ...]

    @property
    def whole(self) -> "Folder":
        """The same images in a single split, WHOLE, with no notes on other splits."""
        paths, labels = zip(*self.splits.values(), strict=True)
        whole = tuple(itertools.chain(*paths)), np.concatenate(labels)
        return dataclasses.replace(self, splits={WHOLE: whole}, notes_on_splits=())


def find_images(root: pathlib.Path) -> Folder:
    """Finds all images below `root`, with their classes and splits.

    The layout is `train/<class>/...` and `test/<class>/...`, or the other split names that `layout.find_splits`
    accepts. If there is no test folder, or `<class>/...` is directly below `root`, a fifth of each class is used as the
    test split; it is the same on every call. The classes are those of the training split, sorted by name after Unicode
    normalisation. Images may lie in folders below their class folder. Links are followed. System folders and hidden
    files are ignored; a note gives the number of files with other extensions.

    Raises:
      InputError: if the folder is missing or has no class folders, its folders do not seem to be classes, a class has
        no images, the training split lacks a class of the test split, or a link is broken or cyclic; the message names
        the path.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         (pathlib.Path(folder) / name).mkdir()
    ...         for i in range(5):
    ...             Image.new("L", (8, 8)).save(f"{folder}/{name}/{i}.png")
    ...     images = find_images(pathlib.Path(folder))
    >>> images.class_names, [len(paths) for paths, _ in images.splits.values()]
    (('cat', 'dog'), [8, 2])
    """
    if not root.is_dir():
        raise InputError(f"folder:{root}: {'not a folder' if root.exists() else 'no such folder'}.")
    split_folders = layout.find_splits(root)
    train, test = split_folders.train, split_folders.test
    classes = _classes(train)
    unread: list[pathlib.Path] = []
    notes = [*split_folders.notes, *layout.check_structure(train, classes)]
    class_names = tuple(classes)
    splits = {"train": _images_of_classes(classes, class_names, unread)}
    if test is not None:
        test_classes = _classes(test)
        if extra := sorted(set(test_classes) - set(class_names)):
            raise InputError(
                f"{test_classes[extra[0]][0]}: class {extra[0]!r} is not in {train}; the training split needs every "
                "class of the test split."
            )
        layout.check_structure(test, test_classes)
        splits["test"] = _images_of_classes(test_classes, class_names, unread)
    else:
        paths, labels = splits["train"]
        for split, chosen in zip(("train", "test"), stratified_split(labels), strict=True):
            splits[split] = tuple(paths[i] for i in chosen), labels[chosen]
    notes += _note_on_unread(unread, root)
    strays = [image for folder in {root, train, test or train} for image in layout.stray_images(folder)]
    if strays:
        example = min(strays).relative_to(root)
        images_are, they_are = ("image is", "is") if len(strays) == 1 else ("images are", "are")
        notes.append(
            f"{len(strays)} {images_are} outside the class folders and {they_are} not read (such as {example})."
        )
    return Folder(root, class_names, splits, tuple(notes), split_folders.notes_on_splits)


def _note_on_unread(unread: list[pathlib.Path], root: pathlib.Path) -> list[str]:
    if not unread:
        return []
    extensions = Counter(path.suffix.lower() or "no extension" for path in unread)
    listed = ", ".join(name for name, _ in sorted(extensions.items(), key=lambda pair: (-pair[1], pair[0]))[:5])
    files, their = ("1 file is", "its") if len(unread) == 1 else (f"{len(unread)} files are", "their")
    return [f"{files} not read because of {their} extension ({listed}; such as {unread[0].relative_to(root)})."]


def _classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the folders of each class, sorted by class; names that differ only in Unicode form are one class."""
    classes: dict[str, list[pathlib.Path]] = {}
    for class_folder in layout.subfolders(folder):
        classes.setdefault(layout.one_form(class_folder.name), []).append(class_folder)
    if not classes:
        raise InputError(f"{folder}: no class folders; expected one folder of images per class.")
    return dict(sorted(classes.items()))


def _images_of_classes(classes: dict[str, list[pathlib.Path]], class_names, unread: list[pathlib.Path]) -> Split:
    """Returns the images, class by class, and appends the files that are not images to `unread`."""
    paths: list[pathlib.Path] = []
    labels: list[int] = []
    for name, parts in classes.items():
        seen: set[pathlib.Path] = set()
        files = [file for part in parts for file in _files(part, seen)]
        images = [path for path in files if layout.is_image(path)]
        others = [path for path in files if not layout.is_image(path)]
        if not images:
            expected = ", ".join(sorted(layout.EXTENSIONS))
            problem = "the class has no images"
            if files:
                subject = "its only file is not" if len(files) == 1 else f"none of its {len(files)} files is"
                problem = f"{subject} an image (such as {files[0].name})"
            raise InputError(f"{parts[0]}: {problem}; expected {expected}.")
        unread += others
        paths += images
        labels += [class_names.index(name)] * len(images)
    return tuple(paths), np.asarray(labels, dtype=np.int32)


def _files(folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """Yields all data files below `folder`, sorted within each folder; adds each folder to `seen`.

    Reaching a folder twice is an error, because links between a few folders could otherwise form an enormous number of
    paths.
    """
    layout.check_link(folder)
    if folder.resolve() in seen:
        raise InputError(
            f"{folder}: leads to {folder.resolve()}, whose images are already in this class; remove the link."
        )
    seen.add(folder.resolve())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = pathlib.Path(entry.path)
        if layout.is_system(entry.name):
            continue
        layout.check_link(path)
        if entry.is_dir():
            yield from _files(path, seen)
        else:
            yield path
