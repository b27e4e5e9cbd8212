"""Overlap: pre-training images that nearly equal a test image are found, and no others."""

import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.images import photographs
from jax_transfer.data.hashing import hashes, near_pairs
from jax_transfer.data.source import from_arrays, subset
from jax_transfer.data.sources import load_source
from jax_transfer.records import InputError
from jax_transfer.selection.overlap import candidates, confirmed, find_overlap, pixels


def saved(image, quality=50):
    data = cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def sources(source_images, test_images):
    return (from_arrays(images, [0] * len(images)) for images in (source_images, test_images))


# ---- the search


def test_saved_and_resized_copies_are_found_and_nothing_else():
    photos = photographs()
    small = cv2.resize(photos[2], (96, 80), interpolation=cv2.INTER_AREA)
    source, test = sources([*photos[4:10], saved(photos[1]), small, saved(small)], photos[:4])
    found = find_overlap(source, test, pixels)
    assert sorted(zip(found.source.tolist(), found.test.tolist(), strict=True)) == [(6, 1), (7, 2), (8, 2)]
    assert found.test.tolist() == sorted(found.test) and found.distance[1] <= found.distance[2] <= 10
    assert (found.similarity > 0.95).all() and len(found) == 3 and found.notes == ()


def test_features_are_those_of_the_thumbnails_of_candidates_only():
    photos, seen = photographs(), []

    def features(source):
        seen.append((len(source), {image.shape for image in source.read(range(len(source)))}))
        return np.arange(1.0, len(source) + 1)[:, None] * np.ones((1, 3))

    source, test = sources([*photos[4:10], photos[0], saved(photos[0])], photos[:4])
    found = find_overlap(source, test, features)
    assert seen == [(2, {(32, 32, 3)}), (1, {(32, 32, 3)})] and set(found.source.tolist()) == {6, 7}


def test_features_decide_about_candidates():
    photos = photographs()
    source, test = sources([photos[0], photos[1]], photos[:2])
    opposite = iter((np.eye(2), np.array([[1.0, 0.0], [0.0, -1.0]])))
    found = find_overlap(source, test, lambda images: next(opposite))
    assert found.source.tolist() == found.test.tolist() == [0]


def test_without_candidates_no_features_are_computed():
    source, test = sources(photographs()[:3], photographs()[3:6])
    found = find_overlap(source, test, lambda images: pytest.fail("no features are needed"))
    assert len(found) == 0 and found.source.dtype == np.int64 and found.similarity.shape == (0,)


def test_images_of_a_single_colour_never_count():
    blank = [np.full((20, 30, 3), value, np.uint8) for value in (0, 255, 255)]
    source, test = sources(blank, blank)
    assert len(find_overlap(source, test, pixels, distance=64)) == 0


def test_note_says_when_only_the_nearest_were_compared():
    photos = photographs()
    copies = [saved(photos[0], quality) for quality in range(30, 90, 5)]
    source, test = sources([*copies, photos[1]], photos[:3])
    found = find_overlap(source, test, pixels)
    assert np.bincount(found.test).tolist() == [10, 1]
    (note,) = found.notes
    assert note.startswith("The hashes of 1 of 3 test images are near those of 10 or more images of the source")
    assert find_overlap(source, test, pixels, nearest=20).notes == ()


def test_distances_are_those_of_the_hashes():
    photos = photographs()
    source, test = sources([saved(photo, 10) for photo in photos], photos)
    found = find_overlap(source, test, pixels)
    a, b = hashes(source), hashes(test)
    bits = [int(a[i] ^ b[j]).bit_count() for i, j in zip(found.source, found.test, strict=True)]
    assert found.distance.tolist() == bits and max(bits) > 0


def test_known_hashes_of_the_source_spare_reading_it():
    photos, asked = photographs(), []
    source, test = sources([*photos[4:10], saved(photos[1])], photos[:4])
    read = source.read
    counted = dataclasses.replace(source, read=lambda indices: asked.extend(indices) or read(indices))
    found = find_overlap(counted, test, pixels, source_hashes=hashes(source))
    assert found.source.tolist() == asked == [6] and found.test.tolist() == [1]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"distance": 65}, "distance = 65: expected a whole number of bits"),
        ({"nearest": 0}, "nearest = 0: expected"),
        ({"threshold": 1.1}, r"threshold = 1\.1: expected a cosine from -1 to 1"),
        ({"threshold": float("nan")}, "threshold = nan"),
    ],
)
def test_limits_are_checked_before_an_image_is_read(limits, message):
    source, test = sources(photographs()[:2], photographs()[:2])
    source = dataclasses.replace(source, read=lambda indices: pytest.fail("an image is read"))
    with pytest.raises(InputError, match=message) as caught:
        find_overlap(source, test, pixels, **limits)
    assert "\n" not in str(caught.value)


def test_two_photographs_are_in_both_cifar10_and_caltech101(tfds_dir):
    train, test = load_source("tfds:cifar10", "train"), load_source("tfds:caltech101", "test")
    numbers, others = [6362, 47194], np.arange(0, 50_000, 250)
    source = subset(train, np.concatenate([numbers, others]))
    target = subset(test, np.concatenate([np.arange(0, 6000, 40), [5288, 1628]]))
    found = find_overlap(source, target, pixels)
    assert list(zip(found.source.tolist(), found.test.tolist(), strict=True)) == [(0, 150), (1, 151)]
    assert [target.class_names[label] for label in target.labels[[150, 151]]] == ["emu", "llama"]


def test_digits_are_too_much_alike_for_hashes(tfds_dir):
    source, test = load_source("tfds:mnist?train=3000", "train"), load_source("tfds:mnist?test=100", "test")
    pairs = near_pairs(hashes(source), hashes(test), 10, nearest=3000)
    found = find_overlap(source, test, pixels)
    assert len(pairs) > 1000 and len(found) < len(pairs) / 10 and "nearest were compared" in found.notes[0]


# ---- confirmation


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_confirmation_equals_a_loop_over_the_pairs(data):
    chosen = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, unique=True))
    pairs, seed = np.array(chosen), data.draw(st.integers(0, 99))
    threshold = data.draw(st.floats(-1, 1))
    generator = np.random.default_rng(seed)
    images_a, images_b = candidates(pairs)
    a, b = (generator.normal(size=(len(images), 3)) for images in (images_a, images_b))
    distances = generator.integers(0, 11, len(pairs))
    expected = []
    for (i, j), distance in zip(chosen, distances, strict=True):
        x, y = a[images_a.tolist().index(i)], b[images_b.tolist().index(j)]
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        expected += [(i, j, distance, cosine)] if cosine >= threshold else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_transfer.selection.overlap.CHUNK", 4)
        found = confirmed(pairs, distances, a, b, threshold)
    rows = zip(found.source, found.test, found.distance, found.similarity, strict=True)
    np.testing.assert_allclose(list(rows) or np.zeros((0, 4)), expected or np.zeros((0, 4)), atol=1e-12)


def test_scale_of_features_does_not_matter_even_at_the_limits_of_float32():
    pairs, distances = np.array([[0, 0]]), np.array([0])
    for scale in (1e-30, 1.0, 1e30):
        found = confirmed(pairs, distances, np.full((1, 2), scale, np.float32), np.ones((1, 2), np.float32))
        np.testing.assert_allclose(found.similarity, 1, atol=1e-6)


def test_zero_features_are_similar_to_nothing():
    found = confirmed(np.array([[0, 0]]), np.array([0]), np.zeros((1, 2)), np.zeros((1, 2)), threshold=-1)
    assert found.similarity.tolist() == [0]
    assert len(confirmed(np.array([[0, 0]]), np.array([0]), np.zeros((1, 2)), np.zeros((1, 2)))) == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((3, 2)), np.ones((1, 2)), r"features_a: expected a row for each of 2 candidates, got \[3, 2\]"),
        (np.ones(2), np.ones((1, 2)), r"features_a: expected a row for each of 2 candidates, got \[2\]"),
        (np.ones((2, 2)), np.ones((2, 2)), r"features_b: expected a row for each of 1 candidates, got \[2, 2\]"),
        (np.ones((2, 2)), np.ones((1, 3)), r"features_a \[2, 2\] and features_b \[1, 3\] differ in their dimension"),
        (
            np.array([[1, np.nan], [1, 1]]),
            np.ones((1, 2)),
            r"features_a \[2, 2\] hold 1 values that are NaN or infinite",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused_in_one_line(a, b, message):
    with pytest.raises(InputError, match=message) as caught:
        confirmed(np.array([[3, 0], [5, 0]]), np.array([0, 0]), a, b)
    assert "\n" not in str(caught.value)
