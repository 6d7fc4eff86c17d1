"""Numbers as pictures inside a page: small PNGs of a pixel a number, which the browser enlarges."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

STEPS = 255
"""Colours of a scale; one more is transparent."""
CELL = 4
AMOUNTS, AGREEMENT, OVERLAY = "viridis", "coolwarm", "inferno"


def picture(pixels: Tensor) -> str:
    """uint8 [H, W, 1 or 3] as a data URI."""
    array = pixels.numpy()
    return _uri(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


def heat(values: Tensor, low: float, high: float, scale: str = AMOUNTS) -> str:
    """fp32 [H, W] as a data URI, in the colours of a scale from `low` to `high`; NaN is transparent, and so is much of
    what is low of an overlay."""
    array = values.numpy()
    missing = np.isnan(array)
    share = (np.nan_to_num(array) - low) / (high - low or 1)
    index = np.where(missing, STEPS, np.clip(np.round(share * (STEPS - 1)), 0, STEPS - 1))
    image = Image.fromarray(index.astype(np.uint8), mode="P")
    image.putpalette(_colours(scale).tobytes())
    opacity = np.linspace(0, 0.85, STEPS) if scale == OVERLAY else np.ones(STEPS)
    return _uri(image, transparency=bytes([*(opacity * 255).astype(np.uint8), 0]))


def strip(maps: Tensor, low: float, high: float) -> str:
    """[N, h, w] beside each other, a transparent pixel between two."""
    n, h, w = maps.shape
    wide = maps.new_full((h, n * (w + 1) - 1), float("nan"))
    for place, one in enumerate(maps):
        wide[:, place * (w + 1) : place * (w + 1) + w] = one
    return heat(wide, low, high)


def spaced(values: Tensor, rows: Sequence[int], columns: Sequence[int] = ()) -> Tensor:
    """[H, W], each number `CELL` pixels wide and high, with a line of NaN before some rows and columns."""
    array = values.numpy().repeat(CELL, 0).repeat(CELL, 1)
    array = np.insert(array, [CELL * row for row in rows], np.nan, axis=0)
    return values.new_tensor(np.insert(array, [CELL * column for column in columns], np.nan, axis=1))


def gradient(scale: str) -> str:
    """A scale from its low to its high end, as CSS."""
    stops = _colours(scale)[np.linspace(0, STEPS - 1, 9).astype(int)]
    return f"linear-gradient(to right, {', '.join('#' + bytes(stop).hex() for stop in stops)})"


@cache
def _colours(scale: str) -> np.ndarray:
    """uint8 [STEPS + 1, 3]."""
    found = matplotlib.colormaps[scale](np.linspace(0, 1, STEPS))[:, :3]
    return np.round(np.concatenate([found, np.zeros((1, 3))]) * 255).astype(np.uint8)


def _uri(image: Image.Image, **options: bytes) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
