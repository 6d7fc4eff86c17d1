"""BatchNorm whose statistics depend on the global batch only, never on ranks, replicas or accumulation.

`nn.SyncBatchNorm` refuses CPU tensors and cannot take statistics over fixed runs of samples; DeepSpeed synchronises
nothing. Running statistics move once a step (`move_running_statistics`), with the mean over the step's runs; in a
plain loop, which ends no steps, in every forward, as PyTorch's do. They are those of full width; a subnet's are taken
anew for evaluation (`recalibrate`), since no width is trained at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid.eager import eager
from ..grid.exchange import Channel
from .slimmable import FULL, Rounding, Width


@dataclass(frozen=True)
class Statistics:
    """How a pass takes batch statistics: over `runs` equal, consecutive parts of the micro batch, or, where `channel`
    is given, over the micro batches of all its ranks together (then `runs` is 1)."""

    runs: int = 1
    channel: Channel | None = None


class BatchNorm(nn.Module):
    """Batch normalisation of [B, C, ...] (Ioffe and Szegedy, 2015), eps 1e-5, momentum 0.1 as in PyTorch.

    Args:
        segments: equal parts of the channels that a width slices one by one. rounding: where a width need not divide
            them. sliced: whether a width slices them at all; statistics are its own in any case.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        segments: int = 1,
        rounding: Rounding | None = None,
        sliced: bool = True,
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.segments, self.rounding, self.sliced = segments, rounding, sliced
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.statistics: Statistics | None = None
        """As an engine sets them (`set_statistics`); None: a plain loop's, of every forward by itself."""
        # [3, C]: means and unbiased variances of this step's runs, added up, and their number. Tensors that stay: of
        # a list, compiled forwards would be made anew for every length.
        self.noted: dict[Width, Tensor] = {}
        self.recalibrated: dict[Width, Tensor] = {}  # [2, C at this width], until the next step

    def slices(self, width: Width) -> dict[str, Tensor]:
        """The parameters and statistics of the standalone layer at `width`.

        Raises:
            ValueError: the width's statistics have not been taken.
        """
        if width.is_full:
            mean, var = self.running_mean, self.running_var
        elif width in self.recalibrated:
            mean, var = self.recalibrated[width]
        else:
            raise ValueError(f"BatchNorm has no statistics for width {width}: call recalibrate(model, [width]) first")
        return {**self._affine(width), "running_mean": mean, "running_var": var}

    def _affine(self, width: Width) -> dict[str, Tensor]:
        own = dict(self.named_parameters())
        return {n: width.take(p, 0, self.segments, self.rounding) if self.sliced else p for n, p in own.items()}

    def forward(self, x: Tensor, width: Width = FULL) -> Tensor:
        if not self.training:
            s = self.slices(width)
            return F.batch_norm(x, s["running_mean"], s["running_var"], s["weight"], s["bias"], eps=self.eps)
        if self.statistics is None:
            return self._normalise_and_move(x, width)
        if self.statistics.channel is not None:
            return self._normalise_together(x, width)
        runs = [self._normalise(run, width) for run in x.chunk(self.statistics.runs)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def _normalise_and_move(self, x: Tensor, width: Width) -> Tensor:
        """As PyTorch's BatchNorm. Other widths move nothing, nor does a forward that is computed again."""
        self.recalibrated.clear()  # of weights that will change
        mean, var = (self.running_mean, self.running_var) if width.is_full else (None, None)
        affine, momentum = self._affine(width), self.momentum if _is_first() else 0.0
        return F.batch_norm(x, mean, var, affine["weight"], affine["bias"], True, momentum, self.eps)

    @eager  # as Grid.exchange
    def _normalise_together(self, x: Tensor, width: Width) -> Tensor:
        assert self.statistics is not None
        affine = self._affine(width)
        y, mean, var = _SyncedNorm.apply(x, affine["weight"], affine["bias"], self.eps, self.statistics.channel)
        self._note(width, torch.stack((mean, var)))
        return y

    def _normalise(self, x: Tensor, width: Width) -> Tensor:
        # Momentum 1 makes PyTorch write this run's own mean and unbiased variance into fresh buffers.
        moments = self.running_mean.new_zeros(2, x.shape[1])
        affine = self._affine(width)
        y = F.batch_norm(x, moments[0], moments[1], affine["weight"], affine["bias"], True, 1.0, self.eps)
        self._note(width, moments)
        return y

    def _note(self, width: Width, moments: Tensor) -> None:
        if _is_first():
            noted = self.noted.get(width)
            if noted is None or (noted.dtype, noted.device) != (moments.dtype, moments.device):
                noted = self.noted[width] = moments.new_zeros(3, moments.shape[1])
            noted += torch.cat((moments, torch.ones_like(moments[:1])))


def without_gradient(bias: Tensor) -> None:
    """Train a bias no more that batch statistics take away again: its true gradient is zero, and rounding noise there
    becomes steps under Adam."""
    bias.register_hook(torch.zeros_like)


def _is_first() -> bool:
    """False where activation checkpointing repeats a forward, inside a backward pass. A compiled forward is never
    repeated, and cannot ask."""
    return torch.compiler.is_compiling() or bool(torch._C._current_graph_task_id() == -1)


class _SyncedNorm(torch.autograd.Function):
    """Normalise with the statistics of all ranks of a group; equal counts on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, channel: Channel) -> Any:
        var, mean = torch.var_mean(_exact(x), dim=_all_but_channels(x), correction=0)
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
        shape = (1, -1, *[1] * (x.dim() - 2))
        exact = _exact(grad)
        normed = (_exact(x) - mean.view(shape)) * invstd.view(shape)
        grad_bias = exact.sum(_all_but_channels(x))
        grad_weight = (exact * normed).sum(_all_but_channels(x))
        sums = ctx.channel.all_reduce(torch.stack((grad_bias, grad_weight)))
        mean_bias, mean_weight = (sums / ctx.count).unbind(0)
        grad_x = (exact - mean_bias.view(shape) - normed * mean_weight.view(shape)) * (weight * invstd).view(shape)
        return grad_x.to(grad.dtype), grad_weight, grad_bias, None, None


def _exact(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def set_statistics(model: nn.Module, statistics: Statistics) -> None:
    for layer in _layers(model):
        layer.statistics = statistics
        layer.noted = {FULL: layer.running_mean.new_zeros(3, len(layer.running_mean))}


@torch.no_grad()
def move_running_statistics(model: nn.Module, applied: Tensor, channel: Channel | None) -> None:
    """End a step: move every running statistic once, by the mean over the step's runs, or forget a skipped step's.

    applied: a bool, on the device. channel: the ranks whose runs differ, None where every rank saw all of them. One
    all-reduce for the whole model.
    """
    means = _means(model, FULL, channel)
    for momentum in {layer.momentum for layer in means}:
        layers = [layer for layer in means if layer.momentum == momentum]
        mean, var, runs = torch.cat([means[layer] for layer in layers], dim=1)
        for name, now in (("running_mean", mean), ("running_var", var)):
            buffers = [getattr(layer, name) for layer in layers]
            before = torch.cat(buffers)
            # A step need not train full width, and a skipped one's means may not be finite.
            after = torch.where(applied & (runs > 0), before.lerp(now, momentum), before)
            torch._foreach_copy_(buffers, after.split([len(buffer) for buffer in buffers]))
    forget(model)
    for layer in _layers(model):
        layer.recalibrated.clear()


def forget(model: nn.Module) -> None:
    """Drop what forwards have noted since the last step."""
    if noted := [sums for layer in _layers(model) for sums in layer.noted.values()]:
        torch._foreach_zero_(noted)


@contextmanager
def unnoted(model: nn.Module) -> Iterator[None]:
    """Forwards inside the block leave no trace in the statistics."""
    before = [{width: sums.clone() for width, sums in layer.noted.items()} for layer in _layers(model)]
    yield
    for layer, sums in zip(_layers(model), before, strict=True):
        for width, now in layer.noted.items():  # tensors that stay, see above
            now.copy_(sums[width]) if width in sums else now.zero_()


@contextmanager
def recalibrate(model: Any, widths: Sequence[Width | float], channel: Channel | None = None) -> Iterator[None]:
    """Take the statistics of every width of a `Network` anew from the forwards, at each of `widths`, of the model in
    the block, as for US-Net (arXiv 1903.05134); everything else is in eval mode. channel: as above."""
    model.eval()
    layers = _layers(model)
    before = [layer.statistics for layer in layers]
    for layer in layers:
        layer.train()
        layer.statistics = layer.statistics or Statistics()
    with torch.no_grad():
        forget(model)
        yield
        for width in map(model.width, widths):
            for layer, moments in _means(model, width, channel).items():
                layer.recalibrated[width] = moments[:2]
        forget(model)
    for layer, statistics in zip(layers, before, strict=True):
        layer.eval()
        layer.statistics = statistics


def _means(model: nn.Module, width: Width, channel: Channel | None) -> dict[BatchNorm, Tensor]:
    """[3, C] for every layer: mean and variance, averaged over this step's runs at a width on all ranks of `channel`,
    and how many there were."""
    layers = [layer for layer in _layers(model) if width in layer.noted]
    if not layers:
        return {}
    noted = torch.cat([layer.noted[width] for layer in layers], dim=1)
    means = noted[:2] / noted[2].clamp(min=1)
    if channel is not None:  # each has seen as many runs
        means = channel.all_reduce(means) / channel.size
    flat = torch.cat((means, noted[2:]))
    return dict(zip(layers, flat.split([layer.noted[width].shape[1] for layer in layers], dim=1), strict=True))


def _layers(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
