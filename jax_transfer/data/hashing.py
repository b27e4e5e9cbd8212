"""Perceptual hashes: copies of an image that differ in compression, size or brightness have nearly equal hashes.

The hash is pHash (Zauner, 2010, "Implementation and benchmarking of perceptual image hash functions") in its usual
64-bit form: the image is shrunk to 32 x 32 gray pixels, whatever its shape, and each bit says whether one of the lowest
8 x 8 frequencies of its discrete cosine transform exceeds their median. The first bit, in the place of the mean, is
always set. An image whose shrunk form has a single gray value has no hash: it gets 0, and is in no pair. A mirrored
copy is another image for this hash, and so are half of the copies that lack 5 % of the image at two sides.
"""

import dataclasses
import functools
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Int, UInt8, UInt64

from jax_transfer.data.source import Source, content_hash
from jax_transfer.data.sources import THREADS, each_image
from jax_transfer.data.transforms import to_uint8_rgb
from jax_transfer.records import InputError

SIDE = 32  # side in pixels of the shrunk image
LOW = 8  # number of frequencies in each direction
NEAREST = 10  # most pairs that `near_pairs` keeps for an image of the second set
ROWS, COLUMNS = 16, 4096  # hashes compared at a time: what fits the cache of a core is the fastest


def thumbnail(image: np.ndarray) -> UInt8[np.ndarray, "32 32 3"]:
    """Shrinks an image [h, w, c] to a square of 32 x 32 RGB pixels, each the mean of the area that it covers.

    >>> thumbnail(np.full((4, 100), 7, np.uint8)).max()
    np.uint8(7)
    """
    return cv2.resize(np.ascontiguousarray(to_uint8_rgb(image)), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def thumbnails(source: Source) -> Source:
    """Returns a source with the same images as thumbnails, so that their features do not depend on their sizes.

    >>> from jax_transfer.data.sources import load_source
    >>> thumbnails(load_source("embedded:digits", "test")).read([0])[0].shape
    (32, 32, 3)
    """
    return dataclasses.replace(
        source,
        read=functools.partial(_read_thumbnails, source.read),
        fingerprint=content_hash(source.fingerprint, "thumbnails", str(SIDE)),
    )


def _read_thumbnails(read, indices):
    return [thumbnail(image) for image in read(indices)]


def image_hash(image: np.ndarray) -> np.uint64:
    """Returns the perceptual hash of an image [h, w, c]; 0 if its thumbnail has a single gray value.

    >>> from jax_transfer.data.sources import load_source
    >>> (digit,) = load_source("embedded:digits", "test").read([0])
    >>> hamming(image_hash(digit), image_hash(cv2.resize(digit, (64, 50)))), image_hash(digit * 0 + 9)
    (np.uint8(0), np.uint64(0))
    """
    gray = cv2.cvtColor(thumbnail(image), cv2.COLOR_RGB2GRAY)
    if gray.min() == gray.max():
        return np.uint64(0)
    waves = cv2.dct(gray.astype(np.float32))[:LOW, :LOW].ravel()
    bits = waves > np.median(waves[1:])
    bits[0] = True
    return np.packbits(bits).view(np.uint64)[0]


def hashes(
    source: Source, threads: int = THREADS, progress: Callable[[int], object] | None = None
) -> UInt64[np.ndarray, " n"]:
    """Returns the perceptual hashes of all images of a source, which are read once, in parallel threads.

    Args:
      progress: called as progress(number_done) after each chunk.

    Raises:
      InputError: if an image cannot be read; the message names it.

    >>> from jax_transfer.data.sources import load_source
    >>> hashes(load_source("embedded:digits?test=20", "test")).shape
    (20,)
    """
    found = np.zeros(len(source), np.uint64)

    def keep(i: int, image: np.ndarray) -> None:
        found[i] = image_hash(image)

    each_image(source, keep, progress, threads)
    return found


def hamming(a: np.ndarray | np.uint64, b: np.ndarray | np.uint64) -> np.ndarray:
    """Returns the number of bits in which hashes differ: uint8, of the shape that a and b have when broadcast.

    >>> hamming(np.array([1, 7], np.uint64), np.array([1, 0], np.uint64)).tolist()
    [0, 3]
    """
    return np.bitwise_count(a ^ b)


def check_limits(distance: int, nearest: int) -> None:
    """Raises an InputError if `near_pairs` would not accept the distance or the number of pairs for each image."""
    if type(distance) is not int or not 0 <= distance <= 64:
        raise InputError(f"distance = {distance!r}: expected a whole number of bits from 0 to 64.")
    if type(nearest) is not int or nearest < 1:
        raise InputError(f"nearest = {nearest!r}: expected a whole number of at least 1.")


def near_pairs(
    hashes_a: UInt64[np.ndarray, " n"], hashes_b: UInt64[np.ndarray, " k"], distance: int, nearest: int = NEAREST
) -> Int[np.ndarray, "m 2"]:
    """Finds the images of a first set whose hashes differ from one of a second set in at most `distance` bits.

    All hashes are compared, tile by tile: those of 1.3 million images, as many as ImageNet has, with 10,000 others in
    about a minute on one core (`tests/benchmarks/overlap.py`). Multi-index hashing, which looks up equal bands of bits,
    would gain little at the distances of copies: at 10 bits, a sixth of all pairs share one of 11 bands. Beside the
    hashes and the result, the memory in use is that of a few tiles.

    Args:
      distance: from 0 to 64.
      nearest: most pairs that are kept for an image of the second set: those with the smallest distances and, among
        equal ones, with the smallest indices. Images of low variety, such as digits, have thousands of pairs.

    Returns:
      Pairs (index into hashes_a, index into hashes_b), sorted by the second index, the distance and the first index.
      Images without a hash are in none.

    Raises:
      InputError: if `distance` or `nearest` is not a whole number in its range.

    >>> a, b = np.array([0, 6, 7, 0xF0], np.uint64), np.array([7, 0], np.uint64)
    >>> near_pairs(a, b, distance=1).tolist()
    [[2, 0], [1, 0]]
    """
    check_limits(distance, nearest)
    a, b = np.flatnonzero(hashes_a), np.flatnonzero(hashes_b)
    with_hash = hashes_a[a]
    found = [np.zeros((2, 0), np.int64)]
    for start in range(0, len(b), ROWS):
        rows, columns = _near_rows(with_hash, hashes_b[b[start : start + ROWS]], distance, nearest)
        found.append(np.stack([a[columns], b[start + rows]]))
    return np.concatenate(found, axis=1).T


def _near_rows(hashes_a: np.ndarray, rows_b: np.ndarray, distance: int, nearest: int):
    """Returns (index into rows_b, index into hashes_a) of the pairs that `near_pairs` keeps for a few rows."""
    kept = np.zeros((3, 0), np.int64)  # row, distance, column
    waiting, count = [kept], 0
    differences = np.empty((len(rows_b), COLUMNS), np.uint64)
    distances = np.empty((len(rows_b), COLUMNS), np.uint8)
    for start in range(0, len(hashes_a), COLUMNS):
        width = min(COLUMNS, len(hashes_a) - start)
        np.bitwise_xor(rows_b[:, None], hashes_a[start : start + width], out=differences[:, :width])
        tile = np.bitwise_count(differences[:, :width], out=distances[:, :width])
        rows, columns = np.nonzero(tile <= distance)
        if len(rows):
            waiting.append(np.stack([rows, tile[rows, columns], start + columns]))
            count += len(rows)
        if count > ROWS * COLUMNS:  # so that many pairs never take more memory than a few tiles
            waiting, count = [_nearest(np.concatenate(waiting, axis=1), nearest)], 0
    rows, _, columns = _nearest(np.concatenate(waiting, axis=1), nearest)
    return rows, columns


def _nearest(pairs: np.ndarray, nearest: int) -> np.ndarray:
    """Sorts pairs (row, distance, column) [3, m] and keeps the first `nearest` of each row."""
    pairs = pairs[:, np.lexsort(pairs[::-1])]
    rows = pairs[0]
    return pairs[:, np.arange(len(rows)) - np.searchsorted(rows, rows) < nearest]
