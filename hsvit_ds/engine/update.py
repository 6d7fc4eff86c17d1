"""The optimizer's step at ZeRO stage 0, where DeepSpeed neither reports the gradient's norm without clipping nor skips
a non-finite gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid.grid import Grid


class Update:
    """Clips the gradients of a module and steps its optimizer, unless their norm is not finite. Nothing waits for it.

    Args:
        optimizer: one of PyTorch's fused ones, over all trained parameters. clip: largest global norm; 0 for no limit.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, grid: Grid, clip: float) -> None:
        self.module, self.optimizer, self.grid, self.clip = module, optimizer, grid, clip
        self._step = optimizer.step

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Global norm before clipping, in fp64. Collective inside a replica."""
        own: list[Tensor] = []
        shared: list[Tensor] = []
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                (own if getattr(parameter, "model_parallel", False) else shared).append(parameter.grad)
        squares = torch.zeros(2, dtype=torch.float64, device=self.grid.device)
        for row, gradients in zip(squares, (own, shared), strict=True):
            if gradients:
                row += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if self.grid.submodule_ranks > 1:
            self.grid.sum_over_submodule_ranks(squares[:1])
        norm = squares.sum().sqrt()
        if self.clip:
            scale = (self.clip / (norm + 1e-6)).clamp(max=1).float()
            torch._foreach_mul_(own + shared, scale)
        # What PyTorch's fused optimizers leave a step out by; that is how GradScaler does it.
        self.optimizer.found_inf = 1 - norm.isfinite().float()  # type: ignore[attr-defined]
        self._step()
        return norm
