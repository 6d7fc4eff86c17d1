"""Weights of other programs: read without running code, and loaded exactly or refused."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RefusedError, first_line

_KEEP_TENSORS = (
    "import sys, torch; f = torch.load(sys.argv[1], weights_only=False); "
    'f = getattr(f, "state_dict", lambda: f)(); torch.save(f.get("model", f.get("state_dict", f)), sys.argv[2])'
)


def read_foreign(path: Path, *, trust: bool = False, way_out: str = "") -> Mapping[str, Any]:
    """Read another program's weights without running code that the file may carry.

    Args:
        trust: unpickle it, which runs its code. way_out: for somebody who knows where a refused file is from; by
            default the command that keeps its tensors alone.

    Raises:
        RefusedError: no such file, none of weights, or one that would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if trust:
            print(f"hsvit: warning: {path}: unpickled by --trust, with any code in it", file=sys.stderr, flush=True)
        # Namespace: the arguments in DeiT's checkpoints, which are values. Warnings: of what is refused anyway.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=not trust)
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


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint of DeiT's or timm's training code, which nest them and may name a wrapper."""
    weights = state_dict.get("model", state_dict.get("state_dict", state_dict))
    return {key.removeprefix("module."): value for key, value in weights.items()}
