"""A model's training forward and its backward as CUDA graphs, recorded once for each width, and the optimizer's step as
another: each is launched as one.

PyTorch records the model (`torch.cuda.make_graphed_callables`) and gives autograd the backward, so that losses and
DeepSpeed's reduction around it are as ever. What changes from step to step has to be a tensor: images, and the
key and counters that everything random is made of, and the learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hsvit_kernels.random import Draw

from ..errors import counted
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


def _recorded() -> Any:
    """PyTorch's recording, while other threads, as that which pins images, go on allocating."""
    return partial(torch.cuda.graph, capture_error_mode="thread_local")


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
        threads = patch.object(torch.cuda, "graph", _recorded())
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


class CapturedUpdate:
    """Takes the place of an `Update`: replays it where the last step found its tensors in the same memory."""

    def __init__(self, update: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.update, self.optimizer = update, optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: list[int] = []
        self._norm = torch.empty(0)
        self._gradients: list[Tensor] = []
        self._rates: list[Tensor] = []

    def __call__(self) -> Tensor:
        if self._places() != self._memory:  # the first step makes the moments, a checkpoint brings others
            self._graph, norm = None, self.update()
            self._memory = self._places()
            return norm
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        pairs = zip(self._gradients, self._read(), strict=True)
        moved = [(old, new) for old, new in pairs if old.data_ptr() != new.data_ptr()]  # as accumulated ones are
        if moved:
            torch._foreach_copy_([old for old, _ in moved], [new for _, new in moved])
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        return self._norm.clone()

    def _having(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _read(self) -> list[Tensor]:
        return [p.grad for p in self._having() if p.grad is not None]

    def _places(self) -> list[int]:
        """Where the parameters that have a gradient lie, and their moments."""
        return [t.data_ptr() for p in self._having() for t in (p, *self.optimizer.state[p].values())]

    def _capture(self) -> None:
        groups = self.optimizer.param_groups
        self._gradients = self._read()
        self._rates = [torch.full((), group["lr"], device=self._gradients[0].device) for group in groups]
        self._graph = torch.cuda.CUDAGraph()
        eager = [dict(group) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            with _recorded()(self._graph):
                self._norm = self.update()
        finally:
            for group, before in zip(groups, eager, strict=True):
                group.clear()
                group.update(before)


def compiled() -> str:
    """What torch.compile has made of the model so far: its graphs, and where they break."""
    from torch._dynamo.utils import counters  # loaded only where one compiles

    breaks = counters["graph_break"]
    told = [
        f"engine.compile: {counted(counters['stats']['unique_graphs'], 'graph')}, {counted(breaks.total(), 'break')}"
    ]
    told += [f"{count} x {reason.splitlines()[0][:200]}" for reason, count in breaks.most_common(3)]
    return "; ".join(told)
