"""BatchNorm whose statistics depend on the global batch only, never on ranks, replicas or accumulation.

`nn.SyncBatchNorm` refuses CPU tensors and cannot take statistics over fixed runs of samples; DeepSpeed synchronises
nothing. Running statistics move once a step (`move_running_statistics`), with the mean over the step's runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Channel


@dataclass(frozen=True)
class Statistics:
    """How a pass takes batch statistics: over `runs` equal, consecutive parts of the micro batch, or, where `channel`
    is given, over the micro batches of all its ranks together (then `runs` is 1)."""

    runs: int = 1
    channel: Channel | None = None


class BatchNorm2d(nn.Module):
    """Batch normalisation of [B, C, H, W] (Ioffe and Szegedy, 2015), eps 1e-5, momentum 0.1 as in PyTorch."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.statistics = Statistics()
        self.pending: list[Tensor] = []  # [2, C] mean and unbiased variance of each run of this step

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.statistics.channel is not None:
            return self._normalise_together(x)
        runs = [self._normalise(run) for run in x.chunk(self.statistics.runs)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    @torch.compiler.disable  # as Grid.exchange
    def _normalise_together(self, x: Tensor) -> Tensor:
        y, mean, var = _SyncedNorm.apply(x, self.weight, self.bias, self.eps, self.statistics.channel)
        self.pending.append(torch.stack((mean, var)))
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        # Momentum 1 makes PyTorch write this run's own mean and unbiased variance into fresh buffers.
        moments = self.running_mean.new_zeros(2, x.shape[1])
        y = F.batch_norm(x, moments[0], moments[1], self.weight, self.bias, True, 1.0, self.eps)
        self.pending.append(moments)
        return y


class _SyncedNorm(torch.autograd.Function):
    """Normalise with the statistics of all ranks of a group; equal counts on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, channel: Channel) -> Any:
        var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        means, variances = channel.all_gather(torch.stack((mean, var))).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        count = x.numel() // x.shape[1] * channel.size
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.channel, ctx.count = channel, count
        unbiased = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        grad32 = grad.float()
        normed = (x.float() - mean.view(shape)) * invstd.view(shape)
        grad_bias = grad32.sum((0, 2, 3))
        grad_weight = (grad32 * normed).sum((0, 2, 3))
        sums = ctx.channel.all_reduce(torch.stack((grad_bias, grad_weight)))
        mean_bias, mean_weight = (sums / ctx.count).unbind(0)
        grad_x = (grad32 - mean_bias.view(shape) - normed * mean_weight.view(shape)) * (weight * invstd).view(shape)
        return grad_x.to(grad.dtype), grad_weight, grad_bias, None, None


def set_statistics(model: nn.Module, statistics: Statistics) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.statistics = statistics


@torch.no_grad()
def move_running_statistics(model: nn.Module, applied: bool, channel: Channel | None) -> None:
    """End a step: move every running statistic once, by the mean over the step's runs, or forget a skipped step's.

    channel: the ranks whose runs differ, None where every rank saw all of them. One all-reduce for the whole model.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNorm2d) and m.pending]
    if layers and applied:
        flat = torch.cat([torch.stack(layer.pending).mean(0) for layer in layers], dim=1)
        if channel is not None:
            flat = channel.all_reduce(flat) / channel.size
        moments = flat.split([len(layer.running_mean) for layer in layers], dim=1)
        for layer, (mean, var) in zip(layers, moments, strict=True):
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(var, layer.momentum)
    for layer in layers:
        layer.pending.clear()
