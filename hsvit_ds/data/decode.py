"""From the bytes of an image file to pixels: turbo-JPEG, scaled while it is decoded, or Pillow."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from ..errors import RefusedError, counted, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may take a file for, whatever it is called: it would hand PostScript to Ghostscript, which runs it."""
FIRST = 16
"""Images of a set that tell its channels."""
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of one channel, transparency apart."""
MOST_PIXELS = 2**28 // 3
"""Of an image, 256 MiB as RGB: a file of a few bytes can claim any size, and would be given the memory."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation. Pillow's own `exif_transpose` also writes the EXIF anew, and fails where it is odd."""


class BadImageError(Exception):
    """A file that holds no image; the message says why."""


@dataclass(frozen=True)
class Box:
    """A part of an image, pixels."""

    top: int
    left: int
    height: int
    width: int


def installed(decoder: str) -> str:
    """The decoder and its versions, as a resolved recipe names it; "auto" takes the first that is installed.

    Pillow is part of each, since it reads what turbo-JPEG does not.
    """
    name = decoder.partition(" ")[0]
    pillow = f"pillow {version('pillow')} (libjpeg {features.version('jpg')})"
    if name == "pillow":
        return pillow
    if name not in ("auto", "simplejpeg"):
        raise RefusedError(f'data.decoder = "{decoder}": must be "auto", "simplejpeg" or "pillow"')
    try:
        return f"simplejpeg {version('simplejpeg')}, {pillow}"
    except PackageNotFoundError:
        if name == "auto":
            return pillow
        raise RefusedError('data.decoder = "simplejpeg": not installed; pip install simplejpeg') from None


def resolved(decoder: str) -> str:
    """`installed`, refused where a recipe names another version."""
    found = installed(decoder)
    if " " in decoder and decoder != found:
        raise RefusedError(
            f'data.decoder = "{decoder}", but here it is "{found}", whose pixels may differ; install the same, or take '
            'this one with data.decoder = "auto" (and data.any_decoder = true to resume)'
        )
    return found


class Picture:
    """An image file whose header has been read: `height` and `width` are those after its EXIF rotation.

    Args:
        channels: of its pixels: 3, RGB, or 1, to which colours are converted by luminance.

    Raises:
        BadImageError: it cannot be read.
    """

    def __init__(self, data: bytes, decoder: str, channels: int = 3) -> None:
        self._data, self._channels = data, channels
        self._pillow: Image.Image | None = None
        if decoder.startswith("simplejpeg") and data[:3] == b"\xff\xd8\xff" and not _may_be_turned(data):
            import simplejpeg

            try:
                self.height, self.width, space, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:  # Pillow may read it, and says better what is wrong
                space = "unknown"
            if space in ("YCbCr", "RGB", "Gray"):
                check_size(self.height, self.width)
                self.is_grey = space == "Gray"
                return
        self._open()

    def _open(self) -> None:
        image = open_upright(self._data)
        self._pillow, self.height, self.width = image, image.height, image.width
        self.is_grey = image.mode in GREY

    def pixels(self, box: Box, size: int) -> np.ndarray:
        """uint8 [height, width, channels] of a box that will be resized to `size`.

        A JPEG with more than twice the pixels is halved, quartered or divided by eight while it is decoded, which skips
        most of the work: the box is then that much smaller, and never smaller than `size`.
        """
        if self._pillow is None:
            import simplejpeg

            factor = _reduction(box, size)
            small = (
                {"min_height": -(-self.height // factor), "min_width": -(-self.width // factor)} if factor > 1 else {}
            )
            try:
                whole = simplejpeg.decode_jpeg(self._data, "RGB" if self._channels == 3 else "GRAY", **small)
                return _cut(whole, box, factor)
            except ValueError:  # also of what Pillow only warns of, as of stray bytes
                self._open()
        assert self._pillow is not None
        try:
            return _cut(_array(self._pillow, self._channels), box, 1)
        except Exception as error:  # as above
            raise BadImageError(first_line(error)) from None


def check_channels(images: Iterable[tuple[str, bytes]], channels: int, decoder: str) -> None:
    """Refuse a set by some of its images, each a name and a file, for a model of so many `channels`; 0: any.

    Raises:
        RefusedError: one in colours for a model of one channel, or nothing but grey ones for a model of three.
    """
    grey = list[str]()
    for name, data in images if channels else ():
        try:
            picture = Picture(data, decoder)
        except BadImageError:  # told when it is its turn
            continue
        if picture.is_grey:
            grey.append(name)
        elif channels == 1:
            raise RefusedError(
                f"{name}: has three channels, but the data set one; is data.root right? data.channels=3 is for images "
                "in colours"
            )
        else:
            return
    if channels == 3 and grey:
        raise RefusedError(
            f"{grey[0]}: has one channel, as all {counted(len(grey), 'image')} looked at, but the data set three; is "
            "data.root right? data.channels=3 reads grey as RGB; a model of one channel takes data.channels=1, and the "
            "data.name of no known set in colours"
        )


def check_size(height: int, width: int) -> None:
    """
    Raises:
        BadImageError: an image of this size would take too much memory.
    """
    if height * width > MOST_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MOST_PIXELS}")


def open_upright(data: bytes) -> Image.Image:
    """Pillow's image, decoded, and turned as its EXIF or XMP says, where they can be read.

    Raises:
        BadImageError: Pillow knows no such file, cannot decode it to its end, or it is too large.
    """
    if not data:
        raise BadImageError("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, once for each such image
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)  # of an animation the first frame
            check_size(image.height, image.width)
            image.load()  # before its EXIF, which of a PNG would load it too, and fail for another reason
            turn = _TURNS.get(_orientation(image))
            if turn is not None:
                image = image.transpose(turn)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Exception as error:  # damaged files raise nearly anything, SyntaxError and struct.error among it
        raise BadImageError(first_line(error)) from None
    return image


def digest(image: Image.Image) -> bytes:
    """Of its pixels, however a file stores them."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where it cannot be read: whole pixels are not lost to damaged metadata."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as above
        return 1
    return found if isinstance(found, int) else 1


def _may_be_turned(jpeg: bytes) -> bool:
    """Whether what stands before a JPEG's first scan may tell an orientation, which turbo-JPEG does not read."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] not in (b"\xda", b""):
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    header = jpeg[:at] if jpeg[at : at + 2] == b"\xff\xda" else jpeg
    return b"Exif\0\0" in header or b"tiff:Orientation" in header


def _reduction(box: Box, size: int) -> int:
    """Largest of 8, 4, 2, 1 that keeps both sides of the box at `size` or more."""
    most = min(box.height, box.width) // size
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(most, 1))


def _cut(whole: np.ndarray, box: Box, factor: int) -> np.ndarray:
    bottom, right = -(-(box.top + box.height) // factor), -(-(box.left + box.width) // factor)
    return whole[box.top // factor : bottom, box.left // factor : right]


def _array(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of an image of any mode; 16 bits are scaled, transparency is drawn on black as it is
    stored."""
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would cut everything above 255 off
        grey = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 1.0)
        np.clip(grey, 0, top, out=grey)
        grey *= 255 / top
        return np.repeat(np.rint(grey, out=grey).astype(np.uint8)[:, :, None], channels, 2)
    mode = "RGB" if channels == 3 else "L"
    found = np.asarray(image if image.mode == mode else image.convert(mode))
    return found if channels == 3 else found[:, :, None]
