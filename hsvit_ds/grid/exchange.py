"""What ranks send each other in a forward: collectives that count their bytes, and their gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import counted
from ..spans import Part, span
from . import rounding


class Channel:
    """Collectives of one kind over one group, with the bytes this rank has put in counted."""

    last: ClassVar[str] = "none"
    """The collective of this process that began last, whatever its channel; for one that hangs."""

    def __init__(self, name: str, group: dist.ProcessGroup, size: int, part: Part = Part.EXCHANGE) -> None:
        self.name, self.group, self.size, self.part, self.bytes = name, group, size, part, 0

    def _begin(self, what: str, x: Tensor, sent: int) -> None:
        self.bytes += sent
        Channel.last = f"{what} of {tuple(x.shape)} {x.dtype} ({self.name}, {counted(self.size, 'rank')})"

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the group, in place."""
        self._begin("all_reduce", x, x.nbytes)
        with span(self.part):
            dist.all_reduce(x, group=self.group)
        return x

    def take(self) -> int:
        """The bytes since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def all_to_all(self, x: Tensor) -> Tensor:
        """[size, ...]: part i goes to rank i; what the ranks sent here, in their order."""
        self._begin("all_to_all", x, x.nbytes // self.size * (self.size - 1))
        # Of GPUs gloo knows nothing here, nor of bfloat16: as bytes, by way of the host.
        host = x.is_cuda and dist.get_backend(self.group) == "gloo"
        sent = (x.cpu() if host else x).contiguous()
        received = torch.empty_like(sent)
        with span(self.part):
            dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=self.group)
        return received.to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's `x`, in the order of ranks."""
        self._begin("all_gather", x, x.nbytes)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with span(self.part):
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)


class SumForward(torch.autograd.Function):
    """Forward sum over ranks, backward the identity: every rank of a replica computes the same loss, so the gradient
    at the sum is already whole everywhere; summing it again would multiply submodule gradients by the rank count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel) -> Tensor:
        return channel.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SumRounded(torch.autograd.Function):
    """[B, M here, D] of each rank to the sum [B, D] over all of them, each rounded, in the order of submodules: to the
    bit what one process computes. Backward as `SumForward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str, channel: Channel) -> Tensor:
        ctx.here = x.shape[1]
        parts = rounding.unpack(channel.all_gather(rounding.pack(x, form)), form).to(x.dtype)
        return parts.movedim(0, 1).flatten(1, 2).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, None].expand(-1, ctx.here, -1), None, None


class ExchangeFeatures(torch.autograd.Function):
    """[B / S, K, f] of this rank's images to [B, K / S, f] of all images; backward the same way back. All ranks of a
    replica compute the same loss, and each has the gradient at its own channels alone: nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel) -> Tensor:
        ctx.channel = channel
        parts = x.unflatten(1, (channel.size, -1)).movedim(1, 0)
        return channel.all_to_all(parts).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.unflatten(0, (ctx.channel.size, -1))
        return ctx.channel.all_to_all(parts).movedim(0, 1).flatten(1, 2), None
