"""Finds the images of class folders."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jax_transfer.data import layout
from jax_transfer.data.subsets import stratified_split
from jax_transfer.records import InputError

Split = tuple[tuple[pathlib.Path, ...], np.ndarray]  # paths, labels int32 [n]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images below `root`: class names, the paths and labels of "train" and "test", and notes for the reader."""

    root: pathlib.Path
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...]


def find_images(root: pathlib.Path) -> Folder:
    """All images below `root` and their classes and splits.

    Layouts: split folders with class folders in them, `train/<class>/...` and `test/<class>/...`, named as
    `layout.find_splits` says; without a test folder, or with `<class>/...` right below `root`, a fifth of each class is
    the test split: the same images on every call. Classes are sorted by name, in one Unicode form, and those of train;
    images may lie in folders below their class. Links are followed, wherever they lead. System folders and hidden files
    are no data; files of other endings are counted in a note.

    Raises:
      InputError: for a folder that is missing or has no class folders, folders that are no classes, a class without
        images, a class of test that train lacks, links to nothing and links that go round; each names the path.
    """
    if not root.is_dir():
        raise InputError(f"folder:{root}: {'not a folder' if root.exists() else 'no such folder'}.")
    found = layout.find_splits(root)
    train, test = found.train, found.test
    classes = _classes(train)
    unread: list[pathlib.Path] = []
    notes = [*found.notes, *layout.check_structure(train, classes)]
    class_names = tuple(classes)
    splits = {"train": _images_of_classes(classes, class_names, unread)}
    if test is not None:
        tested = _classes(test)
        if extra := sorted(set(tested) - set(class_names)):
            raise InputError(
                f"{tested[extra[0]][0]}: class {extra[0]!r} is not in {train}; train needs every class of test."
            )
        layout.check_structure(test, tested)
        splits["test"] = _images_of_classes(tested, class_names, unread)
    else:
        paths, labels = splits["train"]
        for split, chosen in zip(("train", "test"), stratified_split(labels), strict=True):
            splits[split] = tuple(paths[i] for i in chosen), labels[chosen]
    notes += _note_on_unread(unread, root)
    strays = [image for folder in {root, train, test or train} for image in layout.stray_images(folder)]
    if strays:
        example = min(strays).relative_to(root)
        lie, are = ("image lies", "is") if len(strays) == 1 else ("images lie", "are")
        notes.append(f"{len(strays)} {lie} beside the class folders and {are} not read (such as {example}).")
    return Folder(root, class_names, splits, tuple(notes))


def _note_on_unread(unread: list[pathlib.Path], root: pathlib.Path) -> list[str]:
    if not unread:
        return []
    kinds = Counter(path.suffix.lower() or "no ending" for path in unread)
    listed = ", ".join(kind for kind, _ in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))[:5])
    files, their = ("1 file is", "its") if len(unread) == 1 else (f"{len(unread)} files are", "their")
    return [f"{files} not read because of {their} ending ({listed}; such as {unread[0].relative_to(root)})."]


def _classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Class name -> its folders, sorted; two if their names differ in Unicode form only."""
    classes: dict[str, list[pathlib.Path]] = {}
    for found in layout.subfolders(folder):
        classes.setdefault(layout.one_form(found.name), []).append(found)
    if not classes:
        raise InputError(f"{folder}: no class folders; expected one folder of images per class.")
    return dict(sorted(classes.items()))


def _images_of_classes(classes: dict[str, list[pathlib.Path]], class_names, unread: list[pathlib.Path]) -> Split:
    """The images, class by class; files that are not read are added to `unread`."""
    paths: list[pathlib.Path] = []
    labels: list[int] = []
    for name, parts in classes.items():
        seen: set[pathlib.Path] = set()
        files = [file for part in parts for file in _files(part, seen)]
        images = [path for path in files if layout.is_image(path)]
        others = [path for path in files if not layout.is_image(path)]
        if not images:
            read = ", ".join(sorted(layout.EXTENSIONS))
            why = "no images in this class"
            if files:
                which = "its only file is not" if len(files) == 1 else f"none of its {len(files)} files is"
                why = f"{which} read (such as {files[0].name})"
            raise InputError(f"{parts[0]}: {why}; expected {read}.")
        unread += others
        paths += images
        labels += [class_names.index(name)] * len(images)
    return tuple(paths), np.asarray(labels, dtype=np.int32)


def _files(folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """All files of data below `folder`, sorted in each folder; none of `seen`, which it adds to, is read again.

    Links between a few folders could otherwise make endlessly many paths.
    """
    layout.check_link(folder)
    if folder.resolve() in seen:
        raise InputError(
            f"{folder}: leads to {folder.resolve()}, whose images are in this class already; remove the link."
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
