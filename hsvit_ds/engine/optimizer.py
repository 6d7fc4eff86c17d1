"""The optimizer, which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import counted
from ..grid.grid import Grid
from ..models import timm_models


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "adamw"
    """"adamw" or "sgd", PyTorch's fused ones."""
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
    nesterov: bool = False
    """Nesterov's momentum, of SGD."""
    layer_decay: float = 1.0
    """Of timm's layers (BEiT, arXiv 2106.08254): each has this times the learning rate of the layer after it."""
    schedule: str = "step"
    """After the warm-up, half a cosine that moves every "step" or every "epoch"; or "linear": a line that moves every
    step, as US-Net's."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, in epochs; the schedule follows it and ends with the run."""
    clip: float = 0.0
    """Largest global gradient norm; 0 switches clipping off. The published recipe uses 0.01."""

    def __post_init__(self) -> None:
        choices = {
            "name": ("adamw", "sgd"),
            "decay": ("matrices", "all"),
            "schedule": ("step", "epoch", "linear"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f'{key} = "{getattr(self, key)}": must be one of {allowed}')
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay = {self.layer_decay}: must be above 0 and at most 1")
        if self.nesterov and not (self.name == "sgd" and self.momentum):
            raise ValueError(
                'nesterov = true is a kind of momentum: set name = "sgd" and momentum above 0, or leave it'
            )
        for key in ("lr", "min_lr", "weight_decay", "eps", "momentum", "warmup_epochs", "clip"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} = {getattr(self, key)}: must not be negative")


_UNDECAYED = re.compile(r"(^|[._])(bias|cls|positions|cls_token|dist_token|pos_embed)$|norm\d*[._]weight$")


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices and convolutions decay; biases, norms, CLS, positions and other vectors do not."""
    return parameter.dim() > 1 and _UNDECAYED.search(name) is None


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """The trained parameters by weight decay and, with `layer_decay`, by layer; with their names for the checkpoint and
    the start-up line, and `lr_scale`, which the engine multiplies the learning rate with.

    Raises:
        ValueError: layer_decay for a model without timm's layers.
    """
    exempt = {
        f"{path}.{name}".removeprefix(".")
        for path, net in timm_models.nets(model)
        for name in (net.no_weight_decay() if hasattr(net, "no_weight_decay") else ())
    }  # matrices that are like biases
    numbers = _layer_numbers(model) if config.layer_decay < 1 else {}
    last = max(numbers.values(), default=0)
    groups: dict[tuple[bool, int], dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = config.decay == "all" or (decays(name, parameter) and name not in exempt)
            groups.setdefault((decayed, last - numbers.get(name, 0)), {})[name] = parameter
    return [
        {
            "params": list(named.values()),
            "names": list(named),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr_scale": config.layer_decay**layers_after,
        }
        for (decayed, layers_after), named in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def _layer_numbers(model: nn.Module) -> dict[str, int]:
    """{parameter: its layer in timm's network, from the images on}; what is not timm's comes after it."""
    numbers = {
        f"{path}.{name}".removeprefix("."): number
        for path, net in timm_models.nets(model)
        for name, number in timm_models.layer_numbers(net, stages=False).items()
    }
    if not numbers:
        raise ValueError(
            'layer_decay needs a model of timm or a UniFormer: model.backbone.name, or model.kind = "timm", "uniformer"'
        )
    after = max(numbers.values()) + 1
    return {name: numbers.get(name, after) for name, _ in model.named_parameters()}


def describe(groups: Sequence[dict], grid: Grid) -> str:
    """One line on what decays in the whole model, printed at start: people reproduce papers by it. Collective."""
    parts = []
    for decay in sorted({group["weight_decay"] for group in groups}, reverse=True):
        tensors = [p for group in groups if group["weight_decay"] == decay for p in group["params"]]
        own, shared = (
            sum(getattr(p, "ds_numel", p.numel()) for p in tensors if getattr(p, "model_parallel", False) == is_own)
            for is_own in (True, False)
        )
        # The ranks of a replica have the same tensors, each with its own submodules' numbers.
        if grid.submodule_ranks > 1:
            own = int(grid.sum_over_submodule_ranks(torch.tensor([own], device=grid.device)))
        numbers = counted(own + shared, "number")
        parts.append(f"weight decay {decay:g} on {counted(len(tensors), 'tensor')} ({numbers})")
    least = min(group["lr_scale"] for group in groups)
    if least < 1:
        parts.append(f"learning rate x {least:.3g} at the first trained layer")
    return ", ".join(parts)


def build(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    # DeepSpeed's own optimizers would compile an extension at start-up.
    params = [{k: v for k, v in group.items() if k != "names"} for group in groups]  # torch keeps lr_scale
    if config.name == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step alone, so that a resumed run needs nothing stored."""

    config: Config
    epochs: int
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up from 0, then half a cosine or a line to min_lr at the
        end."""
        c, by_epoch = self.config, self.config.schedule == "epoch"
        unit = 1 if by_epoch else self.steps_per_epoch
        now = step // self.steps_per_epoch if by_epoch else step
        warmup = round(c.warmup_epochs * unit)
        if now < warmup:
            return c.lr * (now + 1) / warmup
        progress = (now - warmup) / max(self.epochs * unit - warmup, 1)
        left = 1 - progress if c.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return c.min_lr + (c.lr - c.min_lr) * left
