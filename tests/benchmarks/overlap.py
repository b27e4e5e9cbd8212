"""Measures the search for overlap: its speed, the copies that it finds, and the different images that it confuses.

python tests/benchmarks/overlap.py [--images 2000] [--features 100] [--checkpoint FILE] [--compared 1300000]

Needs the data sets caltech101, tiny_imagenet and mnist in TFDS_DATA_DIR. The first part compares random hashes, as many
as ImageNet has images with 10,000. The second part changes test images of Caltech101 in several ways and counts how
many copies have a hash within some distances, and how similar their features are. The third part counts the pairs of
different images: Tiny-ImageNet and Caltech101, which share no image at these distances, Caltech101 with itself (many
motorcycles, drawn on white), and MNIST's training and test digits. The features are the pixels of the thumbnails and,
with --checkpoint, those by a checkpoint, which are computed for --features images or candidates of a kind.
"""

import argparse
import dataclasses
import functools
import os
import resource
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np

from jax_transfer import devices
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.data.hashing import hamming, hashes, near_pairs, thumbnails
from jax_transfer.data.source import Source, subset
from jax_transfer.data.sources import load_source
from jax_transfer.data.transforms import to_uint8_rgb
from jax_transfer.features.extract import make_forward
from jax_transfer.records import Batch
from jax_transfer.selection.overlap import candidates, confirmed, pixels

DISTANCES = (0, 4, 6, 8, 10, 12)
THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95)


def jpeg(image, quality):
    data = cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def resized(image, scale):
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def square(image, side):
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def cut(image, part):
    return image[round(part * len(image)) :, round(part * image.shape[1]) :]


COPIES = {
    "JPEG, quality 75": lambda image: jpeg(image, 75),
    "JPEG, quality 30": lambda image: jpeg(image, 30),
    "half as large": lambda image: resized(image, 0.5),
    "a quarter as large": lambda image: resized(image, 0.25),
    "twice as large": lambda image: resized(image, 2),
    "64 x 64, quality 75": lambda image: jpeg(square(image, 64), 75),
    "20 levels brighter": lambda image: np.clip(image.astype(int) + 20, 0, 255).astype(np.uint8),
    "2 % cut at two sides": lambda image: cut(image, 0.02),
    "5 % cut at two sides": lambda image: cut(image, 0.05),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
}


def changed(source: Source, change) -> Source:
    return dataclasses.replace(source, read=functools.partial(_read_changed, source.read, change))


def _read_changed(read, change, indices):
    return [change(np.ascontiguousarray(to_uint8_rgb(image))) for image in read(indices)]


def by_checkpoint(path):
    checkpoint, mesh = load_checkpoint(path), devices.make_mesh()
    forward = make_forward(checkpoint.net, checkpoint.preprocessing, mesh)

    def features(source):
        images = np.stack([checkpoint.preprocessing.square(image) for image in source.read(range(len(source)))])
        parts = []
        for start in range(0, len(images), 50):
            part = images[start : start + 50]
            padded = np.pad(part, ((0, 50 - len(part)), (0, 0), (0, 0), (0, 0)))
            batch = Batch(padded, np.zeros(50, np.int32), np.ones(50, bool))
            parts.append(np.asarray(forward(checkpoint.model, batch).features)[: len(part)])
        return np.concatenate(parts)

    return features


def similarities(a: Source, b: Source, pairs, features):
    """Returns the cosine of the features of each pair's thumbnails."""
    images_a, images_b = candidates(pairs)
    of_a, of_b = features(thumbnails(subset(a, images_a))), features(thumbnails(subset(b, images_b)))
    return confirmed(pairs, np.zeros(len(pairs), int), of_a, of_b, threshold=-1).similarity


def speed(compared: int) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(1, 2**64, n, dtype=np.uint64) for n in (compared, 10_000))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (time.perf_counter(), time.process_time())
    found = near_pairs(a, b, 10)
    passed = time.perf_counter() - start[0], time.process_time() - start[1]
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{compared:,} x 10,000 random hashes, distance 10: {len(found):,} pairs, {passed[0]:.0f} s "
        f"({passed[1]:.0f} s of one core), {memory:.0f} MiB\n"
    )


def table(title: str, columns, rows) -> None:
    print(title)
    print(f"{'':34}" + "".join(f"{column!s:>10}" for column in columns))
    for name, values in rows:
        print(f"{name:34}" + "".join(f"{value:>10}" for value in values))
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--checkpoint")
    parser.add_argument("--compared", type=int, default=1_300_000)
    args = parser.parse_args()
    kinds = {"pixels": (pixels, args.images)}
    if args.checkpoint:
        kinds["checkpoint"] = (by_checkpoint(args.checkpoint), args.features)
    speed(args.compared)

    test = load_source("tfds:caltech101", "test")
    some = subset(test, np.unique(np.linspace(0, len(test) - 1, args.images).astype(int)))
    hashes_some, rows, similar = hashes(some), [], {kind: [] for kind in kinds}
    for name, change in COPIES.items():
        copies = changed(some, change)
        distances = hamming(hashes_some, hashes(copies))
        rows.append((name, [f"{(distances <= d).mean():.2%}" for d in DISTANCES]))
        for kind, (features, count) in kinds.items():
            chosen = np.unique(np.linspace(0, len(some) - 1, count).astype(int))
            found = similarities(copies, some, np.stack([chosen, chosen], 1), features)
            similar[kind].append((name, [f"{(found >= t).mean():.1%}" for t in THRESHOLDS]))
    table(f"Copies of {len(some):,} images within a distance", DISTANCES, rows)
    for kind in kinds:
        table(f"Copies of {min(kinds[kind][1], len(some)):,} images by similarity of {kind}", THRESHOLDS, similar[kind])

    rows, similar = [], {kind: [] for kind in kinds}
    for name, a, b in (
        ("Tiny-ImageNet, Caltech101", load_source("tfds:tiny_imagenet", "train"), test),
        ("Tiny-ImageNet (test), Caltech101", load_source("tfds:tiny_imagenet", "test"), test),
        ("Caltech101 with itself", test, test),
        ("MNIST, training and test", load_source("tfds:mnist?train=20000", "train"), load_source("tfds:mnist", "test")),
    ):
        hashes_a, hashes_b = hashes(a), hashes(b)
        pairs = near_pairs(hashes_a, hashes_b, max(DISTANCES), nearest=len(a))
        total = len(a) * len(b)
        if a is b:
            pairs, total = pairs[pairs[:, 0] < pairs[:, 1]], total // 2
        distances = hamming(hashes_a[pairs[:, 0]], hashes_b[pairs[:, 1]])
        rows.append((name, [f"{total:.1e}", *(f"{np.count_nonzero(distances <= d):,}" for d in DISTANCES)]))
        pairs = pairs[distances <= 10]
        for kind, (features, count) in kinds.items():
            chosen = pairs[np.unique(np.linspace(0, len(pairs) - 1, count).astype(int))]
            found = similarities(a, b, chosen, features)
            similar[kind].append((name, [f"{(found >= t).mean():.1%}" for t in THRESHOLDS]))
    table("Pairs of different images within a distance", ("pairs", *DISTANCES), rows)
    for kind in kinds:
        table(f"Pairs within a distance of 10 by similarity of {kind}", THRESHOLDS, similar[kind])


if __name__ == "__main__":
    main()
