"""What a file holds beside its pixels never decides whether they are read, and the orientation is applied."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from jax_transfer.data.containers import pixels_only
from jax_transfer.data.transforms import decode_file

RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
JUNK = np.random.default_rng(1).bytes(300)


def encoded(kind, image=RGB, **options):
    held = io.BytesIO()
    Image.fromarray(image).save(held, kind, **options)
    return held.getvalue()


def plain(kind):
    return encoded(kind, lossless=True) if kind == "WEBP" else encoded(kind)


def direct(data):
    """The pixels as PIL gives them for a file in which nothing is odd."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def exif(*entries, order="<"):
    """A TIFF header and one table of (tag, type, count, value) entries."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHII", *entry) for entry in entries) + bytes(12)


def turned(value, order="<", number_type=3):
    """The entry of an orientation; a 16-bit value lies in the first two bytes of its four."""
    shift = {"<": 0, ">": {1: 24, 3: 16, 4: 0}[number_type]}[order]
    return 0x0112, number_type, 1, value << shift


def png_chunk(name, body, crc=None):
    checksum = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def put(kind, data, name, body):
    """The file with one more block: an APP segment of a JPEG, a chunk of a PNG (both before the pixels) or a WebP."""
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
    return put(kind, data, name, body)


KINDS = ("JPEG", "PNG", "WEBP")
# Every type there is, and some that there are not, of tags that PIL looks at and of one that nobody knows.
ODD_ENTRIES = [
    (tag, number_type, count, value)
    for tag in (0x011A, 0x0128, 0x8769, 0x8825, 0xA000, 0xFFFE)
    for number_type in (0, 1, 2, 4, 5, 7, 10, 11, 12, 13, 99)
    for count, value in ((1, 38), (1, 70_000), (2**32 - 1, 2**32 - 1))
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_exif_tag_neither_damages_the_image_nor_hides_its_orientation(tmp_path, kind):
    for entry in ODD_ENTRIES:
        (tmp_path / "a").write_bytes(with_exif(kind, plain(kind), exif(turned(6), entry)))
        assert np.array_equal(decode_file(tmp_path / "a"), np.rot90(direct(plain(kind)), -1)), entry


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [b"", b"II", b"II*\0", b"MM\0*\xff\xff\xff\xff", JUNK, b"II*\0" + b"\xff" * 40])
def test_a_broken_exif_block_leaves_the_image_as_it_is(tmp_path, kind, block):
    (tmp_path / "a").write_bytes(with_exif(kind, plain(kind), block))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("number_type", [1, 3, 4])
def test_each_orientation_is_applied_as_pil_does(tmp_path, kind, order, number_type):
    for value in range(1, 9):
        upright = Image.fromarray(direct(plain(kind)))
        upright.getexif()[0x0112] = value
        (tmp_path / "a").write_bytes(with_exif(kind, plain(kind), exif(turned(value, order, number_type), order=order)))
        assert np.array_equal(decode_file(tmp_path / "a"), np.asarray(ImageOps.exif_transpose(upright))), value


@pytest.mark.parametrize("value", [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, value):
    (tmp_path / "a").write_bytes(with_exif("JPEG", plain("JPEG"), exif(turned(value))))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain("JPEG")))


def test_a_cut_off_exif_block_still_tells_the_orientation(tmp_path):
    whole = exif(turned(8), (0x010E, 2, 5000, 60))
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
        "raw profile that is no hexadecimal": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz\n"),
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
def test_nothing_beside_the_pixels_damages_an_image(tmp_path, kind, block):
    (tmp_path / "a").write_bytes(put(kind, plain(kind), *BLOCKS[kind][block]))
    assert np.array_equal(decode_file(tmp_path / "a"), direct(plain(kind)))


def test_many_long_texts_and_broken_checksums_of_a_png_do_not_matter(tmp_path):
    data = plain("PNG")
    texts = b"".join(png_chunk(b"tEXt", b"k%d\0" % i + b"z" * 2**20, crc=i) for i in range(70))
    behind = data[:-12] + texts + data[-12:]
    for whole in (data[:33] + texts + data[33:], behind, behind[: len(data) + 10_000]):
        (tmp_path / "a").write_bytes(whole)
        assert np.array_equal(decode_file(tmp_path / "a"), RGB)


def test_orientation_is_found_in_the_other_places_where_pil_looks(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    digits = exif(turned(3)).hex().encode()
    raw = b"\nexif\n%8d\n%s\n" % (len(digits) // 2, digits)
    files = [
        put("JPEG", plain("JPEG"), b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + xmp),
        put("WEBP", plain("WEBP"), b"XMP ", xmp),
        put("PNG", plain("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        put("PNG", plain("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        put("PNG", plain("PNG"), b"tEXt", b"Raw profile type exif\0" + raw),
        put("PNG", plain("PNG"), b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
    ]
    for data in files:
        (tmp_path / "a").write_bytes(data)
        upright = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_file(tmp_path / "a"), upright[::-1, ::-1])


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}, {"compression": "packbits"}])
def test_odd_tags_of_a_tiff_do_not_matter(tmp_path, options):
    tags = {270: "x" * 9000, 34675: JUNK, 700: JUNK, 305: "a program", 282: 72.0}
    data = encoded("TIFF", tiffinfo={**tags, 274: 6}, **options)
    order = "<" if data[:2] == b"II" else ">"
    for odd in (None, 12, 99):  # the resolution's type becomes another one
        changed = data.replace(struct.pack(order + "HH", 282, 5), struct.pack(order + "HH", 282, odd or 5))
        assert (changed != data) == (odd is not None)
        (tmp_path / "a").write_bytes(changed)
        assert np.array_equal(decode_file(tmp_path / "a"), np.rot90(RGB, -1))


def test_reading_changes_no_setting_of_pil(tmp_path):
    settings = lambda: (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)  # noqa: E731
    before = settings()
    (tmp_path / "a").write_bytes(put("PNG", plain("PNG"), *BLOCKS["PNG"]["long packed text"]))
    decode_file(tmp_path / "a")
    assert settings() == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_no_bytes_stop_the_search_for_the_pixels(kind):
    data, generator = plain(kind), np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(data[: generator.integers(4, len(data) + 1)], np.uint8).copy()
        damaged[generator.integers(4, len(damaged) + 1, 6) - 1] = generator.integers(0, 256, 6)
        found, orientation = pixels_only(damaged.tobytes())
        assert isinstance(found, bytes) and 1 <= orientation <= 8
