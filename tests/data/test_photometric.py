"""Changes of colour and sharpness equal torchvision's and PIL's, and the random ones draw what they say."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers import torchvision_transforms
from helpers.source_files import REPOSITORY
from jax_transfer.data import augment, photometric
from jax_transfer.data.transforms import Preprocessing

SIZE = 48
PHOTOS = REPOSITORY.parent / "shared/data/imagenet_samples"
PREPROCESSING = Preprocessing(image_size=SIZE)


def synthetic() -> np.ndarray:
    """Returns noise, a gradient between two colours, and one colour, uint8 [3, SIZE, SIZE, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    line = np.linspace(0, 1, SIZE)[:, None, None] * np.ones((1, SIZE, 1))
    gradient = 255 * (line * np.array([1.0, 0.2, 0.0]) + (1 - line) * np.array([0.0, 0.6, 0.9]))
    return np.stack([noise, gradient, np.full((SIZE, SIZE, 3), (200, 30, 30))]).astype(np.uint8)


@functools.cache
def photographs() -> np.ndarray:
    """Returns photographs, or nothing where the offline data is absent."""
    paths = sorted(path for path in pathlib.Path(PHOTOS).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:8]
    if not paths:
        pytest.skip(f"the offline photographs are not at {PHOTOS}")
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE))) for path in paths])


IMAGES = {"synthetic": synthetic, "photographs": photographs}

# name -> ours, torchvision's function, and its argument; PIL's result is within a grey level but for hue and blur.
CASES = {
    "brightness 0.6": (lambda x: photometric.adjust_brightness(x, 0.6), "adjust_brightness", 0.6),
    "brightness 1.4": (lambda x: photometric.adjust_brightness(x, 1.4), "adjust_brightness", 1.4),
    "contrast 0.6": (lambda x: photometric.adjust_contrast(x, 0.6), "adjust_contrast", 0.6),
    "contrast 1.4": (lambda x: photometric.adjust_contrast(x, 1.4), "adjust_contrast", 1.4),
    "saturation 0.6": (lambda x: photometric.adjust_saturation(x, 0.6), "adjust_saturation", 0.6),
    "saturation 1.4": (lambda x: photometric.adjust_saturation(x, 1.4), "adjust_saturation", 1.4),
    "hue -0.1": (lambda x: photometric.adjust_hue(x, -0.1), "adjust_hue", -0.1),
    "hue 0.1": (lambda x: photometric.adjust_hue(x, 0.1), "adjust_hue", 0.1),
    "gray": (lambda x: jnp.broadcast_to(photometric.luma(x), x.shape), "rgb_to_grayscale", 3),
    "solarize": (photometric.solarize, "solarize", 128 / 255),
    "blur 0.1": (lambda x: photometric.gaussian_blur(x, 0.1, 7), "gaussian_blur", (15, 0.1)),
    "blur 1": (lambda x: photometric.gaussian_blur(x, 1.0, 7), "gaussian_blur", (15, 1.0)),
    "blur 2": (lambda x: photometric.gaussian_blur(x, 2.0, 11), "gaussian_blur", (23, 2.0)),
}


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", CASES)
def test_equals_torchvision(name, images):
    torch = pytest.importorskip("torch")
    if torchvision_transforms.load() is None:
        pytest.skip("torchvision is not installed")
    from torchvision.transforms import functional

    pixels = IMAGES[images]()
    ours, reference, argument = CASES[name]
    arguments = argument if isinstance(argument, tuple) else (argument,)
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    expected = getattr(functional, reference)(x, *arguments).permute(0, 2, 3, 1).numpy()
    assert np.abs(255 * np.asarray(ours(jnp.asarray(pixels) / 255)) - 255 * expected).max() < 0.05


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("hue", "blur"))])
def test_is_within_a_grey_level_of_pil(name, images):
    from PIL import ImageEnhance

    pixels = IMAGES[images]()
    kind, *factor = name.split()
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }

    def pil(image):
        if kind == "gray":
            return image.convert("L").convert("RGB")
        return ImageOps.solarize(image, 128) if kind == "solarize" else enhancers[kind](image).enhance(float(factor[0]))

    expected = np.stack([np.asarray(pil(Image.fromarray(image)), np.float64) for image in pixels])
    assert np.abs(255 * np.asarray(CASES[name][0](jnp.asarray(pixels) / 255)) - expected).max() < 1.5


@pytest.mark.parametrize("shift", [-0.1, 0.05])
def test_hue_equals_colorsys(shift):
    """A reference that is always there, on a few pixels."""
    import colorsys

    pixels = np.random.default_rng(1).random((1, 5, 5, 3)).astype(np.float32)
    pixels[0, 0] = 0.4  # gray has no hue
    turned = np.asarray(photometric.adjust_hue(jnp.asarray(pixels), shift))[0].reshape(-1, 3)
    for pixel, found in zip(pixels[0].reshape(-1, 3), turned, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*map(float, pixel))
        np.testing.assert_allclose(found, colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), atol=1e-5)


def test_parameters_of_each_image_are_its_own():
    x = jnp.asarray(synthetic()) / 255
    factors = jnp.array([0.6, 1.0, 1.4])
    together = photometric.gaussian_blur(photometric.adjust_hue(x, factors - 1), factors - 0.6, 7)
    for i in range(3):
        alone = photometric.gaussian_blur(photometric.adjust_hue(x[i : i + 1], factors[i] - 1), factors[i] - 0.6, 7)
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)
    np.testing.assert_array_equal(photometric.gaussian_blur(x, 0.0, 7), x)  # no blur


@pytest.mark.parametrize(("name", "saturation"), [("jitter", 0.4), ("jitter_byol", 0.2)])
def test_jitter_is_a_product_of_its_four_changes_in_some_order(name, saturation):
    """Each image equals one of the 24 orders with the drawn parameters, and all four positions of the hue occur."""
    import itertools

    b, key = 64, jax.random.key(3)
    x = jnp.broadcast_to(jnp.asarray(synthetic()[1:2]) / 255, (b, SIZE, SIZE, 3))[:, ::8, ::8]
    found = np.asarray(functools.partial(augment.AUGMENTATIONS[name], probability=1.0)(key, x, None))
    key_factors, key_shift, *_ = jax.random.split(key, 4)
    strengths = np.float32([[0.4], [0.4], [saturation]])
    factors = jax.random.uniform(key_factors, (3, b), minval=1 - strengths, maxval=1 + strengths)
    shifts = jax.random.uniform(key_shift, (b,), minval=-0.1, maxval=0.1)
    changes = [
        lambda x: photometric.adjust_brightness(x, factors[0]),
        lambda x: photometric.adjust_contrast(x, factors[1]),
        lambda x: photometric.adjust_saturation(x, factors[2]),
        lambda x: photometric.adjust_hue(x, shifts),
    ]
    orders = list(itertools.permutations(range(4)))
    results = [np.asarray(functools.reduce(lambda x, i: changes[i](x), order, x)) for order in orders]
    errors = np.stack([np.abs(result - found).max((1, 2, 3)) for result in results])
    assert errors.min(0).max() < 1e-5
    assert {orders[i].index(3) for i in errors.argmin(0)} == {0, 1, 2, 3}


RANDOM = {
    "jitter": 0.8,
    "jitter_byol": 0.8,
    "gray": 0.2,
    "blur": 0.5,
    "blur_always": 1.0,
    "blur_rarely": 0.1,
    "solarize": 0.2,
}


@pytest.mark.parametrize("name", RANDOM)
def test_share_of_changed_images_and_range_of_values(name):
    b = 1500
    pixels = np.random.default_rng(0).random((1, 12, 12, 3)).astype(np.float32)
    x = jnp.asarray(np.broadcast_to(pixels, (b, 12, 12, 3)))
    change = jax.jit(lambda key: augment.AUGMENTATIONS[name](key, x, PREPROCESSING))
    changed = change(jax.random.key(0))
    assert changed.dtype == jnp.float32 and changed.shape == x.shape
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
    share = float((jnp.abs(changed - x).max((1, 2, 3)) > 1e-6).mean())
    spread = 4 * (RANDOM[name] * (1 - RANDOM[name]) / b) ** 0.5
    assert abs(share - RANDOM[name]) <= spread + (0.05 if "blur" in name else 0)  # the weakest blurs change nothing
    np.testing.assert_array_equal(changed, change(jax.random.key(0)))
    assert (np.asarray(changed) != np.asarray(change(jax.random.key(1)))).any()


def test_blur_of_tiny_images_is_cut_off_at_their_size():
    assert augment.blur(jax.random.key(0), jnp.ones((2, 3, 3, 3)), PREPROCESSING).shape == (2, 3, 3, 3)
