"""Weights from and to other programs: published code's, timm's, runs of this project, and its single-file models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import models
from ..data import splits
from ..data.preprocessing import Preprocessing
from ..errors import RefusedError, counted, first_line
from ..grid.grid import Config as GridConfig
from ..models import slimmable, timm_models, vit
from ..models.batchnorm import BatchNorm
from ..models.hsvit import Config as HSViTConfig
from ..models.hsvit import HSViT
from ..models.weights import load_exactly, resembling, unwrapped
from .checkpoint import Position
from .checkpoint_files import chosen, read_manifest, read_weights

MODEL = "model.safetensors"
"""The model file in the folder of an export."""


def import_weights(
    state_dict: Mapping[str, Any],
    *,
    image_size: int = 0,
    pool_strides: tuple[int, ...] = (),
    heads: int = 0,
    smallest: float = 1.0,
    granularity: float = 0.0625,
    side: str = "leading",
    hydravit: bool = False,
) -> models.Model:
    """Build the model that weights belong to, told by their keys: the published HSViT's, or a DeiT's, which where
    `smallest` is below 1 are Scala's too, or HydraViT's (`hydravit`). Arguments and errors: `import_hsvit`,
    `import_scala`, `import_hydravit`, `import_deit`."""
    weights = unwrapped(state_dict)
    if not any(key.startswith(("blocks.", "patch_embed.")) for key in weights):
        if not any("conv2d_layers." in key for key in weights):
            raise RefusedError(
                f"{counted(len(weights), 'tensor')} ({', '.join(list(weights)[:3])}, …) of neither a DeiT nor the "
                f"published HSViT: they seem to be {resembling(weights)}; of timm's networks model.weights takes them "
                '(model.kind = "timm"), or model.backbone.weights'
            )
        if not image_size or not pool_strides:
            raise RefusedError("weights of the published HSViT code need --image-size and --pool-strides")
        return import_hsvit(state_dict, image_size=image_size, pool_strides=pool_strides, heads=heads or 8)
    if smallest == 1:
        return import_deit(state_dict, heads)
    if hydravit:
        return import_hydravit(state_dict, smallest=smallest, granularity=granularity, heads=heads)
    return import_scala(state_dict, smallest=smallest, granularity=granularity, side=side, heads=heads)


def import_scala(
    state_dict: Mapping[str, Any], *, smallest: float, granularity: float, side: str = "leading", heads: int = 0
) -> vit.ViT:
    """Build a `ViT` that computes what the published Scala code (github BeSpontaneous/Scala-pytorch) does with weights.

    Args:
        state_dict: a DeiT's keys, or a checkpoint that nests them under "model", with or without "module." in front.
        smallest, granularity: the widths it was trained at. side: of the smallest; the published code takes leading
            channels, the paper trailing ones. heads: by default one for 64 channels, as in every DeiT; has to be given
            where the channels are no multiple of 64.

    Raises:
        RefusedError: keys that are missing or left over (listed), or shapes that are no square ViT's.
    """
    widths = {"smallest": smallest, "granularity": granularity, "side": side}
    return _import_vit(state_dict, widths, heads, qkv="fused", softmax_scale="full", norm_eps=1e-5)


def import_hydravit(
    state_dict: Mapping[str, Any], *, smallest: slimmable.Ratio, granularity: slimmable.Ratio, heads: int = 0
) -> vit.ViT:
    """Build a `ViT` that computes what the published HydraViT code (github ds-kiel/HydraViT) does with weights: a width
    is so many of the heads, the leading ones. Arguments and errors: see `import_scala`."""
    widths = {"smallest": smallest, "granularity": granularity, "slice": "heads", "side": "leading", "isolated": False}
    return _import_vit(state_dict, widths, heads)


def import_deit(state_dict: Mapping[str, Any], heads: int = 0) -> vit.ViT:
    """Build a `ViT` from weights of a timm or DeiT model, plain or distilled; see `import_scala`."""
    return _import_vit(state_dict, {}, heads)


def _import_vit(state_dict: Mapping[str, Any], widths: dict[str, Any], heads: int, **options: Any) -> vit.ViT:
    weights = unwrapped(state_dict)
    patch, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    head, fc1 = weights.get("head.weight"), weights.get("blocks.0.mlp.fc1.weight")
    if patch is None or positions is None or head is None or fc1 is None:
        raise RefusedError(
            "these are not weights of a DeiT: patch_embed.proj.weight, pos_embed, head.weight or "
            f"blocks.0.mlp.fc1.weight is missing among {counted(len(weights), 'key')}; "
            f"they seem to be {resembling(weights)}"
        )
    embedding, channels, side = patch.shape[0], patch.shape[1], patch.shape[2]
    if not heads and embedding % 64:
        raise RefusedError(
            f"{embedding} channels are no multiple of 64, which a DeiT's head has: the shapes do not tell the number "
            "of heads; give it (--heads, heads=)"
        )
    distilled = "dist_token" in weights
    grid = isqrt(positions.shape[1] - 1 - distilled)
    if grid**2 != positions.shape[1] - 1 - distilled:
        raise RefusedError(f"pos_embed has shape {tuple(positions.shape)}: not the patches of a square image")
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    scales = weights.get("blocks.0.ls1.gamma")
    try:
        model = vit.Config(
            embedding=embedding,
            heads=heads or embedding // 64,
            depth=depth,
            mlp_ratio=fc1.shape[0] / embedding,
            patch_size=side,
            distilled=distilled,
            layer_scale=0.0 if scales is None else 1e-5,
            widths=slimmable.Config(**widths),
            **options,
        ).build(image_size=grid * side, channels=channels, classes=head.shape[0])
    except ValueError as error:
        raise RefusedError(str(error)) from error
    load_exactly(model, weights, f"the weights do not fit {model.config}")
    return model


def import_hsvit(
    state_dict: Mapping[str, Any],
    *,
    image_size: int,
    pool_strides: tuple[int, ...],
    heads: int = 8,
) -> HSViT:
    """Build an `HSViT` (M = 1) from weights of the published code (arXiv 2404.05196, github xuchenhao001/HSViT).

    Args:
        state_dict: the model's, or a Lightning checkpoint that nests it under "state_dict" with "model." in front.
        image_size, pool_strides, heads: what the shapes do not tell; everything else is inferred from them.

    Raises:
        RefusedError: keys that are missing or left over (listed), or an image size that does not fit the projection.
    """
    weights = unwrapped(state_dict)
    if any(k.startswith("model.model.") for k in weights):
        weights = {k.removeprefix("model."): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    config, channels, classes = _infer(weights, image_size, pool_strides, heads)
    model = HSViT(config, image_size=image_size, channels=channels, classes=classes)
    found: dict[str, Tensor] = {}
    for ours, theirs in _key_map(config).items():
        missing = [key for key in theirs if key not in weights]
        if missing:
            raise RefusedError(f"the published weights lack {', '.join(missing)}")
        parts = [weights.pop(key) for key in theirs]
        target = model.state_dict()[ours]
        value = torch.stack(parts) if len(parts) > 1 else parts[0]
        if value.numel() != target.numel():
            raise RefusedError(
                f"{theirs[0]} has shape {tuple(parts[0].shape)}, which does not fit {tuple(target.shape)} of a model "
                f"for {image_size} px with pool strides {list(pool_strides)}"
            )
        found[ours] = value.reshape(target.shape)
    if weights:
        raise RefusedError(f"unknown keys in the published weights: {', '.join(sorted(weights))}")
    model.load_state_dict(found)
    return model


def _infer(
    weights: Mapping[str, Tensor], image_size: int, pool_strides: tuple[int, ...], heads: int
) -> tuple[HSViTConfig, int, int]:
    """Everything the shapes tell: (config, image channels, classes)."""
    convs: list[torch.Size] = []
    while (key := f"model.conv2d_layers.{len(convs)}.layer.0.convolution.weight") in weights:
        convs.append(weights[key].shape)
    depth = 0
    while f"model.attn_encoders.0.{depth}.attn_block.layer_norm.weight" in weights:
        depth += 1
    head = weights.get("classifier.mlp_head.1.weight")
    cls = weights.get("model.cls_token_embeddings")
    if not convs or head is None or cls is None:
        raise RefusedError(
            "these are not weights of the published HSViT code: no model.conv2d_layers, "
            f"model.cls_token_embeddings or classifier.mlp_head among {counted(len(weights), 'key')}"
        )
    try:
        config = HSViTConfig(
            kernels=tuple(shape[0] for shape in convs),
            kernel_sizes=tuple(shape[2] for shape in convs),
            pool_strides=pool_strides,
            groups=cls.shape[0],
            depth=depth,
            heads=heads,
            embedding=cls.shape[-1],
        ).resolved(image_size)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return config, convs[0][1], head.shape[0]


def _key_map(config: HSViTConfig) -> dict[str, list[str]]:
    """Our name to the published names that are stacked into it."""
    names: dict[str, list[str]] = {}
    for block in range(len(config.kernels)):
        for unit in (0, 1):
            ours = f"submodules.trunk.{block}."
            theirs = f"model.conv2d_layers.{block}.layer.{unit}."
            names[f"{ours}conv{unit + 1}.weight"] = [f"{theirs}convolution.weight"]
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                names[f"{ours}norm{unit + 1}.{leaf}"] = [f"{theirs}normalization.{leaf}"]
    for leaf in ("weight", "bias"):
        names[f"submodules.projection_{leaf}"] = [f"model.embed_projection.0.{leaf}"]
        names[f"head.norm.{leaf}"] = [f"classifier.mlp_head.0.{leaf}"]
        names[f"head.linear.{leaf}"] = [f"classifier.mlp_head.1.{leaf}"]
    names["submodules.cls"] = ["model.cls_token_embeddings"]
    names["submodules.positions"] = ["model.position_embeddings"]
    stacked = {
        "norm_weight": "layer_norm.weight",
        "norm_bias": "layer_norm.bias",
        "qkv_weight": "self_attn.in_proj_weight",
        "qkv_bias": "self_attn.in_proj_bias",
        "out_weight": "self_attn.out_proj.weight",
        "out_bias": "self_attn.out_proj.bias",
    }
    for ours, theirs in stacked.items():
        names[f"submodules.{ours}"] = [
            f"model.attn_encoders.{g}.{a}.attn_block.{theirs}"
            for g in range(config.groups)
            for a in range(config.depth)
        ]
    return names


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
    if net is not model:
        for name, module in net.named_modules():
            if isinstance(module, BatchNorm):  # timm's counts the steps too, and loads nothing without the count
                tensors[f"{name}.{_COUNT}"] = torch.tensor(0)
    save_file(tensors, path, metadata={"hsvit": json.dumps(about)})


_COUNT = "num_batches_tracked"


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
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(_COUNT)}
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
