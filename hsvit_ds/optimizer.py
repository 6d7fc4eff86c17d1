"""The optimizer, which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "adamw"
    """"adamw" (fused) or "sgd"."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW), or L2 (SGD)."""
    decay: str = "matrices"
    """"matrices": biases, norms, CLS and positions do not decay; "all": everything does, as in the published code."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    momentum: float = 0.9
    """SGD's."""
    schedule: str = "step"
    """The cosine moves every "step" or every "epoch"."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, in epochs; the cosine follows it and ends with the run."""
    clip: float = 0.0
    """Largest global gradient norm; 0 switches clipping off. The published recipe uses 0.01."""

    def __post_init__(self) -> None:
        choices = {
            "name": ("adamw", "sgd"),
            "decay": ("matrices", "all"),
            "schedule": ("step", "epoch"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f'{key} = "{getattr(self, key)}": must be one of {allowed}')
        for key in ("lr", "min_lr", "weight_decay", "eps", "momentum", "warmup_epochs", "clip"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} = {getattr(self, key)}: must not be negative")


_UNDECAYED = re.compile(r"(^|[._])(bias|cls|positions|cls_token|dist_token|pos_embed)$|norm\d*[._]weight$")


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices and convolutions decay; biases, norms, CLS, positions and other vectors do not."""
    return parameter.dim() > 1 and _UNDECAYED.search(name) is None


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """The trained parameters in one or two groups, with their names for the checkpoint and the start-up line."""
    groups: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[config.decay == "all" or decays(name, parameter)][name] = parameter
    return [
        {
            "params": list(named.values()),
            "names": list(named),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for decayed, named in groups.items()
        if named
    ]


def describe(groups: Sequence[dict]) -> str:
    """One line on what decays, printed at start: people reproduce papers by it."""
    parts = []
    for group in groups:
        numbers = sum(p.numel() for p in group["params"])
        parts.append(f"weight decay {group['weight_decay']:g} on {len(group['params'])} tensors ({numbers:,} numbers)")
    return ", ".join(parts)


def build(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    # DeepSpeed's own optimizers would compile an extension at start-up.
    params = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step alone, so that a resumed run needs nothing stored."""

    config: Config
    epochs: int
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up from 0, then half a cosine to min_lr at the end."""
        c, by_epoch = self.config, self.config.schedule == "epoch"
        unit = 1 if by_epoch else self.steps_per_epoch
        now = step // self.steps_per_epoch if by_epoch else step
        warmup = round(c.warmup_epochs * unit)
        if now < warmup:
            return c.lr * (now + 1) / warmup
        progress = (now - warmup) / max(self.epochs * unit - warmup, 1)
        return c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
