"""Takes the pixels of an image file out of what else the file holds, and reads its orientation.

PIL parses texts, colour profiles, resolutions and EXIF on its way to the pixels, and gives up on the image when one of
them is odd or long. Here they are cut out of the bytes before PIL sees them, so that none of them decides whether an
image is read; EXIF is looked at for the orientation alone. Nothing is changed outside of the bytes.
"""

import re
import struct
import zlib

import numpy as np

ORIENTATION = 0x0112
INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # TIFF's types of whole numbers -> bytes
MOST_TEXT = 2**20  # bytes of a compressed text in which an orientation is looked for
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

# EXIF's orientations: what brings the pixels [h, w, c] of a file upright.
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
    """(the file without what is beside its pixels, its orientation from 1 to 8 as EXIF counts).

    PNG, JPEG, WebP and TIFF; other files are returned as they are. Of an animation or several pages the first stays. A
    file that breaks off, or whose parts cannot be told apart, is kept from there on as it is: the decoder judges it.
    """
    for is_kind, split in CONTAINERS:
        if is_kind(data):
            return split(data)
    return data, 1


def _png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, place, colour_type = [data[:8]], b"", b"", 8, -1
    while place + 8 <= len(data):
        length, name = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end, body = place + 12 + length, data[place + 8 : place + 8 + length]
        if not name.isalpha():
            kept.append(data[place:])
            break
        if name == b"IHDR":
            colour_type = body[9] if len(body) > 9 else -1
        if name == b"tRNS":
            lengths = {0: (2,), 2: (6,), 3: range(1, 257)}.get(colour_type, ())
            if length in lengths and data[end - 4 : end] == zlib.crc32(name + body).to_bytes(4):
                kept.append(data[place:end])
        elif name == b"PLTE" and colour_type in (2, 6):
            pass  # a suggestion for screens of few colours
        elif name[:1].isupper():
            kept.append(data[place:end])
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
        place = end
    return b"".join(kept), _orientation(exif, xmp)


def _png_text(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    """(key, text); the text is empty where it cannot be unpacked."""
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
    """The bytes of a "raw profile": a name, a length and hexadecimal digits, a line each."""
    digits = re.sub(rb"\s", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"([0-9a-fA-F]{2})*", digits) else b""


def _jpeg(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, place = [data[:2]], b"", b"", 2
    while (start := data.find(b"\xff", place)) >= 0:
        place = start
        while data[place : place + 1] == b"\xff":
            place += 1
        marker, place = data[place : place + 1], place + 1
        if not marker or marker in b"\x00\x01" or b"\xd0" <= marker <= b"\xd8":
            continue  # nothing follows these
        length = int.from_bytes(data[place : place + 2])
        if marker in b"\xd9\xda" or length < 2:  # the end, the pixels, or nonsense
            kept.append(b"\xff" + marker + data[place:])
            break
        end, body = place + length, data[place + 2 : place + length]
        needed = (body.startswith(b"JFIF\0") and length >= 16) or (body.startswith(b"Adobe") and length >= 14)
        if not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe") or (needed and marker in b"\xe0\xee"):
            kept.append(b"\xff" + marker + data[place:end])  # JFIF and Adobe say how colours are coded
        elif marker == b"\xe1" and body.startswith(b"Exif\0"):
            exif = exif or body[6:]
        elif marker == b"\xe1" and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or body
        place = end
    return b"".join(kept), _orientation(exif, xmp)


def _webp(data: bytes) -> tuple[bytes, int]:
    kept, found, place = [], {}, 12
    while place + 8 <= len(data):
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        if name == b"VP8X" and length >= 10:  # without the flags of a profile, EXIF and XMP
            kept.append(data[place : place + 8] + bytes([data[place + 8] & ~0x2C]) + data[place + 9 : end])
        elif name in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[place:end])
        else:
            found.setdefault(name, data[place + 8 : place + 8 + length])
        place = end
    body = b"WEBP" + b"".join(kept)
    whole = b"RIFF" + len(body).to_bytes(4, "little") + body
    return whole, _orientation(found.get(b"EXIF", b""), found.get(b"XMP ", b""))


# The tags of a TIFF that say where its pixels are and what they mean.
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
    entries = [data[place : place + size] for place in range(first, first + count * size, size)]
    needed = [entry for entry in entries if int.from_bytes(entry[:2], order) in PIXEL_TAGS]
    table = len(needed).to_bytes(counted, order) + b"".join(needed) + bytes(width)
    turned = [found for entry in entries if (found := _whole_number(entry, order)) is not None]
    return data[:start] + table + data[start + len(table) :], turned[0] if turned else 1


def _orientation(exif: bytes, xmp: bytes) -> int:
    """What EXIF says, else XMP, else 1. `exif` may be cut off, and its other tags may be anything."""
    while exif.startswith(b"Exif\0"):
        exif = exif[6:]
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order and len(exif) >= 8:
        start = int.from_bytes(exif[4:8], order)
        count = int.from_bytes(exif[start : start + 2], order)
        for place in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
            if (found := _whole_number(exif[place : place + 12], order)) is not None:
                return found
    match = XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


def _whole_number(entry: bytes, order: str) -> int | None:
    """The value of an entry of a TIFF's table if that is the orientation and one of the eight there are."""
    kind = "<" if order == "little" else ">"
    tag, number_type = struct.unpack(kind + "HH", entry[:4])
    count, value = int.from_bytes(entry[4 : len(entry) // 2 + 2], order), entry[len(entry) // 2 + 2 :]
    size = INTEGERS.get(number_type, 9)
    found = int.from_bytes(value[:size], order)
    fits = tag == ORIENTATION and count >= 1 and count * size <= len(value)
    return found if fits and 1 <= found <= 8 else None


CONTAINERS = (
    (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    (lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _webp),
    (lambda data: data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
)
