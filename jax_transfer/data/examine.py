"""Looks at the images of a data set before they are used: copies, blank images, weak values, transparency, damage.

Files are compared byte by byte only if they are equally long and begin and end alike. Pixels are looked at in all images
if they are decoded anyway to find the damaged ones, else in at most SAMPLE of them, spread evenly over the set; only
where those are suspicious (16-bit values that are all weak) the others are looked at too.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jax_transfer.data.folders import Folder
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

SAMPLE = 64  # images whose pixels are looked at where not all are decoded
ENDS = 4096  # bytes at both ends of a file that are compared first
MOST_FILES = 200_000  # beyond these copies are not looked for
MANY = 0.01  # the share of images from which blank or weak ones are worth a note


@dataclasses.dataclass(frozen=True)
class Look:
    """What one image shows. digest: of the pixels as they are seen.

    floor, peak: the smallest and largest 16-bit value, None for 8 bits. hidden: see `transforms.is_hidden`.
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
    """problems: what cannot be decoded and why. depth: the bits that 16-bit values use. notes: for the reader."""

    folder: Folder
    problems: dict[pathlib.Path, str]
    depth: int
    notes: tuple[str, ...]


def examine(folder: Folder, every_image: bool, threads: int) -> Findings:
    """Looks at the files of a folder; every_image: decodes all of them instead of a sample.

    Raises:
      InputError: if every image was decoded and all are equal.
    """
    paths = [path for split in folder.splits.values() for path in split[0]]

    def shown(path: pathlib.Path) -> str:
        return str(path.relative_to(folder.root))

    with ThreadPoolExecutor(threads) as pool:
        copies = _copies(paths, pool) if len(paths) <= MOST_FILES else {}
        looked_at = paths if every_image else spread(paths)
        looks = dict(zip(looked_at, pool.map(_look_at_file, looked_at), strict=True))
        peaks = {path: look.peak for path, look in looks.items() if look.peak is not None}
        if peaks and not every_image and max(peaks.values()) < WEAK_PEAK:  # is that so of all of them?
            others = [path for path in paths if path not in looks]
            found = zip(others, pool.map(_look_at_file, others), strict=True)
            peaks |= {path: look.peak for path, look in found if look.peak is not None}
    problems = {path: look.problem for path, look in looks.items() if look.problem} if every_image else {}
    sound = {path: look for path, look in looks.items() if not look.problem}
    if every_image and len(sound) > 1 and len({look.digest for look in sound.values()}) == 1:
        raise InputError(
            f"{folder.root}: all {len(sound)} images are equal, such as {shown(min(sound))}; there is nothing to learn "
            "from: look at the files."
        )
    distinct = {path: look for path, look in sound.items() if copies.get(path, path) == path}
    notes = [*_notes_on_copies(folder, copies, shown), *notes_on_looks(distinct, shown), *_note_on_weak(peaks, shown)]
    if len(paths) > MOST_FILES:
        notes.append(f"Exact copies were not looked for among {len(paths):,} files.")
    return Findings(folder, problems, sixteen_bit_depth(max(peaks.values(), default=WEAK_PEAK)), tuple(notes))


def spread(items: Sequence) -> list:
    """At most SAMPLE of the items, evenly spread."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).astype(int))]


# ---- pixels


def look(pixels: np.ndarray) -> Look:
    """What an image shows: uint8 or uint16, gray, RGB or RGBA."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    floor = peak = None
    if pixels.dtype == np.uint16:
        floor, peak = int(pixels[:, :, :3].min()), int(pixels[:, :, :3].max())
    seen = to_uint8_rgb(pixels, sixteen_bit_depth(peak or 0))
    constant = is_constant(seen)
    content = seen[:1, :1] if constant else seen  # one colour is one colour in every size
    digest = hashlib.blake2b(repr(content.shape).encode() + content.tobytes(), digest_size=16).digest()
    hidden = is_hidden(pixels)
    return Look(digest, constant, is_transparent(pixels) and not hidden, hidden, floor, peak)


def _look_at_file(path: pathlib.Path) -> Look:
    try:
        return look(read_pixels(path))
    except InputError as error:
        return Look(problem=str(error))


def notes_on_looks(looks: dict, shown: Callable[[object], str]) -> list[str]:
    """Notes on images of one colour, equal ones, transparent ones and 16-bit ones of little contrast; looks: image -> Look."""
    notes, few = [], max(2, MANY * len(looks))
    constant = [image for image, found in looks.items() if found.constant]
    if len(constant) >= few:
        notes.append(f"{_share(constant, looks)} show a single colour (such as {shown(constant[0])}).")
    groups = collections.defaultdict(list)
    for image, found in looks.items():
        if not found.constant:
            groups[found.digest].append(image)
    equal = [group for group in groups.values() if len(group) > 1]
    alike = [image for group in equal for image in group]
    if len(alike) >= few:
        pair = f"{shown(equal[0][0])} and {shown(equal[0][1])}"
        notes.append(f"{_share(alike, looks)} show the same pixels as another one (such as {pair}).")
    transparent = [image for image, found in looks.items() if found.transparent]
    if transparent:
        notes.append(
            f"{_share(transparent, looks)} are partly transparent and are shown over white (such as "
            f"{shown(transparent[0])})."
        )
    if hidden := [image for image, found in looks.items() if found.hidden]:
        notes.append(
            f"{_share(hidden, looks)} are transparent everywhere, which is ignored, as their colours differ (such as "
            f"{shown(hidden[0])})."
        )
    narrow = [
        image
        for image, found in looks.items()
        if found.peak is not None and found.peak >= WEAK_PEAK and 0 < found.peak - found.floor < WEAK_PEAK
    ]
    if len(narrow) >= few:
        floor, peak = looks[narrow[0]].floor, looks[narrow[0]].peak
        notes.append(
            f"{_share(narrow, looks)} use less than 1/16 of the range of their 16 bits and come out almost uniform: "
            f"rescale them (such as {shown(narrow[0])}, from {floor:,} to {peak:,})."
        )
    return notes


def _share(some: Sequence, looked_at: Sequence) -> str:
    return f"{len(some)} of {len(looked_at)} images looked at"


def _note_on_weak(peaks: dict[pathlib.Path, int], shown) -> list[str]:
    weak = {path: peak for path, peak in peaks.items() if peak < WEAK_PEAK}
    if not weak:
        return []
    top = max(peaks.values())
    if len(weak) == len(peaks):
        return [
            f"The 16-bit images use less than 1/16 of their range (at most {top:,} of 65,535, such as "
            f"{shown(next(iter(weak)))}): all are read as values of {sixteen_bit_depth(top)} bits."
        ]
    if len(weak) < max(2, MANY * len(peaks)):
        return []
    return [
        f"{len(weak)} of {len(peaks)} 16-bit images looked at use less than 1/16 of their range, unlike the others, and "
        f"come out dark (such as {shown(next(iter(weak)))})."
    ]


# ---- files


def _copies(paths: Sequence[pathlib.Path], pool: ThreadPoolExecutor) -> dict[pathlib.Path, pathlib.Path]:
    """path -> the first file of the same content, for files of which there are several."""
    groups = _grouped(paths, lambda path: path.stat().st_size)
    for key in (_ends, _content):
        alike = [path for group in groups for path in group]
        keys = dict(zip(alike, pool.map(key, alike), strict=True))
        groups = [part for group in groups for part in _grouped(group, keys.__getitem__)]
    return {path: group[0] for group in groups for path in group}


def _grouped(paths: Iterable[pathlib.Path], key: Callable) -> list[list[pathlib.Path]]:
    """The paths of equal key, where there are several."""
    groups = collections.defaultdict(list)
    for path in paths:
        if (found := key(path)) is not None:
            groups[found].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _ends(path: pathlib.Path) -> bytes | None:
    if not path.is_file() or not (size := path.stat().st_size):
        return None  # a pipe would wait for ever; empty files are damage, not copies
    with open(path, "rb") as file:
        first = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return first + file.read(ENDS)


def _content(path: pathlib.Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest() + os.stat(path).st_size.to_bytes(8)


def _notes_on_copies(folder: Folder, copies: dict[pathlib.Path, pathlib.Path], shown) -> list[str]:
    """Most harmful first: copies under different labels, in training and test split, and any others."""
    where = {}
    for split, (paths, labels) in folder.splits.items():
        where |= {path: (split, int(label)) for path, label in zip(paths, labels, strict=True)}
    groups = collections.defaultdict(list)
    for path, first in copies.items():
        groups[first].append(path)
    mislabelled, leaked = [], []
    for group in groups.values():
        first = group[0]
        mislabelled += [(first, path) for path in group if where[path][1] != where[first][1]]
        trained = [path for path in group if where[path][0] == "train"]
        leaked += [(trained[0], path) for path in group if trained and where[path][0] == "test"]
    notes = []
    if copies:
        count = len(copies) - len(groups)
        first = next(iter(groups.values()))
        notes.append(
            f"{count} image{' is an exact copy' if count == 1 else 's are exact copies'} of another one (such as "
            f"{shown(first[1])} of {shown(first[0])})."
        )
    if leaked:
        notes.insert(
            0,
            f"{len(leaked)} test image{' is' if len(leaked) == 1 else 's are'} among the training images too (such as "
            f"{shown(leaked[0][1])} and {shown(leaked[0][0])}): accuracies are too high.",
        )
    if mislabelled:
        notes.insert(
            0,
            f"{len(mislabelled)} cop{'y lies' if len(mislabelled) == 1 else 'ies lie'} in another class than the same "
            f"image (such as {shown(mislabelled[0][1])} and {shown(mislabelled[0][0])}): one of the labels is wrong.",
        )
    return notes
