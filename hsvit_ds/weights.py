"""Weights of other programs: read without running code, and loaded exactly or refused."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import RefusedError


def read_foreign(path: Path) -> Mapping[str, Any]:
    """Read another program's weights without running code that the file may carry."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RefusedError(f"{path}: no such file") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise RefusedError(f"{path}: not a readable weights file ({error})") from error
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"{path}: holds more than tensors and is not unpickled, as that could run its code; "
            "save its state_dict alone with torch.save"
        ) from error
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
