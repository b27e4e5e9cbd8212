"""Examines the images of a data set before use, for copies, blank images, weak values, transparency and damage.

The whole content of files is compared only if their lengths, beginnings and ends are equal. If all images are decoded
anyway to find damaged ones, the pixels of all images are examined; otherwise those of a sample of at most SAMPLE
images, spread evenly over the data set. "Weak" 16-bit values use less than 1/16 of the 16-bit range. If all 16-bit
images in the sample are weak, the remaining images are examined too.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jax_transfer.data.folders import Folder
from jax_transfer.data.source import WHOLE
from jax_transfer.data.transforms import (
    WEAK_PEAK,
    is_constant,
    is_hidden,
    is_transparent,
    read_pixels,
    sixteen_bit_depth,
    to_uint8_rgb,
)
from jax_transfer.records import InputError

SAMPLE = 64  # number of images whose pixels are examined if not all are decoded
ENDS = 4096  # number of bytes at each end of a file that are compared first
MOST_FILES = 200_000  # data sets with more files are not searched for copies
MANY = 0.01  # smallest share of blank, equal or weak images that is worth a note


@dataclasses.dataclass(frozen=True)
class Look:
    """Properties of one image.

    Attributes:
      digest: hash of the pixels as uint8 RGB.
      constant: whether all pixels are equal.
      transparent: whether some pixels are transparent.
      hidden: whether the image is fully transparent by mistake, see `transforms.is_hidden`.
      floor, peak: the smallest and the largest 16-bit value; None for 8-bit images.
      problem: why the image cannot be decoded; "" if it can be.
    """

    digest: bytes = b""
    constant: bool = False
    transparent: bool = False
    hidden: bool = False
    floor: int | None = None
    peak: int | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of examining a folder.

    Attributes:
      folder: the folder.
      problems: path -> why the file cannot be decoded.
      depth: number of bits that the 16-bit values use.
      notes: sentences on what readers of the results should know about the images.
    """

    folder: Folder
    problems: dict[pathlib.Path, str]
    depth: int
    notes: tuple[str, ...]


def examine(folder: Folder, every_image: bool, threads: int) -> Findings:
    """Examines the files of a folder.

    Args:
      every_image: decode all images instead of a sample.
      threads: number of threads that read files.

    Raises:
      InputError: if every image is decoded and all images are equal.
    """
    paths = [path for split in folder.splits.values() for path in split[0]]

    def shown(path: pathlib.Path) -> str:
        return str(path.relative_to(folder.root))

    with ThreadPoolExecutor(threads) as pool:
        copies = _copies(paths, pool) if len(paths) <= MOST_FILES else {}
        examined = paths if every_image else spread(paths)
        looks = dict(zip(examined, pool.map(_look_at_file, examined), strict=True))
        peaks = {path: look.peak for path, look in looks.items() if look.peak is not None}
        if peaks and not every_image and max(peaks.values()) < WEAK_PEAK:  # check whether all images are weak
            others = [path for path in paths if path not in looks]
            looks_of_others = zip(others, pool.map(_look_at_file, others), strict=True)
            peaks |= {path: look.peak for path, look in looks_of_others if look.peak is not None}
    problems = {path: look.problem for path, look in looks.items() if look.problem} if every_image else {}
    valid = {path: look for path, look in looks.items() if not look.problem}
    if every_image and len(valid) > 1 and len({look.digest for look in valid.values()}) == 1:
        raise InputError(
            f"{folder.root}: all {len(valid)} images are equal, such as {shown(min(valid))}, so nothing can be learned "
            "from them. Check the files."
        )
    distinct = {path: look for path, look in valid.items() if copies.get(path, path) == path}
    notes = [*_notes_on_copies(folder, copies, shown), *notes_on_looks(distinct, shown), *_note_on_weak(peaks, shown)]
    if len(paths) > MOST_FILES:
        notes.append(f"Exact copies were not searched for, because there are {len(paths):,} files.")
    return Findings(folder, problems, sixteen_bit_depth(max(peaks.values(), default=WEAK_PEAK)), tuple(notes))


def spread(items: Sequence) -> list:
    """Returns at most SAMPLE items, spread evenly over the sequence.

    >>> len(spread(range(1000))), spread("abc")
    (64, ['a', 'b', 'c'])
    """
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).astype(int))]


# ---- pixels


def look(pixels: np.ndarray) -> Look:
    """Examines the pixels of a gray, RGB or RGBA image: uint8 or uint16, [h, w] or [h, w, c].

    >>> import numpy as np
    >>> look(np.zeros((4, 4), np.uint8)).constant
    True
    """
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    floor = peak = None
    if pixels.dtype == np.uint16:
        floor, peak = int(pixels[:, :, :3].min()), int(pixels[:, :, :3].max())
    seen = to_uint8_rgb(pixels, sixteen_bit_depth(peak or 0))
    constant = is_constant(seen)
    content = seen[:1, :1] if constant else seen  # images of the same single colour count as equal at any size
    digest = hashlib.blake2b(repr(content.shape).encode() + content.tobytes(), digest_size=16).digest()
    hidden = is_hidden(pixels)
    return Look(digest, constant, is_transparent(pixels) and not hidden, hidden, floor, peak)


def _look_at_file(path: pathlib.Path) -> Look:
    try:
        return look(read_pixels(path))
    except InputError as error:
        return Look(problem=str(error))


def notes_on_looks(looks: dict, shown: Callable[[Any], str]) -> list[str]:
    """Returns notes on blank, equal and transparent images, and on 16-bit images of low contrast.

    Args:
      looks: image -> Look.
      shown: returns the name by which the notes refer to an image.

    >>> import numpy as np
    >>> notes_on_looks({i: look(np.zeros((4, 4), np.uint8)) for i in range(3)}, shown=str)
    ['3 of 3 examined images have a single colour (such as 0).']
    """
    notes, few = [], max(2, MANY * len(looks))
    constant = [image for image, seen in looks.items() if seen.constant]
    if len(constant) >= few:
        notes.append(f"{_share(constant, looks)} have a single colour (such as {shown(constant[0])}).")
    groups = collections.defaultdict(list)
    for image, seen in looks.items():
        if not seen.constant:
            groups[seen.digest].append(image)
    equal_groups = [group for group in groups.values() if len(group) > 1]
    equal = [image for group in equal_groups for image in group]
    if len(equal) >= few:
        pair = f"{shown(equal_groups[0][0])} and {shown(equal_groups[0][1])}"
        notes.append(f"{_share(equal, looks)} have the same pixels as another image (such as {pair}).")
    transparent = [image for image, seen in looks.items() if seen.transparent]
    if transparent:
        notes.append(
            f"{_share(transparent, looks)} are partly transparent and are placed on white (such as "
            f"{shown(transparent[0])})."
        )
    if hidden := [image for image, seen in looks.items() if seen.hidden]:
        notes.append(
            f"{_share(hidden, looks)} are fully transparent although their colours vary, so the transparency is "
            f"ignored (such as {shown(hidden[0])})."
        )
    narrow = [
        image
        for image, seen in looks.items()
        if seen.peak is not None and seen.peak >= WEAK_PEAK and 0 < seen.peak - seen.floor < WEAK_PEAK
    ]
    if len(narrow) >= few:
        floor, peak = looks[narrow[0]].floor, looks[narrow[0]].peak
        notes.append(
            f"{_share(narrow, looks)} use less than 1/16 of their 16-bit range and look almost uniform: rescale them "
            f"(such as {shown(narrow[0])}, from {floor:,} to {peak:,})."
        )
    return notes


def _share(some: Sized, examined: Sized) -> str:
    return f"{len(some)} of {len(examined)} examined images"


def _note_on_weak(peaks: dict[pathlib.Path, int], shown) -> list[str]:
    """Returns a note on 16-bit images that use less than 1/16 of their range, if there are enough of them."""
    weak = {path: peak for path, peak in peaks.items() if peak < WEAK_PEAK}
    if not weak:
        return []
    top = max(peaks.values())
    if len(weak) == len(peaks):
        return [
            f"The 16-bit images use less than 1/16 of their range (at most {top:,} of 65,535, such as "
            f"{shown(next(iter(weak)))}): they are read as {sixteen_bit_depth(top)}-bit values."
        ]
    if len(weak) < max(2, MANY * len(peaks)):
        return []
    return [
        f"{len(weak)} of {len(peaks)} examined 16-bit images use less than 1/16 of their range, unlike the others, and "
        f"look dark (such as {shown(next(iter(weak)))})."
    ]


# ---- files


def _copies(paths: Sequence[pathlib.Path], pool: ThreadPoolExecutor) -> dict[pathlib.Path, pathlib.Path]:
    """Maps each file of a group with the same content, including the first one, to the first file of the group."""
    groups = _grouped(paths, lambda path: path.stat().st_size)
    for key in (_ends, _content):
        candidates = [path for group in groups for path in group]
        keys = dict(zip(candidates, pool.map(key, candidates), strict=True))
        groups = [part for group in groups for part in _grouped(group, keys.__getitem__)]
    return {path: group[0] for group in groups for path in group}


def _grouped(paths: Iterable[pathlib.Path], key: Callable) -> list[list[pathlib.Path]]:
    """Returns the groups of two or more paths with the same key; paths with key None are left out."""
    groups = collections.defaultdict(list)
    for path in paths:
        if (value := key(path)) is not None:
            groups[value].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _ends(path: pathlib.Path) -> bytes | None:
    """Returns the first and the last bytes of a file; None if it is empty or not a regular file."""
    if not path.is_file() or not (size := path.stat().st_size):
        return None  # reading a pipe would block forever; empty files count as damaged and not as copies
    with open(path, "rb") as file:
        first = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return first + file.read(ENDS)


def _content(path: pathlib.Path) -> bytes:
    """Returns a hash of the content of a file, followed by the size of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest() + os.stat(path).st_size.to_bytes(8)


def _notes_on_copies(folder: Folder, copies: dict[pathlib.Path, pathlib.Path], shown) -> list[str]:
    """Returns notes on copies, the most harmful first: with different labels, in both splits, and all copies."""
    split_and_label = {}
    for split, (paths, labels) in folder.splits.items():
        split_and_label |= {path: (split, int(label)) for path, label in zip(paths, labels, strict=True)}
    groups = collections.defaultdict(list)
    for path, first in copies.items():
        groups[first].append(path)
    mislabelled, leaked = [], []
    for group in groups.values():
        first = group[0]
        mislabelled += [(first, path) for path in group if split_and_label[path][1] != split_and_label[first][1]]
        trained = [path for path in group if split_and_label[path][0] == "train"]
        leaked += [(trained[0], path) for path in group if trained and split_and_label[path][0] == "test"]
    notes = []
    if copies:
        count = len(copies) - len(groups)
        first = next(iter(groups.values()))
        notes.append(
            f"{count} image{' is an exact copy' if count == 1 else 's are exact copies'} of another image (such as "
            f"{shown(first[1])} of {shown(first[0])})."
        )
    if copies and WHOLE in folder.splits:
        notes.append("The random split does not keep copies together: test accuracies may be too high.")
    if leaked:
        notes.insert(
            0,
            f"{len(leaked)} test image{' is' if len(leaked) == 1 else 's are'} also in the training split (such as "
            f"{shown(leaked[0][1])} and {shown(leaked[0][0])}): test accuracies will be too high.",
        )
    if mislabelled:
        notes.insert(
            0,
            f"{len(mislabelled)} cop{'y is' if len(mislabelled) == 1 else 'ies are'} in another class than the "
            f"original (such as {shown(mislabelled[0][1])} and {shown(mislabelled[0][0])}): one label is wrong.",
        )
    return notes
