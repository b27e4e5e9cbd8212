"""Decodes and resizes images on the host: every image file or array becomes a uint8 RGB square of the same size.

The model sees the same pixels as after torchvision's Resize and CenterCrop. `crop_start` computes where a centre crop
begins, both for the square that the host keeps and for the part of this square that the device crops.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFile

from jax_transfer.choose import choose
from jax_transfer.data.containers import UPRIGHT, pixels_only
from jax_transfer.records import InputError, printable

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Errors that PIL's decoders raise on damaged files; OSError covers truncated, unidentified and unreadable files.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error,
    ArithmeticError, MemoryError,
)  # fmt: skip

# The formats that PIL may detect, whatever the extension of the file. PIL's other formats are disabled, since it runs
# Ghostscript for one of them.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")

# Part of the fingerprint of data sets, since two versions may decode the same file to different pixels. Version 2
# ignores the metadata of files, places transparent images on white, and keeps weak 16-bit values visible.
DECODING_VERSION = 2

MOST_BYTES = 2**31  # size of the largest file that is read

# An image whose 16-bit values are all below this uses less than 1/16 of their range: its values have 8 to 12 bits and
# are stored with 16.
WEAK_PEAK = 2**12

# The largest side of the square to which images are resized.
MOST_PIXELS = 10_000

# An image is a strip if it would have more pixels than this after resizing, and more than four times as many as the
# square. Only the square of a strip is computed, since an image of 1 x 5,000 pixels would grow to gigabytes.
MOST_RESIZED_PIXELS = 2**24


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How to preprocess images for a checkpoint; stored with each checkpoint as JSON.

    Attributes:
      image_size: side in pixels of the square that the model sees.
      crop_fraction: image_size divided by the side of the resized image, in (0, 1]; 0.875 for ImageNet (256 -> 224).
      mean, std: mean and standard deviation of each RGB channel, for images in [0, 1].
      interpolation: a key of INTERPOLATIONS.

    Raises:
      InputError: if a field has an invalid value.

    >>> Preprocessing(image_size=224, crop_fraction=0.875).host_size
    256
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
                f"preprocessing.mean and .std must each be three numbers, with std > 0, got {self.mean!r} and "
                f"{self.std!r}."
            )
        if not isinstance(self.interpolation, str):
            raise InputError(f"preprocessing.interpolation must be a string, got {self.interpolation!r}.")
        choose(INTERPOLATIONS, self.interpolation, "interpolation (preprocessing.interpolation)")

    @property
    def host_size(self) -> int:
        """Side in pixels of the images on the host and in device memory, before the centre crop."""
        return round(self.image_size / self.crop_fraction)

    @property
    def reading(self) -> "Preprocessing":
        """The preprocessing with the default mean and std, which the host does not use.

        Preprocessings with equal `reading` can share decoded images.
        """
        return Preprocessing(self.image_size, self.crop_fraction, interpolation=self.interpolation)

    def square(self, image: np.ndarray) -> np.ndarray:
        """Does the host's work: resizes an image [h, w, c] to uint8 [host_size, host_size, 3], see `resize_square`."""
        return resize_square(image, self.host_size, self.interpolation, self.image_size)

    def to_json(self) -> dict:
        """Returns a plain dict that `json` can write and from which `from_json` restores the preprocessing.

        >>> Preprocessing.from_json(Preprocessing(image_size=32).to_json()) == Preprocessing(image_size=32)
        True
        """
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict) -> "Preprocessing":
        """Restores a preprocessing from the result of `to_json`.

        Raises:
          InputError: if image_size is missing, a key is not a field, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"Preprocessing: expected a mapping from fields to values, got {values!r}.")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(names)))
        if unknown or "image_size" not in values:
            problem = f"unknown {', '.join(unknown)}" if unknown else "image_size is missing"
            raise InputError(f"Preprocessing: {problem}. Fields: {', '.join(names)}.")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


def _numbers(values, count: int = 1) -> bool:
    """Returns whether `values` is a list or tuple of `count` finite numbers."""
    if not isinstance(values, tuple | list) or len(values) != count:
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30 for x in values)


def crop_start(length: int, size: int) -> int:
    """Returns the index of the first of the `size` central pixels among `length`.

    Ties are rounded to even, as in the CenterCrop of torchvision and timm.

    >>> crop_start(256, 224), crop_start(5, 2)
    (16, 2)
    """
    return round((length - size) / 2)


def sixteen_bit_depth(peak: int) -> int:
    """Returns the number of bits that 16-bit values up to `peak` use: 8 to 12 if it is below WEAK_PEAK, else 16.

    >>> sixteen_bit_depth(100), sixteen_bit_depth(1023), sixteen_bit_depth(60_000)
    (8, 10, 16)
    """
    return max(8, peak.bit_length()) if peak < WEAK_PEAK else 16


def to_uint8_rgb(image: np.ndarray, depth: int = 16) -> np.ndarray:
    """Converts gray [h, w] or [h, w, 1], RGB [h, w, 3] or RGBA [h, w, 4] pixels to uint8 [h, w, 3].

    Transparent images are placed on white, or on black if only the transparency varies and a white background would
    give a single colour (a white drawing). Transparency that hides the whole image is ignored. bool becomes 0 and 255.
    If values have 16 bits, of which `depth` are used, the highest 8 of these are kept.

    Raises:
      InputError: if the image has another shape, or a dtype whose range of values is unknown (floats, 32-bit integers).

    >>> import numpy as np
    >>> to_uint8_rgb(np.array([[False, True]])).tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"An image must be [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], got {list(image.shape)}.")
    colours, alpha = image[:, :, :3], image[:, :, 3 + is_hidden(image) :]
    if image.dtype == np.bool_:
        colours, alpha = (part.astype(np.uint8) * 255 for part in (colours, alpha))
    elif image.dtype.kind == "u" and image.dtype.itemsize == 2:
        bits = sixteen_bit_depth(int(alpha.max())) if alpha.size else 16  # may differ from those of the colours
        colours, alpha = (
            np.minimum(part >> (used - 8), 255).astype(np.uint8) for part, used in ((colours, depth), (alpha, bits))
        )
    elif image.dtype != np.uint8:
        raise InputError(f"An image must be uint8, uint16 or bool, got {image.dtype}; scale it to uint8 0..255.")
    if alpha.size and alpha.min() < 255:
        white = _over(colours, alpha, 255)
        return _over(colours, alpha, 0) if alpha.min() < alpha.max() and is_constant(white) else white
    return np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours


def _over(colours: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    """Composites colours with alpha over a uniform background."""
    weights = alpha.astype(np.uint16)
    return ((colours * weights + background * (255 - weights) + 127) // 255).astype(np.uint8)


def is_transparent(image: np.ndarray) -> bool:
    """Returns whether a uint8 or uint16 image [h, w, c] has pixels that are not opaque."""
    alpha = image[:, :, 3:]
    if not alpha.size:
        return False
    bits = 8 if alpha.dtype == np.uint8 else sixteen_bit_depth(int(alpha.max()))
    return int(alpha.min()) >> (bits - 8) < 255


def is_hidden(image: np.ndarray) -> bool:
    """Returns whether an image [h, w, c] is fully transparent although its colours vary, which is a mistake."""
    return image.shape[2] == 4 and not image[:, :, 3].any() and not is_constant(image[:, :, :3])


def is_constant(image: np.ndarray) -> bool:
    """Returns whether all pixels of an image [h, w, c] are equal."""
    corner = image[:1, :1]
    return bool((image[::8, ::8] == corner).all() and (image == corner).all())  # a few pixels suffice in most cases


def resize_square(
    image: np.ndarray, size: int, interpolation: str = "bilinear", image_size: int | None = None
) -> np.ndarray:
    """Resizes the short side of an image [h, w, c] to `size` and crops a square around the centre.

    The device may crop the `image_size` pixels that begin at `crop_start(size, image_size)`. This crop equals the
    result of torchvision's Resize(size) and CenterCrop(image_size) on PIL images, including antialiasing, for every
    size and shape. For a strip (see MOST_RESIZED_PIXELS), only the square is computed, which can change values by 1. If
    the short side of an image is `size`, the image is not resampled.

    Args:
      size: side of the result in pixels.
      interpolation: a key of INTERPOLATIONS.
      image_size: side of the centre crop that is taken later; `size` by default.

    Returns:
      uint8 [size, size, 3].

    Raises:
      InputError: if the interpolation is unknown, or `to_uint8_rgb` rejects the image.

    >>> import numpy as np
    >>> resize_square(np.zeros((20, 30), np.uint8), 10).shape
    (10, 10, 3)
    """
    resampling = choose(INTERPOLATIONS, interpolation, "interpolation")
    image = to_uint8_rgb(image)
    sides = image.shape[:2]
    short = min(sides)
    height, width = (int(size * side / short) for side in sides)  # the short side becomes exactly `size`
    crop = image_size or size
    top, left = (crop_start(side, crop) - crop_start(size, crop) for side in (height, width))
    if height * width > max(MOST_RESIZED_PIXELS, 4 * size * size):
        return _resize_window(image, (height, width), (top, left), size, resampling)
    if short != size:
        image = np.asarray(Image.fromarray(image).resize((width, height), resampling))
    return image[top : top + size, left : left + size]


def _resize_window(image, resized: tuple[int, int], corner: tuple[int, int], size: int, resampling) -> np.ndarray:
    """Computes the square at `corner` of `image` resized to `resized`, without computing the rest."""
    (height, width), scales = image.shape[:2], [side / new for side, new in zip(image.shape, resized, strict=False)]
    margin = [int(np.ceil(4 * max(scale, 1))) for scale in scales]  # larger than the support of any filter
    starts = [max(0, int(at * scale) - m) for at, scale, m in zip(corner, scales, margin, strict=True)]
    ends = [int((at + size) * scale) + m + 1 for at, scale, m in zip(corner, scales, margin, strict=True)]
    part = image[starts[0] : min(ends[0], height), starts[1] : min(ends[1], width)]
    (y, x), (sy, sx) = [at * scale - start for at, scale, start in zip(corner, scales, starts, strict=True)], scales
    box = (x, y, min(x + size * sx, part.shape[1]), min(y + size * sy, part.shape[0]))
    return np.asarray(Image.fromarray(part).resize((size, size), resampling, box=box))


def decode_file(path: str | pathlib.Path, depth: int = 16) -> np.ndarray:
    """Decodes an image file, or the first frame of an animation, to uint8 [h, w, 3].

    The image is turned upright according to its EXIF orientation; all other metadata is ignored. Palettes, CMYK, 16-bit
    values and transparency are converted to RGB, see `to_uint8_rgb`.

    Args:
      depth: number of bits that the values of 16-bit files use.

    Raises:
      InputError: if the file is empty, damaged, not an image, too large (more than twice PIL's MAX_IMAGE_PIXELS), or
        has pixels without a known range (floating point); the message names the file.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "gray.png"
    ...     Image.new("L", (4, 3)).save(path)
    ...     decode_file(path).shape
    (3, 4, 3)
    """
    return to_uint8_rgb(read_pixels(path), depth)


def read_pixels(path: str | pathlib.Path) -> np.ndarray:
    """Decodes an image file to uint8 or uint16 [h, w, c]: gray (c = 1), RGB (3) or RGBA (4); see `decode_file`."""
    return _read_pixels(path, functools.partial(_file_content, path))


def decode_bytes(content: bytes, name: str) -> np.ndarray:
    """Decodes the content of an image file to uint8 [h, w, 3], as `decode_file` does; `name` names it in errors.

    >>> with io.BytesIO() as file:
    ...     Image.new("L", (4, 3)).save(file, "png")
    ...     decode_bytes(file.getvalue(), "gray.png").shape
    (3, 4, 3)
    """
    return to_uint8_rgb(_read_pixels(name, lambda: content))


def _file_content(path: str | pathlib.Path) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        raise OSError("not a regular file")
    if status.st_size > MOST_BYTES:
        raise OSError(f"the file is larger than {MOST_BYTES // 2**30} GiB")
    return pathlib.Path(path).read_bytes()


def _read_pixels(name: str | pathlib.Path, read: Callable[[], bytes]) -> np.ndarray:
    """Decodes the content that `read` returns; the errors name it `name`."""
    name, content = printable(name), b""
    try:
        content = read()
        data, orientation = pixels_only(content)
        return UPRIGHT[orientation](_pixels(data))
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: the image is too large to decode safely ({printable(error)})") from error
    except DECODE_ERRORS as error:
        reason = printable(str(error) or type(error).__name__)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "the file is empty" if not content else f"not an image in a supported format: {', '.join(FORMATS)}"
        raise InputError(f"{name}: cannot be read as an image ({reason}); replace or remove the file.") from error


def _pixels(data: bytes) -> np.ndarray:
    """Decodes the bytes of an image file to uint8 or uint16 pixels [h, w, c], with 1, 3 or 4 channels."""
    if _is_plain_jpeg(data) and (pixels := _decode_jpeg(data)) is not None:
        return pixels
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        transparent = image.info.get("transparency")
        if image.mode.startswith("I;16"):
            return _with_key(np.asarray(image).astype(np.uint16)[:, :, None], transparent)
        if image.mode == "I" and np.all((pixels := np.asarray(image)) >= 0) and np.all(pixels <= 65535):
            return pixels.astype(np.uint16)[:, :, None]  # older versions of PIL use this 32-bit mode for 16-bit PNGs
        if image.mode in ("I", "F"):
            raise ValueError("32-bit or floating point pixels have no known range; save the image with 8 bits")
        if (colours := _sixteen_bit_colours(image, data)) is not None:
            return colours if colours.shape[2] == 4 else _with_key(colours, transparent)
        has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None
        if image.mode == "La":
            image = image.convert("LA")
        return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # ends the pixels of a JPEG file


def _is_plain_jpeg(data: bytes) -> bool:
    """Returns whether these are the bytes of a whole gray or RGB baseline JPEG file, which OpenCV decodes as PIL does.

    OpenCV returns an image even if a file is truncated or a wrong marker ends its pixels too early.
    """
    position, shape = 2, b""
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        if data[position + 1 : position + 2] in (b"\xc0", b"\xc1"):
            shape = data[position + 4 : position + 10]
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
    pixels = position + 2 + int.from_bytes(data[position + 2 : position + 4])
    end = MARKER.search(data, pixels)
    if len(shape) < 6 or end is None or end[0] != b"\xff\xd9" or end.end() != len(data):
        return False
    height, width = int.from_bytes(shape[1:3]), int.from_bytes(shape[3:5])
    most = Image.MAX_IMAGE_PIXELS or math.inf
    return data.startswith(b"\xff\xd8") and shape[0] == 8 and shape[5] in (1, 3) and 0 < height * width <= most


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decodes a JPEG file with OpenCV to uint8 [h, w, 3]: the same pixels as PIL's in three quarters of the time.

    Returns None if it is damaged; PIL then says how.
    """
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _with_key(pixels: np.ndarray, transparent) -> np.ndarray:
    """Adds an alpha channel [h, w, 4] to uint16 pixels if the file declares a colour as transparent."""
    if transparent is None:
        return pixels
    alpha = np.where((pixels == np.asarray(transparent, np.uint16)).all(2, keepdims=True), 0, 65535)
    return np.concatenate([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), alpha], 2).astype(np.uint16)


# PIL keeps only the high bytes of 16-bit colours; decoding with the opposite byte order therefore gives the low bytes.
NATIVE = "L" if sys.byteorder == "little" else "B"
LOW_BYTES = {
    f"{mode};16{order}": f"{mode};16{'B' if (NATIVE if order == 'N' else order) == 'L' else 'L'}"
    for mode in ("RGB", "RGBA")
    for order in "LBN"
}


def _sixteen_bit_colours(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """Returns the pixels uint16 [h, w, 3 or 4] of an image with 16-bit colours or 16-bit gray and alpha, else None."""
    if not image.tile:
        return None
    name, _, offset, args = image.tile[0]
    raw, *rest = args if isinstance(args, tuple | list) else (args,)
    if image.format == "PPM" and name == "ppm" and image.mode == "RGB" and rest[-1] > 255:
        counts = np.frombuffer(data, ">u2", image.width * image.height * 3, offset).astype(np.uint32)
        return np.minimum(counts * 65535 // rest[-1], 65535).astype(np.uint16).reshape(image.height, image.width, 3)
    if raw == "LA;16B":  # the four bytes of a pixel: two of gray, two of alpha
        parts = _decoded_as(data, "RGBA").astype(np.uint16)
        gray, alpha = parts[:, :, :1] << 8 | parts[:, :, 1:2], parts[:, :, 2:3] << 8 | parts[:, :, 3:]
        return np.concatenate([gray, gray, gray, alpha], 2)
    if raw not in LOW_BYTES:
        return None
    high = np.asarray(image).astype(np.uint16)
    return high << 8 | _decoded_as(data, LOW_BYTES[raw])


def _decoded_as(data: bytes, raw: str) -> np.ndarray:
    """Decodes the image with its pixel data interpreted in PIL's raw mode `raw`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        tiles = []
        for tile in image.tile:
            codec, extents, offset, args = tile
            args = (raw, *args[1:]) if isinstance(args, tuple | list) else raw
            tiles.append(getattr(type(tile), "_make", tuple)((codec, extents, offset, args)))
        image.tile = tiles
        return np.asarray(image)
