"""What a recipe says of the weights that a model starts from; weights of other programs: read without running code, and
loaded exactly or refused."""

from __future__ import annotations

import re
import shlex
import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RefusedError, first_line, warn

_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "weights")
"""Where training programs keep a model's tensors, the first one that is there."""
_MARKS = {
    "a model file of this project (hsvit_ds.load_model)": ("submodules.",),
    "a DeiT or ViT": ("patch_embed.proj.", "blocks.0."),
    "the published HSViT's": ("model.conv2d_layers.",),
    "a ResNet": ("conv1.", "layer1.0.", "fc."),
    "a Swin Transformer": ("patch_embed.", "layers.0."),
    "a ConvNeXt": ("stem.", "stages.0."),
    "a UniFormer": ("patch_embed1.", "blocks1.0."),
    "a MobileNet or EfficientNet": ("conv_stem.", "blocks.0."),
    "a transformer of Hugging Face's transformers": ("vit.",),
    "an optimizer's state": ("state", "param_groups"),
}
COUNT = ".num_batches_tracked"
_POINTER = b"version https://git-lfs"
_NUMBERS = (np._core.multiarray.scalar, np.dtype, *{type(np.dtype(kind)) for kind in "fdilq?"})  # type: ignore[attr-defined]
"""What NumPy's numbers, as a metric beside the weights, are unpickled by: values."""
_KEEP_TENSORS = (
    "import sys, torch; f = torch.load(sys.argv[1], weights_only=False); "
    'f = getattr(f, "state_dict", lambda: f)(); torch.save(f.get("model", f.get("state_dict", f)), sys.argv[2])'
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Of a model of this project. It is built with random weights, which a run replaces (`engine.initial`)."""

    kind: str
    weights: str = ""
    """What training starts from: a file (.safetensors, .pth) of a timm, DeiT or UniFormer model, of `hsvit import` or
    of `hsvit export`, the folder of an export, or of a run (its latest checkpoint); empty for random ones. What it
    lacks, and a classifier of another number of classes, starts anew; what has no place here is left out; both are
    said. Not read again on --resume."""


@dataclass(frozen=True, kw_only=True)
class SizedStart(Start):
    """Of a model with weights that depend on the images' size."""

    resize: bool = False
    """Resize the weights that depend on the images' size, which are refused otherwise: a ViT's position embeddings, an
    HSViT's projection of maps."""


def read_foreign(path: Path, *, trust: bool = False, way_out: str = "") -> Mapping[str, Any]:
    """Read another program's weights without running code that the file may carry.

    Args:
        trust: unpickle it, which runs its code. way_out: for somebody who knows where a refused file is from; by
            default the command that keeps its tensors alone.

    Raises:
        RefusedError: no such file, none of weights, or one that would run code.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise RefusedError(f"{path}: a pointer of Git LFS, not the weights; fetch them with git lfs pull")
        if path.suffix == ".safetensors":
            return load_file(path)
        if trust:
            warn(f"{path}: unpickled by --trust, with any code in it")
        # Namespace: the arguments in DeiT's checkpoints, which are values. Warnings: of what is refused anyway.
        with torch.serialization.safe_globals([Namespace, *_NUMBERS]), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=not trust)
    except RefusedError:
        raise
    except FileNotFoundError as error:
        raise RefusedError(f"{path}: no such file") from error
    except Exception as error:  # damaged and hostile files raise nearly anything
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            clean = path.with_name(f"{path.stem}-tensors.pth")
            command = shlex.join(["python", "-c", _KEEP_TENSORS, str(path), str(clean)])
            raise RefusedError(
                f"{path}: is not unpickled, as it calls {called[1]} and could run any code here; if you trust whoever "
                f"made it, {way_out or f'keep its tensors alone ({command}) and take {clean}'}"
            ) from error
        reason = first_line(error).partition(" In PyTorch")[0]  # which goes on to recommend weights_only=False
        raise RefusedError(f"{path}: not a readable weights file ({reason})") from error
    if not isinstance(loaded, Mapping):
        raise RefusedError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor], message: str) -> None:
    """Load weights whose keys and shapes are the model's; else refuse them with `message` and every key that is not."""
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in weights]
    wrong += [f"{key} is left over" for key in weights if key not in own]
    wrong += [
        f"{key} has shape {tuple(weights[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        raise RefusedError(f"{message}: {'; '.join(wrong)}")
    model.load_state_dict(weights)


def with_own_classifier(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: Collection[str]
) -> dict[str, Tensor]:
    """Weights whose classifiers are a model's own where they are for another number of classes."""
    keys = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    others = [key for key in keys if key in found and key in own and len(found[key]) != len(own[key])]
    return {**found, **{key: own[key] for key in others}}


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a training program's checkpoint, in fp32: wherever it nests them, without the names of wrappers
    (DDP's "module.", torch.compile's "_orig_mod.", in any order), and without the counts of batches that PyTorch's
    BatchNorm keeps and nothing here uses.

    Raises:
        RefusedError: no tensors there, or several sets of them.
    """
    weights = _nested(state_dict)
    return {
        re.sub(r"(^|\.)_orig_mod\.", r"\1", re.sub(r"^((module|_orig_mod)\.)+", "", key)): (
            value.float() if value.is_floating_point() else value
        )
        for key, value in weights.items()
        if not key.endswith(COUNT)
    }


def _nested(found: Mapping[str, Any]) -> Mapping[str, Tensor]:
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    inside = {key: value for key, value in found.items() if isinstance(value, Mapping) and _has_tensors(value)}
    if tensors and not inside:
        return tensors
    name = next((name for name in _NESTS if name in inside), None)
    if name is None and len(inside) == 1:
        (name,) = inside
    if name is None:
        keys = ", ".join(map(str, inside)) or ", ".join(map(str, list(found)[:8])) or "nothing"
        raise RefusedError(f"a checkpoint without weights under {', '.join(_NESTS)}; it has: {keys}")
    return _nested(inside[name])


def _has_tensors(found: Mapping[str, Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _has_tensors(v)) for v in found.values())


def resembling(keys: Collection[str]) -> str:
    """What weights seem to be, by their names."""
    for kind, marks in _MARKS.items():
        if all(any(key.startswith(mark) for key in keys) for mark in marks):
            return kind
    return "of no network that is known here"
