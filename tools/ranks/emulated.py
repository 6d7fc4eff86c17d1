"""One rank of a case that sleeps for as long as its passes take, and really sends what they send."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hsvit_ds.grid.grid import Config, Grid
from hsvit_ds.run.links import Passes
from hsvit_ds.run.prediction import Compute, Phase, Shape, schedule

from .methods import batch
from .pipeline import Stage


def sleep(seconds: float) -> None:
    """To the end, however late the system wakes up."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(left)


def scheduled(shape: Shape, passes: Passes) -> Callable[[], Any]:
    """A step of `prediction.schedule`."""
    grid = Grid(Config(submodule_ranks=shape.submodule_ranks), submodules=shape.submodule_ranks)
    groups = {"replica": grid.replica_group, "replicas": grid.data_group}
    acts = [_act(phase, shape, groups) for phase in schedule(shape, passes)]
    return lambda: [act() for act in acts]


def _act(phase: Phase, shape: Shape, groups: dict[str, Any]) -> Callable[[], None]:
    if isinstance(phase, Compute):
        return lambda: sleep(phase.seconds)
    ranks, group = shape.group(phase.over), groups[phase.over]
    numbers = phase.size // 4
    if phase.kind != "all_reduce":  # equal parts of the ranks
        numbers //= ranks
    messages = [torch.zeros(len(part)) for part in torch.empty(numbers, device="meta").tensor_split(phase.count)]
    wholes = [torch.zeros(ranks * len(message)) for message in messages]

    def sends() -> None:
        works = []
        for message, whole in zip(messages, wholes, strict=True):
            if phase.kind == "all_reduce":
                dist.all_reduce(message, group=group)
            elif phase.kind == "all_gather":
                works.append(dist.all_gather_into_tensor(whole, message, group=group, async_op=True))
            else:
                dist.reduce_scatter_tensor(message, whole, group=group)
        for work in works:
            work.wait()

    return sends


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], seconds: tuple[float, float]) -> Tensor:
        ctx.shape, ctx.seconds = x.shape, seconds
        sleep(seconds[0])
        return torch.zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sleep(ctx.seconds[1])
        return torch.zeros(ctx.shape), None, None


class Sleeping(nn.Module):
    """A stage that makes zeros of a shape in as many (forward, backward) seconds."""

    def __init__(self, shape: Sequence[int], seconds: tuple[float, float]) -> None:
        super().__init__()
        self.shape, self.seconds = shape, seconds

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Sleep.apply(x, self.shape, self.seconds)
        return made


def piped(
    stages: Sequence[tuple[float, float, float]], shapes: Sequence[Sequence[int]], images: int, micro_batches: int
) -> Callable[[], Any]:
    """A step of `pipeline.simulated`. shapes: of what comes into each stage, and out of the last."""
    grid = Grid(Config(), submodules=1)
    forward, backward, update = stages[grid.rank]
    net = Sleeping(shapes[grid.rank + 1], (forward, backward))
    stage = Stage([net], grid.rank, grid.size, shapes[grid.rank])
    inputs, labels = (whole.chunk(micro_batches) for whole in batch(images))
    for x in inputs:
        x.requires_grad_()

    def step() -> None:
        stage.step(inputs, labels)
        sleep(update)

    return step
