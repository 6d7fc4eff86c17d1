"""Other programs' weights to models of this project: the published HSViT's, Scala's and HydraViT's, UniFormer's, and
timm's DeiT and MobileNetV2."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..errors import RefusedError, counted
from ..models import mobilenet, slimmable, uniformer, uniformer_config, vit
from ..models.hsvit import Config as HSViTConfig
from ..models.hsvit import HSViT
from ..models.weights import load_exactly, resembling, unwrapped


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
    """Build the model that weights belong to, told by their keys: the published HSViT's, a UniFormer's, a
    MobileNetV2's, or a DeiT's, which where `smallest` is below 1 are Scala's too, or HydraViT's (`hydravit`). Arguments
    and errors: `import_hsvit`, `import_uniformer`, `import_mobilenet`, `import_scala`, `import_hydravit`,
    `import_deit`."""
    weights = unwrapped(state_dict)
    if "patch_embed1.proj.weight" in weights or "patch_embed1.proj.0.weight" in weights:
        return import_uniformer(state_dict, image_size=image_size or 224, heads=heads)
    if "conv_stem.weight" in weights and "blocks.0.0.conv_dw.weight" in weights:
        return import_mobilenet(state_dict, image_size=image_size or 224)
    if not any(key.startswith(("blocks.", "patch_embed.")) for key in weights):
        if not any("conv2d_layers." in key for key in weights):
            raise RefusedError(
                f"{counted(len(weights), 'tensor')} ({', '.join(list(weights)[:3])}, …) of no DeiT, UniFormer, "
                f"MobileNetV2 or published HSViT: they seem to be {resembling(weights)}; of timm's networks "
                'model.weights takes them (model.kind = "timm"), or model.backbone.weights'
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


def import_mobilenet(state_dict: Mapping[str, Any], *, image_size: int = 224) -> mobilenet.MobileNet:
    """Build a `MobileNet` from weights of timm's MobileNetV2, of any share of its channels.

    Raises:
        RefusedError: keys that are missing or left over, or other shapes (listed).
    """
    weights = unwrapped(state_dict)
    stages = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    depths = tuple(len({k.split(".")[2] for k in weights if k.startswith(f"blocks.{n}.")}) for n in range(stages))
    last = [f"blocks.{stage}.{depth - 1}.conv_pw{'l' if stage else ''}.weight" for stage, depth in enumerate(depths)]
    sized = _sizes(weights, ["conv_stem.weight", *last, "conv_head.weight", "classifier.weight"])
    images = weights["conv_stem.weight"].shape[1]
    *channels, features, classes = sized
    inside, entering = _sizes(weights, ["blocks.1.0.conv_pw.weight", "blocks.0.0.conv_pw.weight"])
    try:
        model = mobilenet.Config(
            channels=tuple(channels),
            depths=depths,
            strides=mobilenet.VARIANTS["MobileNetV2"].strides,
            expansion=inside // entering,
            features=features,
        ).build(image_size=image_size, channels=images, classes=classes)
    except ValueError as error:
        raise RefusedError(f"weights of a network like a MobileNetV2, but none: {error}") from error
    load_exactly(model, weights, f"the weights do not fit {model.config}")
    return model


def import_uniformer(state_dict: Mapping[str, Any], *, image_size: int = 224, heads: int = 0) -> uniformer.UniFormer:
    """Build a `UniFormer` from weights of the published code (arXiv 2201.09450, github Sense-X/UniFormer).

    Args:
        heads: of the third stage, which no shape tells (the fourth has heads of the same width); by default those of
            the published variant of these shapes.

    Raises:
        RefusedError: keys that are missing or left over, or other shapes (listed); a variant that is not known, without
            `heads`.
    """
    weights = unwrapped(state_dict)
    stem = "convolutions" if "patch_embed1.proj.0.weight" in weights else "patches"
    downsampling = "convolutions" if "patch_embed2.proj.0.weight" in weights else "patches"
    stages = range(1, 5)
    depths = tuple(len({k.split(".")[1] for k in weights if k.startswith(f"blocks{stage}.")}) for stage in stages)
    sizes = _sizes(weights, [f"blocks{stage}.0.{layer}.weight" for stage in stages for layer in ("norm1", "mlp.fc1")])
    *_, classes = _sizes(weights, ["head.weight"])
    channels, hidden = tuple(sizes[::2]), sizes[1::2]
    about = (channels, depths, stem, downsampling, "cls_token" in weights)
    known = {
        (v.channels, v.depths, v.stem, v.downsampling, v.pruned): v.heads for v in uniformer_config.VARIANTS.values()
    }
    if not heads and about not in known:
        raise RefusedError(
            f"a UniFormer of channels {list(channels)} and depths {list(depths)} is no published variant, and no shape "
            "tells how many heads its third stage has; give them (--heads, heads=)"
        )
    first = weights["patch_embed1.proj.0.weight" if stem == "convolutions" else "patch_embed1.proj.weight"]
    # Patches are as large as their stride; of overlapping convolutions no shape tells it.
    usual = uniformer_config.Architecture.strides
    patches = [weights.get(f"patch_embed{stage}.proj.weight") for stage in stages]
    strides = tuple(own if p is None else p.shape[2] for own, p in zip(usual, patches, strict=True))
    try:
        model = uniformer.Config(
            channels=channels,
            depths=depths,
            heads=(heads, heads * channels[3] // channels[2]) if heads else known[about],
            mlp_ratio=hidden[0] / channels[0],
            stem=stem,
            downsampling=downsampling,
            pruned=about[-1],
            strides=strides,
        ).build(image_size=image_size, channels=first.shape[1], classes=classes)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    load_exactly(model, weights, f"the weights do not fit {model.config}")
    return model


def _sizes(weights: Mapping[str, Tensor], names: list[str]) -> list[int]:
    """The first axis of each.

    Raises:
        RefusedError: some are missing.
    """
    if missing := [name for name in names if name not in weights]:
        raise RefusedError(f"the weights lack {', '.join(missing)}; they seem to be {resembling(weights)}")
    return [weights[name].shape[0] for name in names]


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
