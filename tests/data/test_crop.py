"""Resizing and cropping: pixels equal those of torchvision's and timm's transforms, for all sizes and shapes."""

import math

import numpy as np
import pytest
from PIL import Image

from helpers.images import torchvision_crop
from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.augment import evaluation_view
from jax_transfer.data.batches import Resident, Streamed, make_feed
from jax_transfer.data.sources import from_arrays
from jax_transfer.data.transforms import Preprocessing, resize_square

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LISTED = [(235, 224), (333, 299), (342, 299), (269, 256), (256, 224), (248, 224), (224, 224)]
SMALL = [(host, size) for size in (7, 8, 9, 10) for host in range(size, size + 10)]


def noise(height, width):
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def evaluated_pixels(image, preprocessing):
    view = evaluation_view(preprocessing.square(image)[None], preprocessing)
    return np.round(np.asarray(view[0]) * 255).astype(np.uint8)


@pytest.mark.parametrize(("resize", "crop"), LISTED)
@pytest.mark.parametrize("shape", [(41, 59), (60, 41), (40, 40), (43, 44)])
def test_evaluation_view_equals_torchvision(resize, crop, shape):
    expected = torchvision_crop(Image.fromarray(noise(*shape)), resize, crop)
    assert np.array_equal(evaluated_pixels(noise(*shape), Preprocessing(crop, crop / resize, **PLAIN)), expected)


@pytest.mark.parametrize(("resize", "crop"), SMALL)
def test_crop_equals_torchvision_for_all_size_differences(resize, crop):
    preprocessing = Preprocessing(crop, crop / resize, **PLAIN)
    assert preprocessing.host_size == resize
    wide = [noise(resize, resize + more) for more in range(9)]  # cropped without resizing
    odd = [noise(11, 11 + more) for more in range(0, 12, 3)]
    images = [image for one in wide + odd for image in (one, one.swapaxes(0, 1))]
    views = evaluation_view(np.stack([preprocessing.square(image) for image in images]), preprocessing)
    for image, view in zip(images, np.asarray(views), strict=True):
        expected = torchvision_crop(Image.fromarray(image), resize, crop)
        assert np.array_equal(np.round(view * 255).astype(np.uint8), expected), image.shape


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.94, 0.95, 0.954, 0.965, 1.0])
@pytest.mark.parametrize("size", [160, 224, 299])
def test_crop_equals_timm_for_its_crop_fractions(size, crop_pct):
    resize = math.floor(size / crop_pct)
    expected = torchvision_crop(Image.fromarray(noise(45, 61)), resize, size)
    assert np.array_equal(evaluated_pixels(noise(45, 61), Preprocessing(size, size / resize, **PLAIN)), expected)


def test_training_without_random_crops_uses_the_centre():
    preprocessing = Preprocessing(8, 8 / 11, **PLAIN)
    image = noise(13, 18)
    source = from_arrays([image, noise(12, 12)], [0, 1])
    feed = make_feed(source, preprocessing, devices.make_mesh(), 1.0, 1)
    images, _ = augment.view(None, feed.held, (), preprocessing, 2)
    expected = torchvision_crop(Image.fromarray(image), 11, 8)
    assert np.array_equal(np.round(np.asarray(images[0]) * 255).astype(np.uint8), expected)


def test_resident_and_streamed_feeds_hold_the_same_pixels():
    preprocessing = Preprocessing(10, 10 / 13, **PLAIN)
    images = [noise(20 + i, 37 - 3 * i) for i in range(6)]
    source = from_arrays(images, [0, 1] * 3)
    feeds = [make_feed(source, preprocessing, devices.make_mesh(), gigabytes, 1) for gigabytes in (1.0, 0.0)]
    assert [type(feed) for feed in feeds] == [Resident, Streamed]
    expected = np.stack([torchvision_crop(Image.fromarray(image), 13, 10) for image in images])
    for feed in feeds:
        (batch,) = feed.evaluation_batches(6)
        view = evaluation_view(batch.images, preprocessing)
        assert np.array_equal(np.round(np.asarray(view) * 255).astype(np.uint8), expected)


def test_a_square_without_a_smaller_crop_is_the_centre():
    assert np.array_equal(resize_square(noise(20, 31), 10), torchvision_crop(Image.fromarray(noise(20, 31)), 10, 10))
