"""Models to and from this project's own files: single-file models, and the checkpoints of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .. import models
from ..data import splits
from ..data.preprocessing import Preprocessing
from ..errors import RefusedError, first_line
from ..grid.grid import Config as GridConfig
from ..models import timm_models
from ..models.batchnorm import BatchNorm
from ..models.hsvit import HSViT
from ..models.mobilenet import MobileNet
from ..models.weights import COUNT, load_exactly
from .checkpoint import Position
from .checkpoint_files import chosen, read_manifest, read_weights

MODEL = "model.safetensors"
"""The model file in the folder of an export."""


@dataclass(frozen=True)
class ModelFile:
    """What a file of `save_model` holds: a model in eval mode, what an image goes through before it, and what its
    answers mean, () where that is not known."""

    model: models.Model
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    width: str
    """Of the slimmable network that it was taken from; empty where it was not."""


def save_model(
    model: models.Model,
    path: Path,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] = (),
    width: str = "",
) -> None:
    """Write one whole model to a safetensors file that `load_model` rebuilds, and timm where it has the model.
    preprocessing, classes, width: see `ModelFile`."""
    about = {
        "config": asdict(model.config),
        "image_size": model.image_size,
        "channels": model.channels,
        "classes": model.classes,
        **({"exchange": model.exchange} if isinstance(model, HSViT) else {}),
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        "names": list(classes),
        "width": width,
    }
    net = _net(model)
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    if isinstance(model, timm_models.Classifier | MobileNet):
        for name, module in net.named_modules():
            if isinstance(module, BatchNorm):  # timm's counts the steps too, and loads nothing without the count
                tensors[f"{name}{COUNT}"] = torch.tensor(0)
    save_file(tensors, path, metadata={"hsvit": json.dumps(about)})


def _net(model: models.Model) -> nn.Module:
    """What has timm's names of the weights, where timm has the model."""
    return model.net if isinstance(model, timm_models.Classifier) else model


def load_model(path: str | Path) -> models.Model:
    """The model in a file of `save_model`, or in the folder of an export, in eval mode.

    Raises:
        RefusedError: no such file, or none of this project's.
    """
    return read_model(path).model


def read_model(path: str | Path) -> ModelFile:
    """A file of `save_model`, or that in the folder of an export. Errors: see `load_model`."""
    is_folder = Path(path).is_dir()
    file = Path(path) / MODEL if is_folder else Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        if "hsvit" not in metadata:
            raise RefusedError(f'{file}: not a model file of hsvit-ds (no "hsvit" in its metadata)')
        about = json.loads(metadata["hsvit"])
        seen, names, width = (about.pop(key) for key in ("preprocessing", "names", "width"))
        model = models.without_weights(_config(about.pop("config"))).build(**about)
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(COUNT)}
    except FileNotFoundError as error:
        what = f"no folder of an export ({MODEL} is missing)" if is_folder else "no such file"
        raise RefusedError(f"{path}: {what}") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{file}: not a model file of hsvit-ds ({first_line(error)})") from error
    load_exactly(_net(model), tensors, f"{file} does not fit the model in its metadata")
    return ModelFile(model.eval(), None if seen is None else _preprocessing(seen), tuple(names), width)


def _preprocessing(table: Mapping[str, Any]) -> Preprocessing:
    found: Preprocessing = TypeAdapter(Preprocessing).validate_json(json.dumps(table))
    return found


@dataclass(frozen=True)
class LoadedRun:
    """A run's whole model in eval mode, the resolved recipe as a nested table, and where its checkpoint stands."""

    model: models.Model
    recipe: dict[str, Any]
    position: Position
    classes: tuple[str, ...]
    """What its answers mean, () where the data did not say."""


def load_run(folder: str | Path, ema: bool = False, checkpoint: str = "latest") -> LoadedRun:
    """A checkpoint of a run: its "latest", its "best", or that of a step. ema: the averaged weights. On the meta device
    the weights are not read.

    Raises:
        RefusedError: no such checkpoint, none with an average, or a damaged one.
    """
    place = chosen(Path(folder), checkpoint)
    manifest = read_manifest(place)
    recipe = manifest["recipe"]
    facts = splits.facts(splits.Config(**recipe["data"]))
    config = models.without_weights(_config(recipe["model"]))
    model = config.build(
        image_size=facts.image_size,
        channels=facts.channels,
        classes=facts.classes,
        exchange=GridConfig(**recipe["grid"]).exchange,
    )
    if not next(model.parameters()).is_meta:
        model.load_state_dict(read_weights(place, manifest, ema))
    return LoadedRun(model.eval(), recipe, Position(**manifest["position"]), tuple(manifest.get("classes", ())))


def _config(table: Mapping[str, Any]) -> models.Config:
    config: models.Config = TypeAdapter(models.Config).validate_json(json.dumps(table), strict=True)
    return config
