"""A model's training forward and its backward as CUDA graphs: recorded once for each width, launched as one.

PyTorch records them (`torch.cuda.make_graphed_callables`) and gives autograd the backward, so that losses, DeepSpeed's
reduction and the optimizer around them are as ever. What changes from step to step has to be a tensor: images, and the
key and counters that everything random is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hsvit_kernels.random import Draw

from ..grid.grid import Grid
from ..models import timm_models
from ..models.batchnorm import unnoted
from ..models.slimmable import FULL, Width

DEVICES = ("cuda",)


def why_not(module: nn.Module, grid: Grid, zero_stage: int, synced: bool) -> str:
    """Why a model cannot be captured, empty where it can. synced: batch statistics span ranks."""
    if grid.device.type not in DEVICES:
        return f"the model is on {grid.device.type}"
    if zero_stage == 3:
        return "engine.zero_stage = 3 gathers parameters in the forward"
    if synced:
        return "batch statistics are exchanged in the forward (run.bn_batch)"
    if grid.submodule_ranks > 1:
        return f"grid.submodule_ranks = {grid.submodule_ranks} exchange in the forward"
    if timm_models.nets(module):
        return "a model of timm draws from PyTorch's generator"
    return ""


class _Pass(nn.Module):
    """One width's forward as a function of tensors."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], width: Width, low: torch.dtype | None) -> None:
        super().__init__()
        self.module, self.compute, self.width, self.low = module, forward, width, low

    def forward(self, images: Tensor, *draw: Tensor) -> Any:
        # The cache of autocast would keep weights of one step for the next.
        with torch.autocast(images.device.type, self.low, enabled=self.low is not None, cache_enabled=False):
            return self.compute(images, draw=Draw(*draw) if draw else None, width=self.width)


class Captured:
    """Takes the place of a model's forward: replays it in training, and computes it as before elsewhere.

    Args:
        forward: of the module, or a compiled one. low: dtype of autocast, if any.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], low: torch.dtype | None) -> None:
        self.module, self.forward, self.low = module, forward, low
        self.graphs: dict[Any, Callable[..., Any]] = {}
        self._pool: Any = None

    def __call__(self, images: Tensor, draw: Draw | None = None, width: Width = FULL, **more: Any) -> Any:
        if not self.module.training or not torch.is_grad_enabled() or more:
            return self.forward(images, draw=draw, width=width, **more)
        inputs = (images,) if draw is None else (images, draw.key, draw.image)
        key = width, tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs, width)
        return self.graphs[key](*inputs)

    def _capture(self, inputs: tuple[Tensor, ...], width: Width) -> Any:
        one = _Pass(self.module, self.forward, width, self.low)
        static = tuple(x.detach().clone() for x in inputs)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads, as that which pins images, may go on allocating meanwhile.
        threads = patch.object(torch.cuda, "graph", partial(torch.cuda.graph, capture_error_mode="thread_local"))
        with threads, unnoted(self.module), torch.autocast(static[0].device.type, enabled=False):
            # One pool for all: of a width only inputs, outputs and gradients live on while another is replayed.
            return torch.cuda.make_graphed_callables(one, static, allow_unused_input=True, pool=self._pool)


@torch.no_grad()
def own_gradients(module: nn.Module) -> None:
    """Take the gradients so far out of the memory of the graphs, which would write the next ones there: autograd keeps
    what a graph gives it as it is."""
    having = {p: p.grad for p in module.parameters() if p.grad is not None}
    if having:
        for parameter, own in zip(having, torch._foreach_mul(list(having.values()), 1), strict=True):
            parameter.grad = own


def compiled() -> str:
    """What torch.compile has made of the model so far: its graphs, and where they break."""
    from torch._dynamo.utils import counters  # loaded only where one compiles

    breaks = counters["graph_break"]
    told = [f"engine.compile: {counters['stats']['unique_graphs']} graphs, {sum(breaks.values())} breaks"]
    told += [f"{count} x {reason.splitlines()[0][:200]}" for reason, count in breaks.most_common(3)]
    return "; ".join(told)
