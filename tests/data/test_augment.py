"""RandAugment against PIL, random erasing, mixup and cutmix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from jax_transfer.data import augment, mixing, rand_augment, rand_augment_fixmatch
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.records import Batch, Views
from jax_transfer.training.objectives.supervised import supervised

FILL = (124, 116, 104)
HEIGHT, WIDTH = 40, 48
PLAIN = Preprocessing(image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
operate = jax.jit(rand_augment.operate)
augment_jitted = jax.jit(augment.view, static_argnums=(2, 3, 4))


# --- RandAugment


@functools.cache
def _photos():
    """Noise, low contrast, one constant channel, one constant image, and smooth pictures: uint8 [6, 40, 48, 3]."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 5, 6, 3)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(s).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for s in small])
    images[0] = rng.integers(0, 256, images[0].shape)
    images[1] = images[1] // 3 + 60
    images[2, :, :, 1] = 77
    images[3] = 200
    return images


def _pil(name, image, level, negate):
    """Applies the operation as timm does: with PIL, after timm's conversion of a magnitude to PIL's arguments."""
    signed = -level if negate else level
    bilinear, bits = Image.Resampling.BILINEAR, 4 - int(level * 4)

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=FILL)

    def enhance(kind):
        return kind(image).enhance(1 + 0.9 * signed)

    brighter = [min(255, i + int(level * 110)) if i < 128 else i for i in range(256)]
    calls = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(30 * signed, bilinear, fillcolor=FILL),
        "posterize": lambda: ImageOps.posterize(image, bits) if bits else image.point([0] * 768),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256)),
        "solarize_add": lambda: image.point(brighter * 3),
        "color": lambda: enhance(ImageEnhance.Color),
        "contrast": lambda: enhance(ImageEnhance.Contrast),
        "brightness": lambda: enhance(ImageEnhance.Brightness),
        "sharpness": lambda: enhance(ImageEnhance.Sharpness),
        "shear_x": lambda: affine(1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda: affine(1, 0, 0.45 * signed * WIDTH, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 0.45 * signed * HEIGHT),
    }
    return np.asarray(calls[name](), np.float32)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("level", [0.0, 0.33, 0.87, 1.0])
@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_operation_equals_pil(name, level, negate):
    images = _photos()
    n = len(images)
    operation = jnp.full(n, rand_augment.OPERATIONS.index(name))
    pixels, fill = jnp.asarray(images, jnp.float32), jnp.asarray(FILL, jnp.float32)
    found = operate(pixels, operation, jnp.full(n, level), jnp.full(n, negate), fill)
    expected = np.stack([_pil(name, Image.fromarray(image), level, negate) for image in images])
    wrong = np.abs(found - expected)
    # Both truncate to integers: in float32, sums that are integers may fall on either side; at level 1 many do.
    assert wrong.max() <= 1
    assert (wrong > 0).mean() < (0.1 if level == 1 else 0.003)


def test_each_image_has_its_own_operation():
    images = jnp.asarray(_photos(), jnp.float32)
    indices = [rand_augment.OPERATIONS.index(name) for name in ("rotate", "equalize", "color", "invert", "sharpness")]
    operation = jnp.array([*indices, rand_augment.NOTHING])
    fill, level, negate = jnp.asarray(FILL, jnp.float32), jnp.full(6, 0.87), jnp.array([True, False] * 3)
    together = operate(images, operation, level, negate, fill)
    for i in range(6):
        alone = operate(images[i : i + 1], operation[i : i + 1], level[:1], negate[i : i + 1], fill)
        np.testing.assert_array_equal(together[i], alone[0])
    np.testing.assert_array_equal(together[5], images[5])


def test_rand_augment_draws_every_operation_equally_often(monkeypatch):
    drawn = []

    def spy(pixels, operation, level, negate, fill):
        drawn.append([np.asarray(v) for v in (operation, level, negate)])
        return pixels

    monkeypatch.setattr(rand_augment, "operate", spy)
    images, n = jnp.zeros((6000, 1, 1, 3)), len(rand_augment.OPERATIONS)
    rand_augment.rand_augment(jax.random.key(0), images, PLAIN)
    assert len(drawn) == 2
    for operation, level, negate in drawn:
        shares = np.bincount(operation, minlength=n + 1) / len(operation)
        np.testing.assert_allclose(shares[:n], 0.5 / n, atol=0.01)
        assert shares[n] == pytest.approx(0.5, abs=0.03)
        assert np.median(level) == pytest.approx(0.9, abs=0.01) and level.max() == 1
        assert np.quantile(level, 0.1587) == pytest.approx(0.85, abs=0.01)  # a standard deviation below
        assert negate.mean() == pytest.approx(0.5, abs=0.03)
    assert (drawn[0][0] != drawn[1][0]).mean() > 0.5


# --- RandAugment of FixMatch

operate_fixmatch = jax.jit(rand_augment_fixmatch.operate)


def _pil_fixmatch(name, image, magnitude, sign):
    """Applies the operation as FixMatch's public code does, with PIL's defaults: nearest pixels and a black fill."""
    weaker = 0.05 + 0.9 * magnitude / 10

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    calls = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "identity": lambda: image,
        "rotate": lambda: image.rotate(sign * int(30 * magnitude / 10)),
        "posterize": lambda: ImageOps.posterize(image, int(4 * magnitude / 10) + 4),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(256 * magnitude / 10)),
        "color": lambda: ImageEnhance.Color(image).enhance(weaker),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(weaker),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(weaker),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(weaker),
        "shear_x": lambda: affine(1, sign * 0.3 * magnitude / 10, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, sign * 0.3 * magnitude / 10, 1, 0),
        "translate_x": lambda: affine(1, 0, sign * int(0.3 * magnitude / 10 * WIDTH), 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, sign * int(0.3 * magnitude / 10 * HEIGHT)),
    }
    return np.asarray(calls[name](), np.float32)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("magnitude", [1, 5, 9])
@pytest.mark.parametrize("name", rand_augment_fixmatch.POOL)
def test_operation_of_fixmatch_equals_pil(name, magnitude, negate):
    images = _photos()
    n = len(images)
    index = rand_augment.NOTHING if name == "identity" else rand_augment.OPERATIONS.index(name)
    pixels = jnp.asarray(images, jnp.float32)
    found = operate_fixmatch(pixels, jnp.full(n, index), jnp.full(n, magnitude), jnp.full(n, negate))
    sign = -1 if negate else 1
    expected = np.stack([_pil_fixmatch(name, Image.fromarray(image), magnitude, sign) for image in images])
    wrong = np.abs(found - expected)
    if name in ("rotate", "shear_x", "shear_y"):  # of two pixels that are equally near, rounding may choose either
        assert (wrong > 0).mean() < 0.003
    else:
        assert wrong.max() <= 1 and (wrong > 0).mean() < 0.003


def test_fixmatch_draws_operations_magnitudes_and_directions_equally_often(monkeypatch):
    drawn = []

    def spy(pixels, operation, magnitude, negate):
        drawn.append([np.asarray(v) for v in (operation, magnitude, negate)])
        return pixels

    monkeypatch.setattr(rand_augment_fixmatch, "operate", spy)
    rand_augment_fixmatch.rand_augment_fixmatch(jax.random.key(0), jnp.zeros((6000, 1, 1, 3)), PLAIN)
    assert len(drawn) == 2
    unused = {rand_augment.OPERATIONS.index(name) for name in ("invert", "solarize_add")}
    for operation, magnitude, negate in drawn:
        shares = np.bincount(operation, minlength=rand_augment.NOTHING + 1) / len(operation)
        expected = [0 if i in unused else 0.5 / 14 for i in range(rand_augment.NOTHING)]
        np.testing.assert_allclose(shares, [*expected, 0.5 + 0.5 / 14], atol=0.02)
        np.testing.assert_allclose(np.bincount(magnitude, minlength=10)[1:] / len(magnitude), 1 / 9, atol=0.02)
        assert magnitude.min() == 1 and magnitude.max() == 9
        assert negate.mean() == pytest.approx(0.5, abs=0.03)
    assert (drawn[0][0] != drawn[1][0]).mean() > 0.5


def test_fixmatch_covers_a_square_as_pil_draws_it():
    images, side = _photos(), 20
    centres = np.random.default_rng(1).uniform(size=(len(images), 2)).astype(np.float32)
    found = rand_augment_fixmatch.cover(jnp.asarray(images, jnp.float32), jnp.asarray(centres), side)
    for image, (row, column), covered in zip(images, centres, found, strict=True):
        picture = Image.fromarray(image)
        left, top = (int(max(0, at * length - side / 2)) for at, length in ((column, WIDTH), (row, HEIGHT)))
        right, bottom = min(WIDTH, left + side), min(HEIGHT, top + side)
        ImageDraw.Draw(picture).rectangle((left, top, right, bottom), (127, 127, 127))
        np.testing.assert_array_equal(covered, np.asarray(picture))


def test_fixmatch_covers_every_image_by_half_of_its_side(monkeypatch):
    monkeypatch.setattr(rand_augment_fixmatch, "operate", lambda pixels, *_: pixels)
    seen = rand_augment_fixmatch.rand_augment_fixmatch(jax.random.key(0), jnp.ones((400, 32, 32, 3)), PLAIN)
    grey = np.isclose(seen, 127 / 255).all(-1)
    rows, columns = grey.any(2).sum(1), grey.any(1).sum(1)
    assert rows.max() == columns.max() == 17 and rows.min() >= 8 and columns.min() >= 8
    assert (rows == 17).mean() == pytest.approx(0.75, abs=0.07)  # unless the centre lies in the last quarter


# --- random erasing


def test_random_erase_replaces_one_rectangle_with_standard_noise():
    preprocessing = Preprocessing(image_size=32)
    batch = Batch(
        images=np.full((2000, 32, 32, 3), 255, np.uint8), labels=np.zeros(2000, int), mask=np.ones(2000, bool)
    )
    seen = augment_jitted(jax.random.key(0), batch, ("random_erase",), preprocessing, 2)[0]
    white = np.float32((1 - np.array(preprocessing.mean)) / preprocessing.std)
    changed = np.abs(seen - white).max(-1) > 1e-4
    erased = changed.any((1, 2))
    assert erased.mean() == pytest.approx(0.25, abs=0.03)
    rows, columns = changed[erased].any(2), changed[erased].any(1)
    heights, widths = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(changed[erased].sum((1, 2)), heights * widths)  # rectangles
    area, ratio = heights * widths / 32**2, heights / widths
    assert 0.015 < area.min() < 0.05 and 0.3 < area.max() < 0.36
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert ratio.min() < 0.4 and ratio.max() > 2.5 and abs(np.log(ratio).mean()) < 0.1
    assert rows[:, 0].any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()
    noise = np.asarray(seen)[changed]
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.02)


# --- mixing


def _pairs(b=6, side=16, classes=5):
    """Returns (images, targets), where all pixels of image i have the value i + 1."""
    images = jnp.broadcast_to(jnp.arange(1.0, b + 1)[:, None, None, None], (b, side, side, 3))
    return images, jax.nn.one_hot(jnp.arange(b) % classes, classes)


@pytest.mark.parametrize("name", mixing.MIXINGS)
def test_labels_are_mixed_in_proportion_to_pixels(name):
    images, targets = _pairs()
    weights, mix = [], jax.jit(mixing.MIXINGS[name])
    for seed in range(40):
        mixed, labels = mix(jax.random.key(seed), images, targets)
        own = (mixed - images[::-1]) / (images - images[::-1])  # share of the image itself in each pixel
        weight = own.mean((1, 2, 3))
        np.testing.assert_allclose(weight, weight[0], atol=1e-5)  # one mixture for the batch
        np.testing.assert_allclose(labels, weight[0] * targets + (1 - weight[0]) * targets[::-1], atol=1e-5)
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
        weights.append(float(weight[0]))
    assert min(weights) < 0.45 and max(weights) > 0.7


def test_cutmix_pastes_one_rectangle_and_mixup_blends():
    images, targets = _pairs()
    boxes, cutmix = 0, jax.jit(mixing.cutmix)
    for seed in range(30):
        pasted = np.asarray(cutmix(jax.random.key(seed), images, targets)[0])
        other = pasted[0, :, :, 0] == 6
        assert ((pasted[0] == 1) | (pasted[0] == 6)).all()
        assert other.sum() == other.any(0).sum() * other.any(1).sum()
        boxes += other.any()
    assert boxes > 20
    blended = np.asarray(mixing.mixup(jax.random.key(0), images, targets)[0])
    assert 1 < blended[0].min() == blended[0].max() < 6


def test_mixing_weights_follow_the_published_distributions():
    images, targets = jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1), jnp.eye(2)

    def share(function, images):
        return jax.jit(jax.vmap(lambda key: function(key, images, targets)[1][0, 0]))

    keys = jax.random.split(jax.random.key(0), 4000)
    weights = share(mixing.mixup, images)(keys)
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)  # of Beta(0.8, 0.8)
    kept = share(mixing.cutmix, jnp.broadcast_to(images, (2, 64, 64, 1)))(keys)
    # E[1 - area]: a box has the side s = sqrt(u), and s - s^2 / 4 of it lies inside for a uniform centre.
    expected = 1 - np.mean([(s - s**2 / 4) ** 2 for s in np.sqrt((np.arange(1000) + 0.5) / 1000)])
    assert kept.mean() == pytest.approx(expected, abs=0.03)


def test_mixup_and_cutmix_are_chosen_equally_often():
    images, targets = _pairs()
    keys = jax.random.split(jax.random.key(0), 400)
    mixed = jax.jit(jax.vmap(lambda key: mixing.mixup_or_cutmix(key, images, targets)[0]))(keys)
    cut = ((mixed == images) | (mixed == images[::-1])).all((1, 2, 3, 4))
    assert 0.4 < cut.mean() < 0.6


def _batch(b=6):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (b, 32, 32, 3)).astype(np.uint8)
    return Batch(images=images, labels=np.arange(b, dtype=np.int32) % 4, mask=np.ones(b, bool))


def test_labels_change_only_with_mixing():
    batch = _batch()
    _, labels = augment_jitted(jax.random.key(0), batch, ("flip", "rand_augment"), PLAIN, 4)
    np.testing.assert_array_equal(labels, batch.labels)
    images, labels = augment_jitted(jax.random.key(0), batch, ("mixup", "cutmix"), PLAIN, 4)
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    assert labels.shape == (6, 4) and images.shape == (6, 32, 32, 3)


def test_loss_is_linear_in_mixed_labels():
    net = MODELS["resnet10"](num_classes=4, stem="cifar", width=8)
    objective = supervised(net, (), label_smoothing=0.1)
    params, aux = objective.init(jax.random.key(0), None)
    batch = _batch()
    hard = np.eye(4, dtype=np.float32)[batch.labels]

    def value(labels):
        views = {"train": Views((batch.images / np.float32(255),), labels, batch.mask)}
        loss, (_, metrics) = objective.loss(params, aux, views, jax.random.key(0))
        return float(loss), float(metrics["accuracy"])

    (first, own), (second, _) = value(batch.labels), value(batch.labels[::-1])
    mixed, accuracy = value(0.7 * hard + 0.3 * hard[::-1])
    assert mixed == pytest.approx(0.7 * first + 0.3 * second, rel=1e-5) and abs(first - second) > 1e-3
    assert accuracy == own and value(hard) == pytest.approx((first, own))
