"""Whatever an image file is, its pixels are RGB and upright, or it is bad and says why."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsvit_ds.data.decode import BadImageError, Box, Picture, installed, resolved
from hsvit_ds.data.shards.sources import Item, sample
from hsvit_ds.errors import RefusedError

from ..tars import encoded, picture

IMAGE = picture(3, (80, 64))  # width, height
WHOLE = Box(0, 0, 64, 80)
DECODERS = [installed("simplejpeg"), installed("pillow")]


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(IMAGE, exif=exif, quality=95)


def deep() -> bytes:
    return encoded(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(np.uint16) * 257), "PNG")


def animated() -> bytes:
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG", save_all=True, append_images=[picture(9, (80, 64))])
    return buffer.getvalue()


GREY = np.repeat(np.asarray(IMAGE.convert("L"))[:, :, None], 3, 2)
RGB = np.asarray(IMAGE)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(IMAGE, quality=95), RGB),
        (encoded(IMAGE.convert("L"), quality=95), GREY),
        (encoded(IMAGE.convert("CMYK"), quality=95), RGB),
        (encoded(IMAGE, "PNG"), RGB),
        (encoded(IMAGE.convert("RGBA"), "PNG"), RGB),
        (encoded(IMAGE.quantize(256), "PNG"), RGB),
        (deep(), GREY),
        (animated(), RGB),
        (encoded(IMAGE, quality=95) + b"stray bytes", RGB),
    ],
    ids=["jpeg", "grey", "cmyk", "png", "transparent", "palette", "16 bits", "animated", "stray bytes"],
)
def test_every_kind_of_image_becomes_rgb(data: bytes, expected: np.ndarray, decoder: str) -> None:
    found = Picture(data, decoder)
    assert (found.height, found.width) == (64, 80)
    pixels = found.pixels(WHOLE, 64)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).mean() < 8  # a palette has 256 colours


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_camera_rotation_is_undone(orientation: int, decoder: str) -> None:
    turns = {3: 180, 6: -90, 8: 90}
    expected = np.asarray(IMAGE.rotate(turns[orientation], expand=True)).astype(int)
    found = Picture(with_orientation(orientation), decoder)
    assert (found.height, found.width) == expected.shape[:2]
    pixels = found.pixels(Box(0, 0, found.height, found.width), 64)
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value or, where it is longer than 4 bytes, what follows the directory)."""
    directory, values, end = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", end + len(values))
        directory += struct.pack("<HHL", tag, kind, count) + place
        values += value if len(value) > 4 else b""
    return b"II*\0" + struct.pack("<L", 8) + directory + bytes(4) + values


def jpeg_with(*payloads: bytes) -> bytes:
    """With these APP1 segments."""
    data = encoded(IMAGE, quality=95)
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in payloads) + data[2:]


def png_with(kind: bytes, content: bytes) -> bytes:
    data = encoded(IMAGE, "PNG")
    at = data.index(b"IDAT") - 4
    crc = struct.pack(">L", zlib.crc32(kind + content))
    return data[:at] + struct.pack(">L", len(content)) + kind + content + crc + data[at:]


TURN = (0x112, 3, 1, struct.pack("<H", 6))
RATIONAL = (0x11A, 10, 1, struct.pack("<ll", -1, 0))
EXIF, GARBAGE = b"Exif\0\0", bytes([0, 8, 0, 2, 1, 0x12, 0, 3] * 4)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation=\"%d\"/>"
ODD = {
    "empty": (jpeg_with(EXIF), False),
    "garbage": (jpeg_with(EXIF + GARBAGE), False),
    "orientation 0": (jpeg_with(EXIF + tiff((0x112, 3, 1, b"\0\0"))), False),
    "orientation 9": (jpeg_with(EXIF + tiff((0x112, 3, 1, b"\x09\0"))), False),
    "orientation in words": (jpeg_with(EXIF + tiff((0x112, 2, 2, b"6\0"))), False),
    "a directory far away": (jpeg_with(EXIF + tiff(TURN, (0x8769, 4, 1, struct.pack("<L", 60000)))), True),
    "a rational of -1/0": (jpeg_with(EXIF + tiff(TURN, RATIONAL)), True),
    "types that do not fit": (jpeg_with(EXIF + tiff((0x100, 2, 3, b"ab\0"), (0x10F, 3, 1, b"\7\0"), TURN)), True),
    "cut off": (jpeg_with((EXIF + tiff(TURN, (0x10F, 2, 40, b"x" * 40)))[:30]), True),
    "behind 120 kB": (jpeg_with(b"A" * 60000, b"B" * 60000, EXIF + tiff(TURN)), True),
    "XMP": (jpeg_with(XMP % 6), True),
    "XMP, upright": (jpeg_with(XMP % 1), False),
    "PNG, garbage": (png_with(b"eXIf", GARBAGE), False),
    "PNG, no hexadecimals": (png_with(b"tEXt", b"Raw profile type exif\0\nexif\n      10\nnothexatall\n"), False),
    "PNG": (png_with(b"eXIf", tiff(TURN, RATIONAL)), True),
    "WebP, garbage": (encoded(IMAGE, "WEBP", lossless=True, exif=EXIF + b"garbage!"), False),
    "WebP": (encoded(IMAGE, "WEBP", lossless=True, exif=tiff(TURN, RATIONAL)), True),
    "TIFF": (encoded(IMAGE, "TIFF", tiffinfo={0x112: 6}), True),
}


@pytest.mark.parametrize("name", ODD)
def test_whole_pixels_survive_odd_metadata_and_are_turned_alike(name: str, tmp_path: Path) -> None:
    data, is_turned = ODD[name]
    expected = np.asarray(IMAGE.rotate(-90, expand=True) if is_turned else IMAGE).astype(int)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    made = sample(Item(str(path), 0, len(data), 0, "a", "image.jpg"), resize=48, quality=95)
    shown = [Picture(data, decoder) for decoder in DECODERS]
    for found in shown:
        assert (found.height, found.width) == expected.shape[:2]
        pixels = found.pixels(Box(0, 0, found.height, found.width), 64)
        assert np.abs(pixels.astype(int) - expected).mean() < 4
    small = Picture(made["jpg"], DECODERS[0])
    assert (small.height, small.width) == ((60, 48) if is_turned else (48, 60))
    about = json.loads(made["json"])
    assert (about["height"], about["width"]) == (small.height, small.width)
    pixels = small.pixels(Box(0, 0, small.height, small.width), 48)
    reduced = Image.fromarray(expected.astype(np.uint8)).resize((small.width, small.height), Image.Resampling.BICUBIC)
    assert np.abs(pixels.astype(int) - np.asarray(reduced).astype(int)).mean() < 4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("data", [png_with(b"eXIf", GARBAGE)[:-300], encoded(IMAGE, "PNG")[:-300]])
def test_odd_metadata_do_not_hide_that_pixels_are_cut_off(data: bytes, decoder: str) -> None:
    with pytest.raises(BadImageError, match="truncated"):
        Picture(data, decoder).pixels(WHOLE, 64)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello", "not an image"),
        (encoded(IMAGE)[:700], "truncated"),
        (b"\xff\xd8\xff\xe0abc", "(?i)truncated"),
    ],
    ids=["empty", "text", "cut off", "header only"],
)
def test_what_is_no_image_is_bad(data: bytes, reason: str, decoder: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        Picture(data, decoder).pixels(WHOLE, 64)


@pytest.mark.parametrize(
    ("size", "sides"), [(64, (64, 80)), (33, (64, 80)), (32, (32, 40)), (15, (16, 20)), (2, (8, 10))]
)
def test_a_large_jpeg_is_made_smaller_while_decoded_and_never_too_small(size: int, sides: tuple[int, int]) -> None:
    pixels = Picture(encoded(IMAGE, quality=95), DECODERS[0]).pixels(WHOLE, size)
    assert pixels.shape == (*sides, 3)
    reduced = np.asarray(IMAGE.resize((sides[1], sides[0]), Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels - reduced).mean() < 4


def test_a_box_is_cut_out_where_it_lies_at_any_scale() -> None:
    box = Box(16, 32, 32, 32)
    data = encoded(IMAGE, quality=95)
    for size in (32, 16, 8):
        pixels = Picture(data, DECODERS[0]).pixels(box, size)
        expected = IMAGE.crop((32, 16, 64, 48)).resize((size, size), Image.Resampling.BOX)
        assert np.abs(pixels - np.asarray(expected).astype(int)).mean() < 5


def test_another_decoder_than_the_recipes_is_refused() -> None:
    assert resolved("auto") == DECODERS[0]
    assert resolved(DECODERS[1]) == DECODERS[1]
    with pytest.raises(RefusedError, match=r'data.decoder = "simplejpeg 0.1, pillow 1".*but here it is "simplejpeg'):
        resolved("simplejpeg 0.1, pillow 1")
    with pytest.raises(RefusedError, match=r'must be "auto", "simplejpeg" or "pillow"'):
        resolved("turbo")
