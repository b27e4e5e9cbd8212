"""Perceptual hashes: copies are near, different images are not, and the search compares every pair in little memory."""

import pickle
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from helpers.images import photographs, write_images
from jax_transfer.data import hashing
from jax_transfer.data.hashing import hamming, hashes, image_hash, near_pairs, thumbnails
from jax_transfer.data.source import from_arrays, subset
from jax_transfer.data.sources import load_source
from jax_transfer.records import InputError

NEAR = 10


def jpeg(image, quality):
    data = cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def resized(image, width, height):
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


COPIES = {
    "jpeg": lambda image: jpeg(image, 75),
    "low_quality_jpeg": lambda image: jpeg(image, 30),
    "smaller": lambda image: resized(image, image.shape[1] // 2, image.shape[0] // 2),
    "larger": lambda image: resized(image, image.shape[1] * 2, image.shape[0] * 2),
    "squashed_and_saved": lambda image: jpeg(resized(image, 64, 64), 75),
    "darker": lambda image: (image * 0.8).astype(np.uint8),
    "gray": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
}


# ---- hashes


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_photographs_have_near_hashes(name):
    for image in photographs():
        assert hamming(image_hash(image), image_hash(COPIES[name](image))) <= NEAR


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_caltech101_have_near_hashes(tfds_dir, name):
    source = load_source("tfds:caltech101?test=204", "test")
    for image in source.read(range(0, len(source), 4)):
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        assert hamming(image_hash(image), image_hash(COPIES[name](np.ascontiguousarray(image)))) <= NEAR


def test_different_photographs_have_distant_hashes():
    found = np.array([image_hash(image) for image in photographs()])
    apart = hamming(found[:, None], found)[~np.eye(len(found), dtype=bool)]
    assert apart.min() > NEAR and abs(apart.mean() - 32) < 4  # half of the bits, as by chance


def test_tiny_imagenet_and_caltech101_have_no_near_hashes(tfds_dir):
    a = hashes(load_source("tfds:tiny_imagenet?test=600", "test"))
    b = hashes(load_source("tfds:caltech101?test=306", "test"))
    assert len(near_pairs(a, b, 6)) == 0


def test_bits_say_which_low_frequencies_exceed_their_median():
    point = np.zeros((32, 32), np.uint8)
    point[0, 0] = 255  # all its waves are about as high, and higher than the mean
    for image in (*photographs(), point):
        gray = cv2.cvtColor(hashing.thumbnail(image), cv2.COLOR_RGB2GRAY).astype(np.float64)
        waves = np.asarray(dctn(gray, norm="ortho"))[:8, :8].ravel()
        bits = np.unpackbits(np.array([image_hash(image)]).view(np.uint8))
        clear = np.abs(waves[1:] - np.median(waves[1:])) > 1e-3  # rounding errors decide about the others
        assert bits[0] == 1 and clear.sum() > 55
        np.testing.assert_array_equal(bits[1:][clear], (waves[1:] > np.median(waves[1:]))[clear])


def test_mirrored_copies_are_other_images():
    for image in photographs():
        assert hamming(image_hash(image), image_hash(image[:, ::-1])) > NEAR


def test_shape_of_the_array_does_not_matter():
    gray = cv2.cvtColor(photographs()[0], cv2.COLOR_RGB2GRAY)
    assert len({int(image_hash(x)) for x in (gray, gray[:, :, None], np.repeat(gray[:, :, None], 3, 2))}) == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (8, 8), (32, 32), (300, 200)])
@pytest.mark.parametrize("value", (0, 128, 255))
def test_constant_images_have_no_hash(shape, value):
    assert image_hash(np.full((*shape, 3), value, np.uint8)) == 0


def test_detail_that_shrinking_averages_out_has_no_hash():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert image_hash(board) == 0 and image_hash(board[:32, :32]) != 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_images_that_vary_have_a_hash(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[0, 0], image[-1, -1] = 0, 255
    assert (image_hash(image) != 0) == (image.size > 3)


def test_hashes_are_in_the_order_of_the_source_for_any_number_of_threads():
    source, done = load_source("embedded:digits?train=200", "train"), []
    found = hashes(source, threads=1, progress=done.append)
    np.testing.assert_array_equal(found, [image_hash(image) for image in source.read(range(200))])
    np.testing.assert_array_equal(hashes(source, threads=4), found)
    assert found.dtype == np.uint64 and done[-1] == 200


def test_image_that_cannot_be_read_is_named(tmp_path):
    write_images(tmp_path / "cat", 3)
    write_images(tmp_path / "dog", 3)
    source = load_source(f"folder:{tmp_path}", "train")
    (tmp_path / "cat" / "01.png").write_bytes(b"no image")
    (tmp_path / "cat" / "02.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cat/0[12]\.png: cannot be read as an image") as caught:
        hashes(source)
    assert "\n" not in str(caught.value)


def test_thumbnails_are_a_source_of_their_own():
    source = subset(from_arrays(photographs(), [0] * len(photographs())), np.array([2, 0]))
    small = pickle.loads(pickle.dumps(thumbnails(source)))
    assert [image.shape for image in small.read([1, 0])] == [(32, 32, 3)] * 2
    np.testing.assert_array_equal(small.read([1])[0], hashing.thumbnail(photographs()[0]))
    assert small.fingerprint != source.fingerprint and len(small) == 2


# ---- pairs


def brute_force(a, b, distance, nearest):
    found = []
    for j in range(len(b)):
        near = sorted((int(a[i] ^ b[j]).bit_count(), i) for i in range(len(a)) if a[i] and b[j])
        found += [[i, j] for d, i in near if d <= distance][:nearest]
    return found


few_bits = st.lists(st.integers(0, 2**5 - 1).map(lambda x: x * 0x1084210842108421 % 2**64), max_size=14)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(few_bits, few_bits, st.integers(0, 64), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_pairs_equal_brute_force_for_any_tiles(a, b, distance, nearest, rows, columns):
    a, b = np.array(a, np.uint64), np.array(b, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "ROWS", rows)
        patch.setattr(hashing, "COLUMNS", columns)
        pairs = near_pairs(a, b, distance, nearest)
    assert pairs.tolist() == brute_force(a, b, distance, nearest) and pairs.shape[1] == 2


def test_random_hashes_equal_brute_force():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2**64, n, dtype=np.uint64) for n in (5000, 40))
    a[[4, 4990]] = b[7] ^ np.uint64(0b11), b[7]
    pairs = near_pairs(a, b, 20, nearest=3)
    assert pairs.tolist() == brute_force(a, b, 20, 3) and pairs[pairs[:, 1] == 7, 0].tolist()[:2] == [4990, 4]


def test_images_without_a_hash_are_in_no_pair():
    a, b = np.array([0, 5, 0], np.uint64), np.array([0, 5], np.uint64)
    assert near_pairs(a, b, 64).tolist() == [[1, 1]]


def test_memory_does_not_grow_with_the_number_of_near_pairs():
    a, b = np.full(100_000, 7, np.uint64), np.full(32, 7, np.uint64)  # 3.2 million pairs: 77 MB in three columns
    tracemalloc.start()
    pairs = near_pairs(a, b, 10, nearest=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs.tolist() == [[i, j] for j in range(32) for i in range(5)] and peak < 2**24


@pytest.mark.parametrize(
    ("distance", "nearest", "message"),
    [
        (-1, 5, "distance = -1: expected a whole number of bits from 0 to 64"),
        (65, 5, "distance = 65"),
        (2.5, 5, r"distance = 2\.5"),
        (3, 0, "nearest = 0: expected a whole number of at least 1"),
        (3, 1.5, r"nearest = 1\.5"),
    ],
)
def test_limits_out_of_range_are_refused_in_one_line(distance, nearest, message):
    with pytest.raises(InputError, match=message) as caught:
        near_pairs(np.ones(2, np.uint64), np.ones(2, np.uint64), distance, nearest)
    assert "\n" not in str(caught.value)
