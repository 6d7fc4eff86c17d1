"""Whatever an image file is, its pixels are RGB and upright, or it is bad and says why."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hsvit_ds.data.decode import BadImageError, Box, Picture, installed, resolved
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
