"""Models by name, for scripts and notebooks. Importing this registers the names in timm too."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, register_model

from . import models
from .data.sets import IMAGENET_MEAN, IMAGENET_STD
from .engine.interop import MODEL, load_model, load_run
from .errors import RefusedError
from .models import hsvit, mobilenet, slimmable, uniformer, uniformer_config, vit, vit_config
from .models.network import any_seed
from .models.weights import load_exactly, read_foreign, unwrapped, with_own_classifier

Config = hsvit.Config | vit.Config | mobilenet.Config | uniformer.Config
_CLASSIFIERS = {"vit": ("head", "head_dist"), "hsvit": ("head.linear",), "mobilenet": ("classifier",)}
_CLASSIFIERS["uniformer"] = uniformer.UniFormer.heads
_FIRST = {"vit": "patch_embed.proj", "hsvit": "submodules.trunk.0.conv1", "mobilenet": "conv_stem"}


def _known() -> Iterator[tuple[str, Config, int]]:
    """(name, config, side of its images in pixels)"""
    for variant, side in {"C2A2": 32, "C3A4": 32, "C4A8": 32, "ImageNet-256": 256}.items():
        yield f"hsvit_{variant}", hsvit.Config(variant=variant), side
    widths = slimmable.Config(smallest=0.25, granularity=0.0625)
    for variant in vit_config.VARIANTS:
        yield f"scala_{variant}", vit.Config(variant=variant, distilled=True, widths=widths), 224
    for variant in mobilenet.VARIANTS:
        yield f"scala_{variant}", mobilenet.Config(variant=variant, widths=widths), 224
    for variant in uniformer_config.VARIANTS:
        yield f"scala_{variant}", uniformer.Config(variant=variant, widths=widths), 224


_NAMES = {name.lower().replace("-", "_").replace("+", "_plus"): (config, side) for name, config, side in _known()}


def list_models(filter: str = "") -> list[str]:  # timm's name for it
    """The names that `create_model` knows, by default all; filter: a pattern such as "hsvit_*"."""
    return sorted(fnmatch.filter(_NAMES, filter or "*"))


def create_model(
    name: str | Path,
    pretrained: str | Path | bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | None = None,
    **options: Any,
) -> models.Model:
    """A model by its name, or as a run or an export has it.

    Args:
        name: one of `list_models`, the folder of a run (its latest checkpoint), or of an export, or a model file.
        pretrained: file of weights, of `save_model` or another program's with the same keys. A classifier of another
            number of classes starts anew.
        num_classes: 1,000 by default; of a run or an export its own, and another number gives it a new classifier.
        in_chans: channels of an image. img_size: side of the images, pixels; by default the published.
        options: fields of the model's Config, as dropout, submodules, drop_path, widths.

    Returns:
        In training mode by its name, as timm's; in eval mode with the weights of a run or an export.

    Raises:
        RefusedError: no such name, folder or weights, or options that do not fit.
    """
    if pretrained is True:
        raise RefusedError(
            "pretrained=True: there are no published weights of these models; give a file, pretrained=PATH, or the "
            "folder of a run or an export in place of the name"
        )
    if str(name) not in _NAMES:
        return _saved(Path(name), num_classes)
    config, side = _NAMES[str(name)]
    known = {field.name for field in fields(config)} - {"kind", "variant", "weights", "resize"}
    if unknown := sorted(options.keys() - known):
        raise RefusedError(f"{name}: takes no {unknown[0]}; known: {', '.join(sorted(known))}")
    try:
        model = replace(config, **options).build(
            image_size=img_size or side,
            channels=in_chans,
            classes=1000 if num_classes is None else num_classes,
            seed=any_seed(),
        )
    except ValueError as error:
        raise RefusedError(f"{name}: {error}") from error
    if pretrained:
        _load(model, Path(pretrained))
    return model


def _load(model: models.Model, path: Path) -> None:
    found = read_foreign(path / MODEL if (path / MODEL).exists() else path)
    weights = with_own_classifier(unwrapped(found), model.state_dict(), _CLASSIFIERS[model.config.kind])
    load_exactly(model, weights, f"pretrained={path} does not fit")


def _saved(path: Path, num_classes: int | None) -> models.Model:
    if (path / "checkpoints").is_dir():
        model = load_run(path).model
    elif path.exists():
        model = load_model(path)
    else:
        raise RefusedError(f"{path}: neither a model ({', '.join(list_models())}) nor a run, an export or a model file")
    if num_classes not in (None, model.classes):
        model.reset_classifier(num_classes)
    return model


def _cfg(config: Config, side: int) -> dict[str, Any]:
    heads = _CLASSIFIERS[config.kind]
    stem = isinstance(config, uniformer.Config) and uniformer_config.VARIANTS[config.variant].stem
    return {
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_classes": 1000,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if config.kind == "hsvit" else 0.875,
        "first_conv": _FIRST.get(config.kind, f"patch_embed1.proj{'.0' if stem == 'convolutions' else ''}"),
        "classifier": heads[0] if len(heads) == 1 else heads,
    }


default_cfgs = generate_default_cfgs({name: _cfg(*entry) for name, entry in _NAMES.items()})
"""Where timm's registry looks for them."""


def _register(name: str) -> None:
    def entry(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **options: Any
    ) -> models.Model:
        options.pop("cache_dir", None)
        ours = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}
        model = create_model(name, pretrained, **{ours.get(key, key): value for key, value in options.items()})
        model.pretrained_cfg = model.default_cfg = default_cfgs[name].default.to_dict()
        return model

    entry.__name__ = name
    register_model(entry)
    setattr(sys.modules[__name__], name, entry)


for _name in _NAMES:
    _register(_name)
