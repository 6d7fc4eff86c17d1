"""The models, by the `kind` of their Config."""

from __future__ import annotations

from . import hsvit, vit

Config = hsvit.Config | vit.Config
Model = hsvit.HSViT | vit.ViT
