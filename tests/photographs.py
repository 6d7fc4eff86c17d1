"""Photographs that a test draws: shapes of a class's colour before noise, in folders of classes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CLASSES = {
    "Gänseblümchen weiß": ("ellipse", (235, 235, 220)),
    "rote Rose": ("rectangle", (200, 30, 40)),
    "blue sky [noon]": ("rectangle", (90, 150, 230)),
    "Sonnenblume": ("ellipse", (240, 190, 20)),
}
"""{folder: shape and colour}: names as people give them."""


def draw(path: Path, kind: str, colour: tuple[int, int, int], number: int, **options: Any) -> None:
    """A picture of a shape somewhere before a grey noise, saved by Pillow with some options."""
    luck = random.Random(f"{kind}{colour}{number}")
    size = luck.randint(80, 140), luck.randint(70, 120)
    image = Image.effect_noise(size, 60).convert("RGB")
    side = luck.randint(30, 60)
    left, top = luck.randint(0, size[0] - side), luck.randint(0, size[1] - side)
    tone = tuple(max(0, min(255, part + luck.randint(-25, 25))) for part in colour)
    getattr(ImageDraw.Draw(image), kind)((left, top, left + side, top + side), fill=tone)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def folder(root: Path, each: int, names: tuple[str, ...] = tuple(CLASSES)) -> Path:
    """So many JPEGs of each class in folders below `root`."""
    for name in names:
        for number in range(each):
            draw(root / name / f"Foto {number:03d}.jpg", *CLASSES[name], number, quality=90)
    return root
