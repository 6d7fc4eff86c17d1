"""The weights that a run starts from (`model.weights`): of a file, an export or another run, taken over by name into
what a rank holds of the model. All families of widths have the same, those of the full width.

Shape letters: n patches, d embedding, M submodules, D embedding and f pixels of HSViT's last map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import models
from ..data.layouts import is_url
from ..data.sets import Facts
from ..errors import RefusedError, counted
from ..grid.grid import Grid
from ..models import Own, timm_models
from ..models.hsvit import HSViT
from ..models.vit import ViT
from ..models.weights import read_foreign, resembling, unwrapped
from .checkpoint_files import chosen, pointed, read_manifest, read_weights
from .interop import MODEL

Named = dict[str, Tensor]
Shape = tuple[int, ...]

NAMED = 3
"""Tensors that a line names of many."""
CLASSIFIERS = ("head", "head_dist", "head.linear", "head_cls", "classifier")
"""Of a ViT, an HSViT, a UniFormer and a MobileNet."""
FREE = {"kind", "variant", "weights", "resize", "widths", "dropout", "drop_path", "submodule_drop", "backbone"}
"""Keys that may differ without a word: no tensor depends on them, or its shape says so."""


@dataclass(frozen=True)
class Found:
    """Tensors by name, buffers included."""

    whence: str
    """Where they are from, in words."""
    tensors: Named
    config: Mapping[str, Any]
    """Of the model that they are of, as far as that is known."""

    @property
    def key(self) -> str:
        return f"model.weights = {self.whence}"


def build(
    config: models.Config, facts: Facts, grid: Grid, *, exchange: str, seed: int, resumed: Path | None
) -> tuple[models.Model, list[str]]:
    """What this rank holds of a run's model, with the weights that it starts from, and what there is to say of them.
    Collective.

    Args:
        resumed: the folder of checkpoints that the run goes on from; where it has one, no weights are read.

    Raises:
        RefusedError: weights that cannot be read or do not fit; on every rank.
    """
    model: models.Model = config.build(
        image_size=facts.image_size,
        channels=facts.channels,
        classes=facts.classes,
        here=grid.submodules,
        grid=grid,
        exchange=exchange,
        seed=seed,
    )
    if isinstance(model, timm_models.Classifier) or not config.weights:
        return model, []
    if resumed is not None and grid.agree(lambda: pointed(resumed, "latest")) is not None:
        return model, []
    return model, grid.together(lambda: start(model, read(config.weights)))


def read(weights: str) -> Found:
    """What a file, the folder of an export or that of a run holds.

    Raises:
        RefusedError: none of these, a run without a checkpoint, or weights that need `hsvit import`.
    """
    key, path = f"model.weights = {weights}", Path(weights)
    if is_url(weights):
        raise RefusedError(f"{key}: no weights are downloaded for a run; download the file and name it")
    try:
        if (path / "checkpoints").is_dir():
            return _of_run(path, weights)
        if path.is_dir() and not (path / MODEL).exists():
            raise RefusedError(f"{path}: neither a run (checkpoints is missing) nor an export ({MODEL} is missing)")
        return _of_file(path / MODEL if path.is_dir() else path, weights)
    except RefusedError as error:
        raise RefusedError(f"model.weights = {error}") from error


def _of_run(path: Path, whence: str) -> Found:
    place = chosen(path, "latest")
    manifest = read_manifest(place)
    if absent := manifest["recipe"]["grid"]["absent"]:
        raise RefusedError(
            f"{whence}: last saved without its submodules {list(absent)} (grid.absent), which do not fit the others "
            "any more; resume it whole first"
        )
    tensors = {name.removeprefix("net."): tensor for name, tensor in read_weights(place, manifest, False).items()}
    return Found(f"{whence}, step {manifest['position']['total']:,}", tensors, manifest["recipe"]["model"])


def _of_file(file: Path, whence: str) -> Found:
    tensors = unwrapped(read_foreign(file))
    if any("conv2d_layers." in key for key in tensors):
        raise RefusedError(
            f"{file}: weights of the published HSViT code; first "
            f"`hsvit import {file} -o model.safetensors --image-size … --pool-strides …`, then name model.safetensors"
        )
    config: Mapping[str, Any] = {}
    if (patches := tensors.get("patch_embed.proj.weight")) is not None and patches.dim() == 4:
        config = {"embedding": patches.shape[0], "patch_size": patches.shape[2]}
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            about = (opened.metadata() or {}).get("hsvit")
        try:
            config = config if about is None else json.loads(about)["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f'{file}: damaged ("hsvit" in its metadata does not tell the model)') from error
    return Found(whence, tensors, config)


def start(model: Own, found: Found) -> list[str]:
    """Give a model, or a rank's share of it, the tensors that are found; what there is to say of them.

    Raises:
        RefusedError: they are of another kind of model, or of other shapes.
    """
    own = _whole_shapes(model)
    taken = {name: found.tensors[name] for name in own if name in found.tensors}
    _check_kind(model, found, len(taken), len(own))
    classifiers = [n for n in taken if n.rpartition(".")[0] in CLASSIFIERS and taken[n].shape[:1] != (model.classes,)]
    classes = {taken.pop(name).shape[:1].numel() for name in classifiers}
    new, is_new = [name for name in own if name not in found.tensors], False
    if isinstance(model, ViT) and "pos_embed" in taken:
        taken["pos_embed"], is_new = _for_tokens(model, taken["pos_embed"], found.tensors)
    resized = _fit(model, found, taken, own)
    model.load_state_dict({name: _share(model, name, tensor) for name, tensor in taken.items()}, strict=False)
    said = [f"weights: {len(taken)} of {counted(len(own), 'tensor')} from {found.whence}"]
    if new:
        said.append(f"new: {_some(new)}" + (" and the position of dist_token" if is_new else ""))
    if classifiers:
        there = ", ".join(f"{number:,}" for number in sorted(classes))
        said.append(f"new for {counted(model.classes, 'class', 'classes')}, there {there}: {_some(classifiers)}")
    if left := [name for name in found.tensors if name not in own]:
        said.append(f"left out: {_some(left)}")
    differs = _differs(model, found)
    return ["; ".join(said + resized), *([f"weights: their model has {differs}"] if differs else [])]


def _check_kind(model: Own, found: Found, taken: int, count: int) -> None:
    """Refuse tensors that are not half of the model's by name, or that other heads share."""
    c = model.config
    if 2 * taken < count:
        kind = found.config.get("kind")
        known = f'of kind "{kind}"' if kind and kind != c.kind else resembling(found.tensors)
        depth = f"depth = {c.depth}" if isinstance(model, ViT | HSViT) else f"depths = {list(c.depths)}"
        raise RefusedError(
            f'{found.key}: {taken} of {counted(count, "tensor")} of this model (kind = "{c.kind}", {depth}) are there; '
            f"they seem to be {known}"
        )
    ours, size = json.loads(json.dumps(asdict(c))), "embedding" if isinstance(model, ViT | HSViT) else "channels"
    is_as_wide = found.config.get(size, ours[size]) == ours[size]
    if "heads" in ours and (heads := found.config.get("heads", ours["heads"])) != ours["heads"] and is_as_wide:
        raise RefusedError(
            f"{found.key}: of a model with heads = {heads}, without which the weights mean something else, although no "
            f"shape tells; set model.heads = {heads} (here {ours['heads']})"
        )


def _fit(model: Own, found: Found, taken: Named, own: Mapping[str, Shape]) -> list[str]:
    """Resize what may be, in place; what was, in words.

    Raises:
        RefusedError: what is left has other shapes than the model's.
    """
    resized, wrong, only_sizes = list[str](), list[str](), True
    for name, tensor in taken.items():
        if tuple(tensor.shape) == own[name]:
            continue
        sides = _sides(model, name, tensor, own[name])
        change = "" if sides is None else f"{sides[0]} x {sides[0]} to {sides[1]} x {sides[1]}"
        if sides is not None and getattr(model.config, "resize", False):
            taken[name] = _resize(name, tensor, sides)
            resized.append(f"resized: {name}, {change}")
            continue
        only_sizes &= sides is not None
        wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {own[name]}" + (f" ({change})" if change else ""))
    if wrong:
        differs = _differs(model, found)
        remedy = (
            f"their model has {differs}" if differs else "set data.image_size and the model's keys as they were there"
        )
        if only_sizes:
            remedy += ", or model.resize = true to resize it"
        more = f"; and {counted(len(wrong) - NAMED, 'other')}" if len(wrong) > NAMED else ""
        raise RefusedError(f"{found.key} does not fit: {'; '.join(wrong[:NAMED])}{more}; {remedy}")
    return resized


def _differs(model: Own, found: Found) -> str:
    """Keys that made the other model another one, in words; "" where there are none, or that is not known."""
    ours = json.loads(json.dumps(asdict(model.config)))
    keys = [key for key, value in found.config.items() if key not in FREE and value != ours.get(key, value)]
    return ", ".join(f"{key} = {json.dumps(found.config[key])} (here {json.dumps(ours[key])})" for key in keys)


def _for_tokens(model: ViT, positions: Tensor, there: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """Position embeddings [1, tokens, d] with or without the distillation token's, as the model needs them; whether
    that is the model's own."""
    is_there, is_here = "dist_token" in there, model.config.distilled
    if is_there == is_here or positions.dim() != 3 or positions.shape[-1] != model.config.embedding:
        return positions, False
    cls, rest = positions[:, :1], positions[:, 2 if is_there else 1 :]
    if not is_here:
        return torch.cat((cls, rest), 1), False
    return torch.cat((cls, model.pos_embed.detach()[:, 1:2], rest), 1), True


def _sides(model: Own, name: str, tensor: Tensor, shape: Shape) -> tuple[int, int] | None:
    """How many patches, or pixels of the last map, a side has that a tensor is for, and here; None where the tensor
    is for no size, or differs in more than that."""
    if isinstance(model, ViT):
        axis, special, sized = 1, model.config.special_tokens, name == "pos_embed"
    elif not isinstance(model, HSViT):
        return None
    else:
        axis, special, sized = 2, 0, name == "submodules.projection_weight" and not model.config.backbone.name
    if (
        not sized
        or tensor.dim() != len(shape)
        or any(a != b for i, (a, b) in enumerate(zip(tensor.shape, shape, strict=True)) if i != axis)
    ):
        return None
    before, now = (isqrt(max(size[axis] - special, 0)) for size in (tensor.shape, shape))
    return (before, now) if before and before**2 == tensor.shape[axis] - special else None


def _resize(name: str, tensor: Tensor, sides: tuple[int, int]) -> Tensor:
    """Position embeddings [1, special tokens + n, d] by bicubic interpolation, as timm and DeiT do; or projections
    [M, D, f], so that they answer to a resized map as before to the map itself (FlexiViT, arXiv 2212.08013)."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed  # here, as it takes 6 s

    before, now = sides
    if name == "pos_embed":
        special = tensor.shape[1] - before**2
        return resample_abs_pos_embed(tensor, [now, now], num_prefix_tokens=special)
    kernels = tensor.flatten(0, 1).unflatten(-1, (1, before, before))
    found: Tensor = resample_patch_embed(kernels, [now, now])
    return found.flatten(1).view(*tensor.shape[:2], now**2)


def _whole_shapes(model: Own) -> dict[str, Shape]:
    """Shapes of the whole model's tensors, of which a rank may hold some submodules."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(model, HSViT):
        here, m = len(model.submodules.here), model.config.submodules
        shapes |= {n: (s[0] // here * m, *s[1:]) for n, s in shapes.items() if n.startswith("submodules.")}
    return shapes


def _share(model: Own, name: str, tensor: Tensor) -> Tensor:
    """What this rank holds of a whole tensor: its submodules, which are stacked on the first axis."""
    if not isinstance(model, HSViT) or not name.startswith("submodules."):
        return tensor
    here = model.submodules.here
    return tensor.unflatten(0, (model.config.submodules, -1))[here.start : here.stop].flatten(0, 1)


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > NAMED else ""
    return f"{counted(len(names), 'tensor')} ({', '.join(names[:NAMED])}{more})"
