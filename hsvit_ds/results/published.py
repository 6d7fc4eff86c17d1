"""Published accuracies by width on ImageNet-1k, to stand beside a run of the same model and method.

Of arXiv 2412.04786 (Scala): its text and tables, its figures, and the README of the authors' repository; and of the
repository of US-Net (arXiv 1903.05134).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DATA = "imagenet1k"
PAPER, REPOSITORY = "arXiv 2412.04786", "github.com/BeSpontaneous/Scala-pytorch"
US_NET = "github.com/JiahuiYu/slimmable_networks"
_SCALA = {"task.kind": "scala", "task.sampling": "paper", "task.transfer": "progressive", "task.label_weight": 1.0}
_SCALA |= {"model.widths.isolated": True, "model.widths.smallest": 0.25}
_OWN = {"model.widths.slice": "channels", "model.widths.then": []}
_OWN |= {"task.pinned": [], "task.transfer_token": "distillation"}
"""What no published curve has another of; a recipe that does not know the key does as this says."""
_S = {"model.variant": "DeiT-S", "run.epochs": 100}
_B = {"model.variant": "DeiT-B"}
_SPLUS = {"model.variant": "UniFormer-S+", "run.epochs": 100}
_XS = {"model.variant": "UniFormer-XS", "run.epochs": 150}
_DEIT = {"task.teacher.name": "timm/deit_base_patch16_224"}
_REGNET = {"task.teacher.name": "timm/regnety_160"}
_USNET = {"task.kind": "scala", "task.sampling": "sandwich", "task.transfer": "full", "task.teacher.name": ""}
_SEPARATE = {"task.kind": "scala", "task.sampling": "fixed", "task.teacher.name": ""}


@dataclass(frozen=True)
class Published:
    """A curve. top1: %, by width. figure: widths whose value was read off a figure, to about 0.1. recipe: keys with the
    values that a run of the same has."""

    name: str
    source: str
    recipe: Mapping[str, Any]
    top1: Mapping[str, float]
    figure: frozenset[str] = frozenset()


def _of(*values: float) -> dict[str, float]:
    """At 0.25, 0.50, 0.75 and 1."""
    return dict(zip(("0.25", "0.50", "0.75", "1.00"), values, strict=True))


CURVES = (
    Published(
        "Scala, DeiT-S, 13 networks",
        f"{PAPER}, tables and figures",
        _S | _SCALA | {"model.widths.granularity": 0.0625},
        _of(58.7, 68.3, 73.3, 76.1)
        | {"0.3125": 59.2, "0.375": 63.4, "0.4375": 66.4, "0.5625": 70.0, "0.625": 71.3}
        | {"0.6875": 72.3, "0.8125": 73.9, "0.875": 74.4, "0.9375": 75.1},
        frozenset({"0.3125", "0.6875", "0.8125", "0.9375"}),
    ),
    Published(
        "Scala, DeiT-S, 25 networks",
        REPOSITORY,
        _S | _SCALA | {"model.widths.granularity": 0.03125},
        _of(58.4, 67.8, 73.1, 76.2),
    ),
    Published(
        "Scala, DeiT-S, 7 networks",
        f"{REPOSITORY}, README and figures",
        _S | _SCALA | {"model.widths.granularity": 0.125},
        _of(59.8, 70.3, 74.2, 76.5) | {"0.375": 66.2, "0.625": 72.6, "0.875": 75.0},
        frozenset({"0.375", "0.625", "0.875"}),
    ),
    Published(
        "Scala, DeiT-S, 4 networks",
        REPOSITORY,
        _S | _SCALA | {"model.widths.granularity": 0.25},
        _of(59.8, 72.0, 75.6, 76.7),
    ),
    Published(
        "US-Net, DeiT-S, 13 networks",
        f"{PAPER}, tables and figures",
        _S | _USNET | {"model.widths.granularity": 0.0625},
        _of(52.7, 60.1, 66.9, 73.2)
        | {"0.3125": 51.5, "0.375": 54.5, "0.4375": 57.6, "0.5625": 62.3, "0.625": 64.1}
        | {"0.6875": 65.7, "0.8125": 67.8, "0.875": 68.8, "0.9375": 69.7},
        frozenset({"0.3125", "0.375", "0.4375", "0.5625", "0.625", "0.6875", "0.8125", "0.875", "0.9375"}),
    ),
    Published("separate training, DeiT-S", f"{PAPER}, table", _S | _SEPARATE, _of(45.8, 65.1, 70.7, 75.0)),
    Published(
        "AutoFormer, DeiT-S",
        f"{PAPER}, table",
        _S | {"task.kind": "scala", "task.sampling": "single"},
        _of(50.8, 65.6, 69.5, 69.8),
    ),
    Published(
        "separate training, DeiT-B, 300 epochs",
        f"{PAPER}, table 3",
        _B | _SEPARATE | {"run.epochs": 300},
        _of(72.2, 79.9, 81.0, 81.8),
    ),
    Published(
        "Scala, DeiT-B, 13 networks",
        f"{PAPER}, table 3",
        _B | _SCALA | _DEIT | {"model.widths.granularity": 0.0625, "run.epochs": 300},
        _of(75.3, 79.3, 81.2, 82.0) | {"0.375": 76.9, "0.625": 80.5, "0.875": 81.6},
    ),
    Published(
        "Scala, DeiT-B, 13 networks, RegNetY as teacher",
        f"{PAPER}, table 3",
        _B | _SCALA | _REGNET | {"model.widths.granularity": 0.0625, "run.epochs": 300},
        _of(75.4, 79.7, 81.8, 82.9) | {"0.375": 77.2, "0.625": 80.9, "0.875": 82.2},
    ),
    Published(
        "Scala, DeiT-B, 7 networks",
        REPOSITORY,
        _B | _SCALA | _DEIT | {"model.widths.granularity": 0.125, "run.epochs": 300},
        _of(75.3, 79.7, 81.4, 82.0),
    ),
    Published(
        "Scala, DeiT-B, 4 networks",
        REPOSITORY,
        _B | _SCALA | _DEIT | {"model.widths.granularity": 0.25, "run.epochs": 300},
        _of(75.6, 80.9, 81.9, 82.2),
    ),
    Published(
        "Scala, DeiT-B, 13 networks, 400 epochs",
        REPOSITORY,
        _B | _SCALA | _DEIT | {"model.widths.granularity": 0.0625, "run.epochs": 400},
        _of(75.7, 79.5, 81.5, 82.3),
    ),
    Published(
        "Scala, DeiT-B, 7 networks, 400 epochs",
        REPOSITORY,
        _B | _SCALA | _DEIT | {"model.widths.granularity": 0.125, "run.epochs": 400},
        _of(76.0, 80.1, 81.7, 82.4),
    ),
    Published(
        "Scala, UniFormer-S+, 13 networks",
        f"{PAPER}, table 2 and figure",
        _SPLUS | _SCALA | {"model.widths.granularity": 0.0625},
        _of(66.8, 75.5, 80.0, 82.0)
        | {"0.3125": 66.8, "0.375": 70.7, "0.4375": 73.5, "0.5625": 77.0, "0.625": 78.1}
        | {"0.6875": 79.3, "0.8125": 80.5, "0.875": 80.8, "0.9375": 81.2},
        frozenset(
            {"0.25", "0.3125", "0.375", "0.625", "0.6875", "0.75", "0.8125", "0.875", "0.9375", "1.00"},
        ),
    ),
    Published(
        "separate training, UniFormer-S+",
        f"{PAPER}, figure",
        _SPLUS | _SEPARATE,
        _of(60.7, 74.0, 78.7, 81.1),
        frozenset(_of(0, 0, 0, 0)),
    ),
    Published(
        "Scala, UniFormer-XS, 7 networks",
        f"{PAPER}, figure",
        _XS | _SCALA | {"model.widths.granularity": 0.125},
        _of(60.5, 72.3, 77.4, 80.2) | {"0.375": 67.2, "0.625": 75.2, "0.875": 78.5},
        frozenset({"0.25", "0.375", "0.50", "0.625", "0.75", "0.875", "1.00"}),
    ),
    Published(
        "separate training, UniFormer-XS",
        f"{PAPER}, figure",
        _XS | _SEPARATE,
        _of(53.7, 70.9, 76.9, 80.0),
        frozenset(_of(0, 0, 0, 0)),
    ),
    Published(
        "US-Net, MobileNetV2, 250 epochs",
        US_NET,
        {"model.variant": "MobileNetV2", "run.epochs": 250} | _USNET,
        {"0.35": 62.3, "0.375": 63.3, "0.40": 63.4, "0.425": 64.2, "0.45": 64.2, "0.475": 64.9, "0.50": 65.1}
        | {"0.525": 65.4, "0.55": 65.6, "0.575": 67.6, "0.60": 67.6, "0.625": 68.3, "0.75": 69.6, "1.00": 71.5},
    ),
)


def of(recipe: Mapping[str, Any]) -> list[Published]:
    """What is published of the model and method of a flat recipe; [] on other data."""
    if recipe.get("data.name") != DATA:
        return []
    if any(recipe.get(key, value) != value for key, value in _OWN.items()):
        return []
    return [curve for curve in CURVES if all(recipe.get(key) == value for key, value in curve.recipe.items())]
