"""Decoding and resizing on the host, and the indices of subsets."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from helpers.images import encoded
from jax_transfer.data import transforms
from jax_transfer.data.containers import pixels_only
from jax_transfer.data.subsets import capped, few_shot, fraction, stratified_split
from jax_transfer.data.transforms import INTERPOLATIONS, Preprocessing, decode_file, resize_square, to_uint8_rgb
from jax_transfer.records import InputError


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def pil_pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def smooth(height=60, width=83):
    return np.asarray(Image.fromarray(noise(8, 9, 3)).resize((width, height), Image.Resampling.BICUBIC))


# ---- JPEG with OpenCV


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_opencv_decodes_plain_jpeg_files_as_pil(mode, options, monkeypatch):
    data, orientation = pixels_only(encoded(Image.fromarray(smooth()).convert(mode), "JPEG", **options))
    assert orientation == 1 and transforms._is_plain_jpeg(data)
    monkeypatch.setattr(transforms.Image, "open", lambda *_, **__: pytest.fail("PIL decodes a plain JPEG file"))
    found = transforms._pixels(data)
    monkeypatch.undo()
    assert np.array_equal(found, pil_pixels(data))


def test_pil_decodes_all_other_files(monkeypatch):
    image = Image.fromarray(smooth())
    plain = encoded(image, "JPEG")
    others = {
        "PNG": encoded(image, "PNG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "truncated": plain[:-2],
        "more data": plain + b"more",
        "a marker within the pixels": plain[:-40] + b"\xff\xc4" + plain[-38:],
    }
    assert not [name for name, data in others.items() if transforms._is_plain_jpeg(data)]
    monkeypatch.setattr(transforms.Image, "MAX_IMAGE_PIXELS", 60 * 83 - 1)
    assert not transforms._is_plain_jpeg(plain)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_jpeg_file_is_decoded_or_refused_as_by_pil(seed, monkeypatch):
    rng, plain = np.random.default_rng(seed), encoded(smooth(), "JPEG")

    def outcome(data):
        try:
            return transforms._pixels(pixels_only(data)[0])
        except transforms.DECODE_ERRORS:
            return None

    for _ in range(60):
        data = bytearray(plain)
        at = int(rng.integers(len(data)))
        if rng.random() < 0.3:
            del data[at : at + int(rng.integers(1, 40))]
        else:
            data[at] = rng.integers(256)
        with monkeypatch.context() as context:
            context.setattr(transforms, "_is_plain_jpeg", lambda data: False)
            expected = outcome(bytes(data))
        found = outcome(bytes(data))
        assert (found is None) == (expected is None) and np.array_equal(found, expected)


# ---- Preprocessing


def test_preprocessing_round_trips_through_json():
    preprocessing = Preprocessing(224, 0.875, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bicubic")
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    assert preprocessing.host_size == 256 and Preprocessing(32).host_size == 32


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "crop_fraction": 1.5}, "crop_fraction"),
        ({"image_size": 8, "std": [0, 1, 1]}, "std"),
        ({"image_size": 8, "interpolation": "cubic"}, "bicubic"),
        ({"image_size": 8, "size": 3}, "unknown size"),
        ({"mean": [0, 0, 0]}, "image_size is missing"),
    ],
)
def test_preprocessing_refuses_invalid_values(values, word):
    with pytest.raises(InputError, match=word):
        Preprocessing.from_json(values)


# ---- to_uint8_rgb


def test_gray_becomes_three_equal_channels():
    gray = noise(4, 5)
    for image in (gray, gray[:, :, None]):
        rgb = to_uint8_rgb(image)
        assert rgb.shape == (4, 5, 3) and all(np.array_equal(rgb[:, :, c], gray) for c in range(3))


def test_transparency_is_blended_with_white():
    rgba = noise(4, 5, 4)
    weight = rgba[:, :, 3:] / 255
    assert np.abs(to_uint8_rgb(rgba) - (rgba[:, :, :3] * weight + 255 * (1 - weight))).max() <= 0.5
    rgba[:, :, 3] = 255
    assert np.array_equal(to_uint8_rgb(rgba), rgba[:, :, :3])


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_a_drawing_in_the_alpha_channel_is_visible(colour):
    drawing = np.dstack([np.full((8, 8, 3), colour, np.uint8), noise(8, 8)])
    assert to_uint8_rgb(drawing).std() > 10


def test_sixteen_bits_and_masks_become_eight_bits():
    assert to_uint8_rgb(np.array([[0, 255, 256, 65535]], np.uint16))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert to_uint8_rgb(np.array([[0, 7, 255, 300]], np.uint16), depth=8)[0, :, 0].tolist() == [0, 7, 255, 255]
    assert to_uint8_rgb(np.array([[0, 15, 16, 4095]], np.uint16), depth=12)[0, :, 0].tolist() == [0, 0, 1, 255]
    assert to_uint8_rgb(np.array([[False, True]]))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)])
def test_images_of_unknown_range_or_shape_are_refused(image):
    with pytest.raises(InputError, match="An image must be"):
        to_uint8_rgb(image)


# ---- resize_square


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_equals_pil(interpolation):
    image = noise(40, 40, 3)
    direct = Image.fromarray(image).resize((24, 24), INTERPOLATIONS[interpolation])
    assert np.array_equal(resize_square(image, 24, interpolation), np.asarray(direct))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 21)])
def test_resize_scales_the_short_side_and_crops_the_centre(shape):
    image = noise(*shape, 3)
    height, width = (int(20 * side / min(shape)) for side in shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 20) / 2), round((width - 20) / 2)
    assert np.array_equal(resize_square(image, 20), whole[top : top + 20, left : left + 20])


def test_resize_keeps_an_image_of_the_right_size():
    image = noise(16, 16, 3)
    assert resize_square(image, 16) is image or np.shares_memory(resize_square(image, 16), image)


@pytest.mark.parametrize("shape", [(1, 5000), (3, 100), (101, 3), (2, 35), (65, 4), (7, 113)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_only_the_central_square_of_a_strip_is_resized(monkeypatch, shape, interpolation):
    image, size = noise(*shape, 3), 20
    height, width = (int(size * side / min(shape)) for side in shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))
    top, left = round((height - size) / 2), round((width - size) / 2)
    expected = whole[top : top + size, left : left + size].astype(int)
    assert np.array_equal(resize_square(image, size, interpolation), expected)  # small enough to be resized as a whole
    monkeypatch.setattr(transforms, "MOST_RESIZED_PIXELS", 0)
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: sizes.append(to) or resize(self, to, *a, **k))
    found = resize_square(image, size, interpolation).astype(int)
    assert sizes == [(size, size)] and np.abs(found - expected).max() <= 1


def test_a_long_strip_is_resized_with_little_memory(monkeypatch):
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: sizes.append(to) or resize(self, to, *a, **k))
    assert resize_square(noise(1, 5000), 224).shape == (224, 224, 3) and sizes == [(224, 224)]


# ---- decode_file


@pytest.mark.parametrize("suffix", ["png", "bmp", "dib", "gif", "webp", "tif", "tiff", "ppm", "pnm"])
def test_lossless_files_decode_to_their_pixels(tmp_path, suffix):
    image = np.repeat(noise(6, 9)[:, :, None], 3, axis=2)
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(decode_file(tmp_path / f"a.{suffix}"), image)


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(decode_file(tmp_path / "red.jpg").astype(int) - [255, 0, 0]).max() <= 4


def test_a_sixteen_bit_png_keeps_its_high_byte(tmp_path):
    gray = noise(6, 5, dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert np.array_equal(decode_file(tmp_path / "a.png")[:, :, 1], gray >> 8)


def test_thirty_two_bit_values_in_range_are_read_as_sixteen_bit(tmp_path):
    gray = noise(6, 5, dtype=np.uint16).astype(np.int32)
    Image.fromarray(gray).save(tmp_path / "a.tif")
    assert np.array_equal(decode_file(tmp_path / "a.tif")[:, :, 1], gray >> 8)
    Image.fromarray(gray + 65_536).save(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"b\.tif.*no known range"):
        decode_file(tmp_path / "b.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_each_mode_becomes_rgb(tmp_path, mode):
    Image.fromarray(noise(6, 5, 3)).convert(mode).save(tmp_path / "a.png")
    image = decode_file(tmp_path / "a.png")
    assert image.shape == (6, 5, 3) and image.dtype == np.uint8


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode_file(tmp_path / "a.png"), np.rot90(image, -1))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("L", (5, 5), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode_file(tmp_path / "a.gif") == 10).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no image at all", "not an image"), (None, "truncated")],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_file_is_named(tmp_path, content, reason, suffix):
    path = tmp_path / f"damaged.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match=f"damaged.{suffix}.*{reason}"):
        decode_file(path)


@pytest.mark.filterwarnings("ignore")  # PIL warns about damaged tags
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_random_damage_raises_only_input_errors(tmp_path, suffix):
    path, generator = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    Image.fromarray(noise(24, 24, 3)).save(path)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = np.frombuffer(whole[: generator.integers(1, len(whole) + 1)], np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 12)] = generator.integers(0, 256, 12)
        path.write_bytes(damaged.tobytes())
        try:
            assert decode_file(path).shape[2] == 3
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png.*too large"):
        decode_file(tmp_path / "bomb.png")


def test_missing_files_and_float_pixels_are_named(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"f\.tif.*floating point"):
        decode_file(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"absent\.png"):
        decode_file(tmp_path / "absent.png")


# ---- subsets

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [600, 300, 90, 10]))
NAMES = ("a", "b", "c", "d")
SUBSETS = {
    "few_shot": lambda seed: few_shot(LABELS, 5, seed, NAMES),
    "capped": lambda seed: capped(LABELS, 100, seed),
    "fraction": lambda seed: fraction(LABELS, 0.25, seed),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_subsets_depend_only_on_the_seed(name):
    chosen = SUBSETS[name](3)
    assert np.array_equal(chosen, SUBSETS[name](3)) and not np.array_equal(chosen, SUBSETS[name](4))


@pytest.mark.parametrize("name", SUBSETS)
def test_subsets_are_sorted_and_unique(name):
    assert (np.diff(SUBSETS[name](0)) > 0).all()


def test_few_shot_is_balanced_and_nested():
    assert np.bincount(LABELS[few_shot(LABELS, 10, 0, NAMES)]).tolist() == [10, 10, 10, 10]
    assert set(few_shot(LABELS, 2, 0, NAMES)) < set(few_shot(LABELS, 7, 0, NAMES))


@pytest.mark.parametrize(("names", "message"), [(NAMES, "'d' has only 10"), ((*NAMES, "e"), "'d' has only 10|'e'")])
def test_few_shot_names_a_class_that_is_too_small(names, message):
    with pytest.raises(InputError, match=message):
        few_shot(LABELS, 11, 0, names)
    with pytest.raises(InputError, match="'e' has only 0"):
        few_shot(LABELS, 1, 0, (*NAMES, "e"))


@pytest.mark.parametrize(
    ("most", "expected"), [(100, [60, 30, 9, 1]), (10, [5, 3, 1, 1]), (4, [1, 1, 1, 1]), (5000, [600, 300, 90, 10])]
)
def test_capped_keeps_the_proportions_and_every_class(most, expected):
    assert np.bincount(LABELS[capped(LABELS, most, 0)]).tolist() == expected


def test_capped_has_the_exact_size_and_stays_balanced():
    labels = np.repeat(np.arange(10), 50)
    for most in (1, 3, 10, 57, 123, 499):
        counts = np.bincount(labels[capped(labels, most, 0)], minlength=10)
        assert counts.sum() == most and counts.max() - counts.min() <= 1


def test_capped_draws_classes_at_random_if_not_all_fit():
    labels = np.repeat(np.arange(100), 20)
    assert {*labels[capped(labels, 20, 0)]} != {*labels[capped(labels, 20, 1)]}


def test_fraction_rounds_to_its_share():
    assert len(fraction(LABELS, 0.25, 0)) == 250 and len(fraction(LABELS, 1.0, 0)) == 1000
    assert len(fraction(LABELS, 1e-9, 0)) == 1


def test_stratified_split_takes_a_fifth_of_each_class():
    train, test = stratified_split(LABELS)
    assert np.bincount(LABELS[test]).tolist() == [120, 60, 18, 2]
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1000))
    assert all(np.array_equal(a, b) for a, b in zip(stratified_split(LABELS), (train, test), strict=True))


def test_stratified_split_keeps_single_images_in_train():
    train, test = stratified_split(np.array([0, 1, 1]))
    assert 0 in train and len(train) == 2 and len(test) == 1
