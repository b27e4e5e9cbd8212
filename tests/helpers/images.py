"""Images, files of images and folders of images for tests."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def write_images(folder, count, seed=0, size=(12, 10)):
    """Writes `count` different images to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([*np.ravel(seed).tolist(), *folder.name.encode()])
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


@functools.cache
def photographs():
    """Returns twelve real images [h, w, 3] without common content: parts of the two photographs in scikit-learn."""
    china, flower = load_sample_images().images  # 427 x 640
    parts = [photo[y : y + 200, x : x + 210] for photo in (china, flower) for y in (0, 220) for x in (0, 210, 420)]
    return [np.ascontiguousarray(part) for part in parts]


def encoded(image, kind, **options):
    """Returns the bytes of a PIL image or an array, saved in the format `kind`."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name, body, crc=None):
    """Returns a chunk of a PNG file, with the right checksum unless `crc` is given."""
    checksum = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png(header, pixels):
    """Returns a PNG file with the given body of its header and compressed pixels."""
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def torchvision_crop(image, resize, crop, resampling=Image.Resampling.BILINEAR):
    """Returns the pixels of a PIL image after torchvision's Resize(resize) and CenterCrop(crop)."""
    width, height = image.size
    if width <= height:
        new_width, new_height = resize, int(resize * height / width)
    else:
        new_width, new_height = int(resize * width / height), resize
    top, left = round((new_height - crop) / 2.0), round((new_width - crop) / 2.0)
    resized = image.resize((new_width, new_height), resampling)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))
