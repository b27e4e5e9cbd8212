"""Removes the metadata of an image file, and reads its orientation.

PIL parses texts, colour profiles, resolutions and EXIF before it decodes the pixels, and rejects the image if any of
them is malformed or too long. To keep metadata from making an image unreadable, this module removes it from the bytes
before PIL parses them; only the orientation is read, from EXIF or XMP. The file itself is not changed.
"""

import re
import struct
import zlib
from typing import Literal

import numpy as np

ORIENTATION = 0x0112
INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # integer type of TIFF -> its size in bytes
MOST_TEXT = 2**20  # a compressed text is searched for an orientation up to this many bytes
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

# EXIF orientation -> the function that turns the pixels [h, w, c] of a file upright.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def pixels_only(data: bytes) -> tuple[bytes, int]:
    """Removes the metadata of a PNG, JPEG, WebP or TIFF file; other files are returned unchanged.

    Only the first image of an animated PNG or multi-page TIFF is kept. If a file is truncated or malformed, everything
    from that point on is kept unchanged and left to the decoder.

    Args:
      data: the bytes of the file.

    Returns:
      (bytes without metadata, EXIF orientation from 1 to 8).

    >>> import io
    >>> from PIL import Image
    >>> exif, file = Image.Exif(), io.BytesIO()
    >>> exif[ORIENTATION] = 6
    >>> Image.new("L", (4, 3)).save(file, "JPEG", exif=exif)
    >>> data, orientation = pixels_only(file.getvalue())
    >>> orientation, b"Exif" in data
    (6, False)
    """
    for is_kind, split in CONTAINERS:
        if is_kind(data):
            return split(data)
    return data, 1


def _png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, position, colour_type = [data[:8]], b"", b"", 8, -1
    while position + 8 <= len(data):
        length, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end, body = position + 12 + length, data[position + 8 : position + 8 + length]
        if not name.isalpha():
            kept.append(data[position:])
            break
        if name == b"IHDR":
            colour_type = body[9] if len(body) > 9 else -1
        if name == b"tRNS":
            lengths = {0: (2,), 2: (6,), 3: range(1, 257)}.get(colour_type, ())
            if length in lengths and data[end - 4 : end] == zlib.crc32(name + body).to_bytes(4):
                kept.append(data[position:end])
        elif name == b"PLTE" and colour_type in (2, 6):
            pass  # a palette for displays with few colours, which does not affect the pixels
        elif name[:1].isupper():
            kept.append(data[position:end])
        elif name == b"eXIf":
            exif = exif or body
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            key, text = _png_text(name, body)
            if key == b"Raw profile type exif":
                exif = exif or _from_hex(text)
            elif key == b"XML:com.adobe.xmp":
                xmp = xmp or text
        if name == b"IEND":
            break
        position = end
    return b"".join(kept), _orientation(exif, xmp)


def _png_text(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Returns (key, text) of a text chunk; the text is empty if it cannot be decompressed."""
    key, _, text = body.partition(b"\0")
    packed = name == b"zTXt"
    if packed:
        text = text[1:]
    elif name == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    if not packed:
        return key, text
    try:
        return key, zlib.decompressobj().decompress(text, MOST_TEXT)
    except zlib.error:
        return key, b""


def _from_hex(text: bytes) -> bytes:
    """Returns the bytes of a "raw profile", which consists of a line with a name, a line with a length, and lines of
    hexadecimal digits.
    """
    digits = re.sub(rb"\s", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"([0-9a-fA-F]{2})*", digits) else b""


def _jpeg(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, position = [data[:2]], b"", b"", 2
    while (start := data.find(b"\xff", position)) >= 0:
        position = start
        while data[position : position + 1] == b"\xff":
            position += 1
        marker, position = data[position : position + 1], position + 1
        if not marker or marker in b"\x00\x01" or b"\xd0" <= marker <= b"\xd8":
            continue  # these markers have no content
        length = int.from_bytes(data[position : position + 2])
        if marker in b"\xd9\xda" or length < 2:  # end of the image, start of the pixels, or an invalid length
            kept.append(b"\xff" + marker + data[position:])
            break
        end, body = position + length, data[position + 2 : position + length]
        needed = (body.startswith(b"JFIF\0") and length >= 16) or (body.startswith(b"Adobe") and length >= 14)
        if not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe") or (needed and marker in b"\xe0\xee"):
            kept.append(b"\xff" + marker + data[position:end])  # JFIF and Adobe define the colour space
        elif marker == b"\xe1" and body.startswith(b"Exif\0"):
            exif = exif or body[6:]
        elif marker == b"\xe1" and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or body
        position = end
    return b"".join(kept), _orientation(exif, xmp)


def _webp(data: bytes) -> tuple[bytes, int]:
    kept, metadata, position = [], {}, 12
    while position + 8 <= len(data):
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + length + length % 2
        if name == b"VP8X" and length >= 10:  # clear the flags for a colour profile, EXIF and XMP
            kept.append(data[position : position + 8] + bytes([data[position + 8] & ~0x2C]) + data[position + 9 : end])
        elif name in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[position:end])
        else:
            metadata.setdefault(name, data[position + 8 : position + 8 + length])
        position = end
    body = b"WEBP" + b"".join(kept)
    file = b"RIFF" + len(body).to_bytes(4, "little") + body
    return file, _orientation(metadata.get(b"EXIF", b""), metadata.get(b"XMP ", b""))


# The tags of a TIFF that locate its pixels and define their format.
PIXEL_TAGS = frozenset((254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 292, 293, 317, 318,
                        319, 320, 322, 323, 324, 325, 332, 334, 338, 339, 340, 341, 342, 347, 512, 513, 514, 515, 517,
                        518, 519, 520, 521, 529, 530, 531, 532, 34925, 50674))  # fmt: skip


def _tiff(data: bytes) -> tuple[bytes, int]:
    order = "little" if data[:2] == b"II" else "big"
    big = data[2:4] in (b"+\0", b"\0+")
    width, counted, size = (8, 8, 20) if big else (4, 2, 12)
    start = int.from_bytes(data[width : 2 * width], order)
    first = start + counted
    count = int.from_bytes(data[start:first], order)
    if first + count * size > len(data):
        return data, 1
    entries = [data[position : position + size] for position in range(first, first + count * size, size)]
    needed = [entry for entry in entries if int.from_bytes(entry[:2], order) in PIXEL_TAGS]
    table = len(needed).to_bytes(counted, order) + b"".join(needed) + bytes(width)
    orientations = [value for entry in entries if (value := _orientation_of_entry(entry, order)) is not None]
    return data[:start] + table + data[start + len(table) :], orientations[0] if orientations else 1


ByteOrder = Literal["little", "big"]
BYTE_ORDERS: dict[bytes, ByteOrder] = {b"II": "little", b"MM": "big"}


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Returns the orientation in `exif`, else in `xmp`, else 1.

    `exif` may be truncated, and its other tags may be malformed.
    """
    while exif.startswith(b"Exif\0"):
        exif = exif[6:]
    order: ByteOrder | None = BYTE_ORDERS.get(exif[:2])
    if order and len(exif) >= 8:
        start = int.from_bytes(exif[4:8], order)
        count = int.from_bytes(exif[start : start + 2], order)
        for position in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
            if (value := _orientation_of_entry(exif[position : position + 12], order)) is not None:
                return value
    match = XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


def _orientation_of_entry(entry: bytes, order: ByteOrder) -> int | None:
    """Returns the value of an entry of a TIFF directory if it is a valid orientation, else None."""
    byte_order = "<" if order == "little" else ">"
    tag, number_type = struct.unpack(byte_order + "HH", entry[:4])
    count, content = int.from_bytes(entry[4 : len(entry) // 2 + 2], order), entry[len(entry) // 2 + 2 :]
    size = INTEGERS.get(number_type, 9)
    value = int.from_bytes(content[:size], order)
    valid = tag == ORIENTATION and count >= 1 and count * size <= len(content)
    return value if valid and 1 <= value <= 8 else None


CONTAINERS = (
    (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    (lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _webp),
    (lambda data: data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
)
