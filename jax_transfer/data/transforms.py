"""Decoding and resizing on the host: any image file or array -> uint8 RGB, and squares of one size for the device."""

import dataclasses
import os
import pathlib
import stat
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from jax_transfer.choose import choose
from jax_transfer.records import InputError, printable

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# What PIL's decoders raise on damaged files; OSError covers truncated, unidentified and unreadable ones.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error,
    ArithmeticError, MemoryError,
)  # fmt: skip

# What PIL may take a file for, whatever its name ends in: it knows others, and would start Ghostscript for one of them.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF")

# The largest side of the square that an image is resized to.
MOST_PIXELS = 10_000

# Above this ratio of the sides an image is cut before it is resized: a 1 x 5,000 strip would become gigabytes.
MAX_ASPECT_RATIO = 16


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint expects of its input; stored beside each checkpoint as JSON.

    image_size: side in pixels of the square the model sees. crop_fraction: image_size / side of the resized image,
    0.875 for ImageNet (256 -> 224). mean, std: per RGB channel, of images in [0, 1].
    interpolation: a name in INTERPOLATIONS.

    Raises:
      InputError: for a size, fraction, std or interpolation that cannot be used.
    """

    image_size: int
    crop_fraction: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self):
        if type(self.image_size) is not int or not 1 <= self.image_size <= MOST_PIXELS:
            raise InputError(
                f"preprocessing.image_size must be a whole number from 1 to {MOST_PIXELS:,}, got {self.image_size!r}."
            )
        if not _numbers([self.crop_fraction]) or not self.image_size / MOST_PIXELS <= self.crop_fraction <= 1:
            raise InputError(
                f"preprocessing.crop_fraction must be in (0, 1], and image_size / crop_fraction at most "
                f"{MOST_PIXELS:,}, got {self.crop_fraction!r}."
            )
        if not (_numbers(self.mean, 3) and _numbers(self.std, 3) and min(self.std) > 0):
            raise InputError(
                f"preprocessing.mean and .std must be three numbers each, std > 0, got {self.mean!r} and {self.std!r}."
            )
        if not isinstance(self.interpolation, str):
            raise InputError(f"preprocessing.interpolation must be a name, got {self.interpolation!r}.")
        choose(INTERPOLATIONS, self.interpolation, "interpolation (preprocessing.interpolation)")

    @property
    def host_size(self) -> int:
        """The side in pixels that images have on the host and in device memory."""
        return round(self.image_size / self.crop_fraction)

    def to_json(self) -> dict:
        """A plain dict that `json` writes; `from_json` restores it."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict) -> "Preprocessing":
        """Raises InputError for a missing image_size, and for keys that are no fields or values that are of no use."""
        if not isinstance(values, Mapping):
            raise InputError(f"Preprocessing: expected fields and their values, got {values!r}.")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(names)))
        if unknown or "image_size" not in values:
            problem = f"unknown {', '.join(unknown)}" if unknown else "image_size is missing"
            raise InputError(f"Preprocessing: {problem}. Fields: {', '.join(names)}.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _numbers(values, count: int = 1) -> bool:
    """Whether these are so many finite numbers."""
    if not isinstance(values, tuple | list) or len(values) != count:
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30 for x in values)


def to_uint8_rgb(image: np.ndarray) -> np.ndarray:
    """Gray [h, w] or [h, w, 1], RGB [h, w, 3] or RGBA [h, w, 4] -> uint8 [h, w, 3]; alpha is dropped.

    bool becomes 0 and 255; 16-bit becomes 8-bit by its high byte.

    Raises:
      InputError: for other shapes, and for values whose range is not known from their type (floats, 32-bit).
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"An image must be [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], got {list(image.shape)}.")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    elif image.dtype.kind == "u" and image.dtype.itemsize == 2:
        image = (image >> 8).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise InputError(f"An image must be uint8, uint16 or bool, got {image.dtype}; scale it to uint8 0..255.")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def resize_square(image: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """uint8 [h, w, c] -> uint8 [size, size, 3]: the short side to `size`, then the central square.

    Equals torchvision's Resize(size) and CenterCrop(size) on PIL images, antialiasing included (an image longer than
    MAX_ASPECT_RATIO times its width is cut to that first). An image that already fits is returned as it is.

    Raises:
      InputError: for an unknown interpolation, or an image that `to_uint8_rgb` refuses.
    """
    resampling = choose(INTERPOLATIONS, interpolation, "interpolation")
    image = to_uint8_rgb(image)
    short = min(image.shape[:2])
    image = _centre_crop(image, MAX_ASPECT_RATIO * short, MAX_ASPECT_RATIO * short)
    height, width = image.shape[:2]
    if short != size:
        new_height, new_width = (int(size * side / short) for side in (height, width))
        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), resampling))
    return _centre_crop(image, size, size)


def _centre_crop(image, height, width):
    height, width = min(height, image.shape[0]), min(width, image.shape[1])
    top = round((image.shape[0] - height) / 2)
    left = round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def decode_file(path: str | pathlib.Path) -> np.ndarray:
    """An image file -> uint8 [h, w, 3], turned as its EXIF orientation says; the first frame of an animation.

    Palettes, CMYK, 16-bit gray and alpha (dropped) become RGB.

    Raises:
      InputError: naming the file, if it is empty, damaged, no image, too large (twice PIL's MAX_IMAGE_PIXELS), or
        has pixels without a known range (floating point).
    """
    shown = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("no regular file")
        with Image.open(path, formats=FORMATS) as image:
            return _to_rgb_array(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise InputError(f"{shown}: the image is too large to decode safely ({printable(error)})") from error
    except DECODE_ERRORS as error:
        reason = printable(str(error) or type(error).__name__)
        if isinstance(error, Image.UnidentifiedImageError):
            empty = pathlib.Path(path).stat().st_size == 0
            reason = "the file is empty" if empty else f"not an image of a kind that is read: {', '.join(FORMATS)}"
        raise InputError(f"{shown}: cannot be read as an image ({reason}); replace or remove the file.") from error


def _to_rgb_array(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return to_uint8_rgb(np.asarray(image))
    if image.mode == "I" and image.getextrema()[0] >= 0 and image.getextrema()[1] <= 65535:
        return to_uint8_rgb(np.asarray(image).astype(np.uint16))  # older PILs give 16-bit PNGs this 32-bit mode
    if image.mode in ("I", "F"):
        raise ValueError("32-bit or floating point pixels have no known range; save it as 8-bit")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about going to RGB directly
    return np.asarray(image.convert("RGB"))
