"""Metadata in image files: broken blocks do not prevent reading, and the orientation is applied."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from helpers.images import encoded, png_chunk
from jax_transfer.data.containers import pixels_only
from jax_transfer.data.transforms import decode_file

RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
JUNK = np.random.default_rng(1).bytes(300)


def plain(kind):
    return encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))


def direct(data):
    """Returns the pixels of a valid file, read with PIL."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def exif(*entries, order="<"):
    """Returns a TIFF header and one table of (tag, type, count, value) entries."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHII", *entry) for entry in entries) + bytes(12)


def orientation_entry(value, order="<", number_type=3):
    """Returns the entry of an orientation; a 16-bit value is in the first two of its four bytes."""
    shift = {"<": 0, ">": {1: 24, 3: 16, 4: 0}[number_type]}[order]
    return 0x0112, number_type, 1, value << shift


def insert_block(kind, data, name, body):
    """Returns the file with another block: an APP segment (JPEG) or chunk (PNG) before the pixels, or a WebP chunk."""
    if kind == "JPEG":
        return data[:2] + b"\xff" + name + struct.pack(">H", len(body) + 2) + body + data[2:]
    if kind == "PNG":
        return data[:33] + png_chunk(name, body) + data[33:]
    size = struct.pack("<I", len(body))
    simple = data[12:16] != b"VP8X"
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x2c\0\0\0" + struct.pack("<HBHB", 9, 0, 11, 0) if simple else b""
    inner = b"WEBP" + extended + data[12:] + name + size + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def with_exif(kind, data, block):
    name, body = {"JPEG": (b"\xe1", b"Exif\0\0" + block), "PNG": (b"eXIf", block), "WEBP": (b"EXIF", block)}[kind]
    return insert_block(kind, data, name, body)


KINDS = ("JPEG", "PNG", "WEBP")
# Valid and invalid types, for tags that PIL reads and an unknown one.
ODD_ENTRIES = [
    (tag, number_type, count, value)
    for tag in (0x011A, 0x0128, 0x8769, 0x8825, 0xA000, 0xFFFE)
    for number_type in (0, 1, 2, 4, 5, 7, 10, 11, 12, 13, 99)
    for count, value in ((1, 38), (1, 70_000), (2**32 - 1, 2**32 - 1))
]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_exif_tags_do_not_hide_the_orientation(tmp_path, kind):
    for entry in ODD_ENTRIES:
        (tmp_path / "a").write_bytes(with_exif(kind, plain(kind), exif(orientation_entry(6), entry)))
        assert np.array_equal(decode_file(tmp_path / "a"), np.rot90(direct(plain(kind)), -1)), entry


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [b"", b"II", b"II*\0", b"MM\0*\xff\xff\xff\xff", JUNK, b"II*\0" + b"\xff" * 40])
def test_a_broken_exif_block_is_ignored(tmp_path, kind, block):
    (tmp_path / "a").write_bytes(with_exif(kind, plain(kind), block))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("number_type", [1, 3, 4])
def test_orientations_are_applied_like_pil(tmp_path, kind, order, number_type):
    for value in range(1, 9):
        upright = Image.fromarray(direct(plain(kind)))
        upright.getexif()[0x0112] = value
        (tmp_path / "a").write_bytes(
            with_exif(kind, plain(kind), exif(orientation_entry(value, order, number_type), order=order))
        )
        assert np.array_equal(decode_file(tmp_path / "a"), np.asarray(ImageOps.exif_transpose(upright))), value


@pytest.mark.parametrize("value", [0, 9, 77, 65535])
def test_unknown_orientations_are_ignored(tmp_path, value):
    (tmp_path / "a").write_bytes(with_exif("JPEG", plain("JPEG"), exif(orientation_entry(value))))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain("JPEG")))


def test_orientation_is_read_from_a_truncated_exif_block(tmp_path):
    whole = exif(orientation_entry(8), (0x010E, 2, 5000, 60))
    (tmp_path / "a").write_bytes(with_exif("JPEG", plain("JPEG"), whole[:24]))
    assert np.array_equal(decode_file(tmp_path / "a"), np.rot90(direct(plain("JPEG"))))


PACKED = zlib.compress(b"x" * 2**22)
BLOCKS = {
    "JPEG": {
        "profile without parts": (b"\xe2", b"ICC_PROFILE\0"),
        "profile of junk": (b"\xe2", b"ICC_PROFILE\0\1\1" + JUNK),
        "short JFIF": (b"\xe0", b"JFIF\0"),
        "short Adobe": (b"\xee", b"Adobe"),
        "pictures of a phone": (b"\xe2", b"MPF\0" + JUNK),
        "resources": (b"\xed", b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
        "resources cut off": (b"\xed", b"Photoshop 3.0\x008BIM\x03\xed"),
        "XMP of junk": (b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + JUNK),
        "a comment": (b"\xfe", JUNK),
        "flash picture": (b"\xe2", b"FPXR\0"),
    },
    "PNG": {
        "long packed text": (b"zTXt", b"workflow\0\0" + PACKED),
        "long packed text of Unicode": (b"iTXt", b"parameters\0\1\0\0\0" + PACKED),
        "long text": (b"tEXt", b"prompt\0" + b"y" * 2**21),
        "text packed in an unknown way": (b"zTXt", b"a\0\7" + JUNK),
        "text of junk": (b"iTXt", JUNK),
        "empty text": (b"zTXt", b""),
        "profile of junk": (b"iCCP", b"name\0\0" + JUNK),
        "profile packed in an unknown way": (b"iCCP", b"name\0\5" + JUNK),
        "long profile": (b"iCCP", b"name\0\0" + PACKED),
        "empty profile": (b"iCCP", b""),
        "short gamma": (b"gAMA", b"\0"),
        "short chromaticities": (b"cHRM", b"\0" * 5),
        "short density": (b"pHYs", b"\0"),
        "short rendering intent": (b"sRGB", b""),
        "animation of no frames": (b"acTL", bytes(8)),
        "animation, cut off": (b"acTL", b"\0"),
        "frame of nothing": (b"fcTL", b"\0" * 3),
        "transparency of a wrong length": (b"tRNS", b"\0"),
        "raw profile that is not hexadecimal": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz\n"),
        "raw profile without lines": (b"tEXt", b"Raw profile type exif\0"),
        "unknown": (b"abCd", JUNK),
    },
    "WEBP": {
        "profile of junk": (b"ICCP", JUNK),
        "XMP of junk": (b"XMP ", JUNK),
        "empty EXIF": (b"EXIF", b""),
        "unknown": (b"abcd", JUNK[:7]),
    },
}


@pytest.mark.parametrize(("kind", "block"), [(kind, block) for kind in BLOCKS for block in BLOCKS[kind]])
def test_broken_metadata_blocks_do_not_damage_an_image(tmp_path, kind, block):
    (tmp_path / "a").write_bytes(insert_block(kind, plain(kind), *BLOCKS[kind][block]))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain(kind)))


def test_long_png_texts_with_broken_checksums_are_ignored(tmp_path):
    data = plain("PNG")
    texts = b"".join(png_chunk(b"tEXt", b"k%d\0" % i + b"z" * 2**20, crc=i) for i in range(70))
    behind = data[:-12] + texts + data[-12:]
    for whole in (data[:33] + texts + data[33:], behind, behind[: len(data) + 10_000]):
        (tmp_path / "a").write_bytes(whole)
        assert np.array_equal(decode_file(tmp_path / "a"), RGB)


def test_orientation_is_found_in_xmp_and_raw_profiles(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    digits = exif(orientation_entry(3)).hex().encode()
    raw = b"\nexif\n%8d\n%s\n" % (len(digits) // 2, digits)
    files = [
        insert_block("JPEG", plain("JPEG"), b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + xmp),
        insert_block("WEBP", plain("WEBP"), b"XMP ", xmp),
        insert_block("PNG", plain("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        insert_block("PNG", plain("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        insert_block("PNG", plain("PNG"), b"tEXt", b"Raw profile type exif\0" + raw),
        insert_block("PNG", plain("PNG"), b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
    ]
    for data in files:
        (tmp_path / "a").write_bytes(data)
        upright = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_file(tmp_path / "a"), upright[::-1, ::-1])


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}, {"compression": "packbits"}])
def test_odd_tiff_tags_are_ignored(tmp_path, options):
    tags = {270: "x" * 9000, 34675: JUNK, 700: JUNK, 305: "a program", 282: 72.0}
    data = encoded(RGB, "TIFF", tiffinfo={**tags, 274: 6}, **options)
    order = "<" if data[:2] == b"II" else ">"
    for odd in (None, 12, 99):  # changes the type of the resolution
        changed = data.replace(struct.pack(order + "HH", 282, 5), struct.pack(order + "HH", 282, odd or 5))
        assert (changed != data) == (odd is not None)
        (tmp_path / "a").write_bytes(changed)
        assert np.array_equal(decode_file(tmp_path / "a"), np.rot90(RGB, -1))


def test_reading_changes_no_pil_settings(tmp_path):
    def settings():
        chunk, memory = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        return chunk, memory, ImageFile.LOAD_TRUNCATED_IMAGES

    before = settings()
    (tmp_path / "a").write_bytes(insert_block("PNG", plain("PNG"), *BLOCKS["PNG"]["long packed text"]))
    decode_file(tmp_path / "a")
    assert settings() == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_pixels_only_accepts_arbitrary_bytes(kind):
    data, generator = plain(kind), np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(data[: generator.integers(4, len(data) + 1)], np.uint8).copy()
        damaged[generator.integers(4, len(damaged) + 1, 6) - 1] = generator.integers(0, 256, 6)
        found, orientation = pixels_only(damaged.tobytes())
        assert isinstance(found, bytes) and 1 <= orientation <= 8
