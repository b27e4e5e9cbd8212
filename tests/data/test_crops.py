"""Random crops of full images: boxes as torchvision draws them, and the same windows whatever the feed."""

import dataclasses
import itertools
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers import torchvision_transforms
from helpers.images import encoded
from helpers.source_files import REPOSITORY
from helpers.studies import environment, tiny_config
from helpers.training_parts import assert_equal_trees
from jax_transfer import devices
from jax_transfer.data import augment, crops
from jax_transfer.data.batches import Resident, ResidentCrops, Streamed, epochs_order, joined, make_feed
from jax_transfer.data.crops import ATTEMPTS, CROPS, Crop, crops_of
from jax_transfer.data.source import from_arrays, of_classes, subset
from jax_transfer.data.transforms import INTERPOLATIONS, Preprocessing, decode_file
from jax_transfer.records import InputError
from jax_transfer.study import checks

PHOTOS = pathlib.Path(REPOSITORY.parent / "shared" / "data" / "imagenet_samples")
SMALL = Preprocessing(image_size=16, crop_fraction=0.8)
CROP = CROPS["resized_crop"]


def photos(count):
    """Returns the pixels of the first offline photos; skips the test if there are none."""
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    return [decode_file(path) for path in sorted(PHOTOS.iterdir())[:count]]


def pictures(n=22, sides=(40, 40)):
    """Returns a source of n smooth random pictures in 2 classes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (n, 6, 6, 3)).astype(np.uint8)
    size = sides[::-1]
    images = [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in noise]
    return from_arrays(images, np.arange(n) % 2)


def mixed_pictures():
    """Returns a source of 12 pictures of different sizes."""
    rng = np.random.default_rng(1)
    sides = [(20, 70), (70, 20), (33, 47), (50, 50), (21, 24), (64, 30)] * 2
    return from_arrays([rng.integers(0, 256, (*side, 3)).astype(np.uint8) for side in sides], [0, 1] * 6)


def feed_of(source, gigabytes=1.0, views=(CROP,), preprocessing=SMALL):
    return make_feed(source, preprocessing, devices.make_mesh(), gigabytes, num_threads=2, crops=views)


def batches_of(feed, steps=range(4), count=1, seed=3, batch_size=8):
    """Returns the batches of training steps, on the host."""
    fetch = jax.jit(feed.fetch)
    return [
        jax.device_get(fetch(feed.held, jax.tree.map(lambda x, i=i: x[i], items)))
        for items in feed.items(steps, count, seed, batch_size)
        for i in range(count)
    ]


def torchvision_box(uniforms, height, width, crop):
    """Returns the box of torchvision's RandomResizedCrop.get_params, with `uniforms` as its random numbers."""
    area, log_ratio = height * width, (math.log(crop.ratio[0]), math.log(crop.ratio[1]))
    for attempt in range(ATTEMPTS):
        target_area = area * (crop.area[0] + (crop.area[1] - crop.area[0]) * uniforms[attempt])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniforms[ATTEMPTS + attempt])
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(uniforms[-2] * (height - h + 1)), int(uniforms[-1] * (width - w + 1)), h, w]
    if width / height < min(crop.ratio):
        w, h = width, max(round(width / min(crop.ratio)), 1)
    elif width / height > max(crop.ratio):
        w, h = max(round(height * max(crop.ratio)), 1), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


# --- boxes


@pytest.mark.parametrize("crop", [*CROPS.values(), Crop(area=(0.9, 1.0), ratio=(2.0, 3.0))])
@pytest.mark.parametrize("sides", [(375, 500), (500, 333), (32, 32), (10, 300), (300, 10), (1, 1), (3, 2)])
def test_boxes_are_those_of_torchvision(crop, sides):
    uniforms = crops.draws(seed=1, step=2, batch_size=200)
    heights, widths = (np.full(200, side) for side in sides)
    found = crops.boxes(crop, uniforms, heights, widths)
    assert found.tolist() == [torchvision_box(row, *sides, crop) for row in uniforms]
    assert (found[:, :2] >= 0).all() and (found[:, :2] + found[:, 2:] <= sides).all() and (found[:, 2:] > 0).all()


def test_area_is_uniform_and_ratio_log_uniform():
    n = 20_000
    found = crops.boxes(CROP, crops.draws(0, 0, n), np.full(n, 1000), np.full(n, 1000)).astype(float)
    area, ratio = found[:, 2] * found[:, 3] / 1e6, np.log(found[:, 3] / found[:, 2])
    small = area < 0.7  # larger boxes are drawn again more often
    np.testing.assert_allclose(np.quantile(area[small], [0.25, 0.5, 0.75]), [0.235, 0.39, 0.545], atol=0.01)
    np.testing.assert_allclose(
        np.quantile(ratio[small] / np.log(4 / 3), [0.01, 0.25, 0.5, 0.75, 0.99]), [-0.98, -0.5, 0, 0.5, 0.98], atol=0.04
    )
    at = found[:, :2] / np.maximum(1000 - found[:, 2:], 1)
    np.testing.assert_allclose(np.quantile(at, [0.1, 0.5, 0.9], axis=0), [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.02)


def test_draws_differ_between_seeds_steps_windows_and_images():
    found = [crops.draws(seed, step, 8, w) for seed, step, w in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))]
    rows = np.concatenate(found)
    assert len(np.unique(rows)) == rows.size and (rows >= 0).all() and (rows < 1).all()
    np.testing.assert_array_equal(found[0], crops.draws(0, 0, 8))
    np.testing.assert_array_equal(found[0][:4], crops.draws(0, 0, 4))
    # Fixed numbers: a resumed training must see the same windows with another version of numpy.
    np.testing.assert_allclose(
        crops.draws(7, 3, 1)[0, :3], [0.9616448673200216, 0.18550538095640934, 0.1206330851739904], atol=1e-15
    )


# --- windows


@pytest.mark.parametrize("interpolation", crops.FILTERS)
@pytest.mark.parametrize("size", [224, 96])
def test_windows_of_photos_equal_pil(interpolation, size):
    images = photos(12)
    for i, image in enumerate(images):
        sides = np.array(image.shape[:2])
        box = crops.boxes(CROP, crops.draws(0, i, 1), sides[:1], sides[1:])[0]
        top, left, height, width = (int(x) for x in box)
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(cut.resize((size, size), INTERPOLATIONS[interpolation]))
        np.testing.assert_array_equal(crops.window(image, box, size, interpolation), expected)
        on_device = np.asarray(crops.windows(image[None], box[None], size, interpolation))[0]
        wrong = np.abs(on_device.astype(int) - expected)
        if interpolation in ("bilinear", "hamming"):
            assert wrong.max() <= 1
        assert (wrong > 1).mean() < 0.01  # clipped between PIL's passes


def test_windows_of_photos_equal_torchvision():
    images = photos(12)
    transforms = torchvision_transforms.load()
    if transforms is None:
        pytest.skip("torchvision is not installed")
    for i, image in enumerate(images):
        sides = np.array(image.shape[:2])
        box = crops.boxes(CROP, crops.draws(0, i, 1), sides[:1], sides[1:])[0]
        expected = transforms.functional.resized_crop(Image.fromarray(image), *box.tolist(), [224, 224])
        np.testing.assert_array_equal(crops.window(image, box, 224, "bilinear"), np.asarray(expected))


def test_a_gray_image_with_transparency_or_16_bits_is_cropped_after_conversion(tmp_path):
    gray = np.random.default_rng(0).integers(0, 2**16, (30, 20)).astype(np.uint16)
    (tmp_path / "gray.png").write_bytes(encoded(gray, "PNG"))
    cmyk = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 4)).astype(np.uint8), "CMYK")
    (tmp_path / "cmyk.jpg").write_bytes(encoded(cmyk, "JPEG"))
    images = [decode_file(tmp_path / name) for name in ("gray.png", "cmyk.jpg")]
    images += [gray[:, :, None], np.zeros((30, 20), bool), np.full((30, 20, 4), 200, np.uint8)]
    feeds = [feed_of(from_arrays(images, [0, 1, 0, 1, 0]), gigabytes) for gigabytes in (1.0, 0.0)]
    resident, streamed = (batches_of(feed, range(1), batch_size=5)[0].windows[0] for feed in feeds)
    assert resident.shape == (5, 16, 16, 3)
    assert np.abs(resident.astype(int) - streamed).max() <= 1


# --- feeds


@pytest.mark.parametrize("source", [pictures(), pictures(sides=(60, 41)), mixed_pictures()])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resident_and_streamed_feeds_show_the_same_windows(source, interpolation):
    preprocessing = dataclasses.replace(SMALL, interpolation=interpolation)
    resident, streamed = (feed_of(source, gigabytes, preprocessing=preprocessing) for gigabytes in (1.0, 0.0))
    assert isinstance(resident, ResidentCrops) and isinstance(streamed, Streamed)
    for a, b in zip(batches_of(resident), batches_of(streamed), strict=True):
        wrong = np.abs(a.windows[0].astype(int) - b.windows[0])
        assert (wrong > 1).mean() < (1e-9 if interpolation == "bilinear" else 0.02)
        assert wrong.max() < 30
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.images is None and b.images is None


def test_streamed_windows_are_cut_from_the_full_image():
    source = pictures(sides=(60, 90))
    (batch,) = batches_of(feed_of(source, 0.0), range(5, 6), batch_size=4)
    chosen = epochs_order(len(source), range(5, 6), 3, 4)[0]
    for i, image in enumerate(source.read(chosen)):
        top, left, height, width = torchvision_box(crops.draws(3, 5, 4)[i], 60, 90, CROP)
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(batch.windows[0][i], np.asarray(cut.resize((16, 16), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_windows_depend_neither_on_steps_per_call_nor_on_where_training_resumes(gigabytes, count):
    feed = feed_of(pictures(), gigabytes)
    whole = batches_of(feed, range(12))
    assert_equal_trees(whole, batches_of(feed, range(12), count))
    assert_equal_trees(whole[5:], batches_of(feed, range(5, 12)))  # the third step of an epoch
    assert all((a.windows[0] != b.windows[0]).any() for a, b in itertools.pairwise(whole))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_two_crops_are_different_windows_of_the_same_images(gigabytes):
    one, two = feed_of(pictures(), gigabytes), feed_of(pictures(), gigabytes, (CROP, CROP))
    for a, b in zip(batches_of(one), batches_of(two), strict=True):
        np.testing.assert_array_equal(a.windows[0], b.windows[0])
        assert (b.windows[0] != b.windows[1]).any()
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_each_view_of_a_feed_has_its_own_crop(gigabytes):
    source = pictures(sides=(60, 90))
    views = (("global_crop", "flip"), ("local_crop",), (), ("resized_crop_90",))
    (batch,) = batches_of(feed_of(source, gigabytes, crops_of(views)), range(5, 6), batch_size=4)
    assert len(batch.windows) == 3 and batch.images is not None
    images = source.read(epochs_order(len(source), range(5, 6), 3, 4)[0])
    for i, name in enumerate(("global_crop", "local_crop", "resized_crop_90")):
        boxes = crops.boxes(CROPS[name], crops.draws(3, 5, 4, window=i), np.full(4, 60), np.full(4, 90))
        expected = [crops.window(image, box, 16, "bilinear") for image, box in zip(images, boxes, strict=True)]
        assert np.abs(batch.windows[i].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
@pytest.mark.parametrize("sides", [(40, 60), (20, 20)])
def test_a_view_without_a_crop_shows_the_square(gigabytes, sides):
    source = pictures(sides=sides)
    views = (("flip",), ("resized_crop",), ())
    feed, plain = feed_of(source, gigabytes, crops_of(views)), feed_of(source, gigabytes, ())
    assert isinstance(plain, Resident if gigabytes else Streamed)
    for a, b in zip(batches_of(feed), batches_of(plain), strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        seen = augment.views(jax.random.key(0), {"train": a}, {"train": views}, SMALL, {"train": 2})["train"].images
        without = augment.views(jax.random.key(0), {"train": b}, {"train": views[:1]}, SMALL, {"train": 2})["train"]
        np.testing.assert_array_equal(seen[0], without.images[0])
        np.testing.assert_array_equal(seen[1], augment.evaluation_view(a.windows[0], SMALL))
        np.testing.assert_array_equal(seen[2], augment.evaluation_view(b.images, SMALL))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
@pytest.mark.parametrize("views", [(CROP,), (CROP, None)])
@pytest.mark.parametrize("sides", [(40, 60), (20, 20)])
def test_evaluation_of_a_feed_with_crops_sees_the_squares(gigabytes, views, sides):
    source = pictures(sides=sides)
    for a, b in zip(*(feed_of(source, gigabytes, crop).evaluation_batches(8) for crop in (views, ())), strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(np.asarray(a.images)[a.mask], np.asarray(b.images)[b.mask])
        np.testing.assert_array_equal(a.labels[a.mask], b.labels[b.mask])


def test_pictures_that_are_squares_are_held_once():
    feed = feed_of(pictures(sides=(20, 20)), views=(CROP, None))
    assert feed.held["batch"].images is feed.held["whole"] and isinstance(feed.squares, Resident)


def test_a_resident_data_set_keeps_what_fits():
    source = pictures(n=10, sides=(60, 90))
    bytes_of = lambda side: 10 * 3 * side**2 / 1e9  # noqa: E731
    shapes = {feed_of(source, bytes_of(side) + 1e-9).held["whole"].shape[1:3] for side in (100, 90)}
    assert shapes == {(60, 90)}  # never larger than the images
    feed = feed_of(source, bytes_of(50) + 1e-9)
    assert feed.held["whole"].shape == (10, 50, 50, 3) and str(feed) == "keeps 50 x 50 of up to 60 x 90 pixels"
    assert feed.is_reduced and not feed_of(source).is_reduced
    assert isinstance(feed_of(source, bytes_of(SMALL.host_size) + 1e-9), ResidentCrops)
    assert isinstance(feed_of(source, bytes_of(SMALL.host_size - 1) + 1e-9), Streamed)
    exact = batches_of(feed_of(source, 0.0), range(1))[0].windows[0]
    found = batches_of(feed, range(1))[0].windows[0]
    assert np.abs(exact.astype(int) - found).mean() < 3  # the same part of the same pictures


def test_subsets_and_classes_keep_their_full_images():
    source = pictures(n=40, sides=(50, 70))
    for part in (subset(source, np.arange(5, 30)), of_classes(source, [1])):
        a, b = (batches_of(feed_of(part, gigabytes), range(2))[1].windows[0] for gigabytes in (1.0, 0.0))
        assert np.abs(a.astype(int) - b).max() <= 1


def test_a_streamed_call_holds_few_large_or_many_small_images():
    source, mesh = pictures(), devices.make_mesh()

    def most(size, batch_size, views=(CROP,)):
        return Streamed(source, Preprocessing(size, 0.875), mesh, 1, views).max_steps(batch_size)

    assert most(224, 256) == most(224, 256, ()) == most(224, 4096) == 1
    assert most(32, 128) == most(64, 256) == 16
    assert joined({"train": (feed_of(source, 0.0), 8)}).max_steps == 16


def test_an_interpolation_without_weights_is_refused():
    with pytest.raises(InputError, match=r"preprocessing\.interpolation.*nearest.*bicubic"):
        feed_of(pictures(), preprocessing=Preprocessing(16, interpolation="nearest"))


@pytest.mark.parametrize("field", ["pretrain", "finetune"])
def test_a_crop_must_be_the_first_augmentation(field):
    config = tiny_config(**{f"{field}__augment": ("flip", "resized_crop")})
    with pytest.raises(InputError, match=rf"config\.{field}\.augment lists 'resized_crop' after 'flip'"):
        checks.check(config)
    checks.check(tiny_config(**{f"{field}__augment": ("resized_crop", "flip")}))


# --- devices and processes

SCRIPT = """
import sys
import jax, numpy as np
from jax_transfer import devices
devices.join_processes(*[None, None, None] if len(sys.argv) < 4 else [sys.argv[2], 2, int(sys.argv[3])])
sys.path += ["tests", "tests/data"]
import test_crops
mesh = devices.make_global_mesh()
for gigabytes in (1.0, 0.0):
    feed = test_crops.make_feed(
        test_crops.mixed_pictures(), test_crops.SMALL, mesh, gigabytes, 1, crops=(test_crops.CROP, None)
    )
    one = jax.jit(lambda held, items: feed.fetch(held, jax.tree.map(lambda x: x[0], items)),
                  out_shardings=devices.replicated(mesh))
    found = [jax.device_get(one(feed.held, items)) for items in feed.items(range(3), 1, 5, 8)]
    if devices.is_first_process():
        np.savez(f"{sys.argv[1]}/{gigabytes}.npz", *jax.tree.leaves(found))
"""


@pytest.mark.slow
def test_windows_do_not_depend_on_devices_and_processes(tmp_path):
    running = []
    for name, count, processes in (("one", 1, 1), ("eight", 8, 1), ("two", 1, 2)):
        (tmp_path / name).mkdir()
        for i in range(processes):
            flags = f"--xla_force_host_platform_device_count={count}"
            more = [f"127.0.0.1:{20_000 + os.getpid() % 20_000}", str(i)] if processes > 1 else []
            command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), *more]
            running.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment(XLA_FLAGS=flags)))
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    for gigabytes in (1.0, 0.0):
        one, *others = (np.load(tmp_path / name / f"{gigabytes}.npz") for name in ("one", "eight", "two"))
        for other in others:
            assert_equal_trees(dict(one), dict(other))


def test_the_compiled_step_without_crops_has_no_windows():
    feed = feed_of(pictures(), views=())
    (batch,) = batches_of(feed, range(1))
    assert batch.windows == () and len(jax.tree.leaves(batch)) == 3
    assert jnp.shape(batch.images) == (8, SMALL.host_size, SMALL.host_size, 3)
