"""The models, by the `kind` of their Config."""

from __future__ import annotations

import torch

from . import hsvit, vit
from .slimmable import Width

Config = hsvit.Config | vit.Config
Model = hsvit.HSViT | vit.ViT


def parameters(model: Model, width: Width) -> int:
    """Numbers of the standalone network at a width."""
    with torch.device("meta"):
        small = model.config.at(width).build(
            image_size=model.image_size, channels=model.channels, classes=model.classes
        )
    return sum(p.numel() for p in small.parameters())


def macs(model: Model, width: Width) -> int:
    """Multiply-adds of one image, forward, at a width."""
    return model.config.macs(model.image_size, model.channels, model.classes, width)
