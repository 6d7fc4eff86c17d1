"""The models, by the `kind` of their Config."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import hsvit, mobilenet, timm_models, uniformer, vit
from .network import AnyWidth
from .weights import SizedStart

Config = hsvit.Config | vit.Config | mobilenet.Config | uniformer.Config | timm_models.Config
Own = hsvit.HSViT | vit.ViT | mobilenet.MobileNet | uniformer.UniFormer
Model = Own | timm_models.Classifier


def without_weights(config: Config) -> Config:
    """A config whose model starts from random weights, because it will be given others or has none to start from."""
    if isinstance(config, timm_models.Config):
        return replace(config, weights="")
    if isinstance(config, hsvit.Config):
        config = replace(config, backbone=replace(config.backbone, weights=""))
    if isinstance(config, SizedStart):
        return replace(config, weights="", resize=False)
    return replace(config, weights="")


def parameters(model: Model, width: AnyWidth) -> int:
    """Numbers of the standalone network at a width."""
    width = model.width(width)
    with torch.device("meta"):
        small = model.config.at(width).build(
            image_size=model.image_size, channels=model.channels, classes=model.classes
        )
    return sum(p.numel() for p in small.parameters())


def macs(model: Model, width: AnyWidth) -> int:
    """Multiply-adds of one image, forward, at a width."""
    found: int = model.config.macs(model.image_size, model.channels, model.classes, model.width(width))
    return found
