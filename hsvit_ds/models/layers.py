"""Layers that compute with the slice of their parameters that a width uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import StepState, sliced_linear

from .slimmable import FULL, Rounding, Width


class Linear(nn.Linear):
    """A linear layer whose inputs, outputs or both are sliced.

    Args:
        in_segments, out_segments: equal parts of the inputs and outputs that are sliced one by one.
        state: gathers the gradients of a step's passes; the layer must then be used once in each pass.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        slice_in: bool = True,
        slice_out: bool = True,
        in_segments: int = 1,
        out_segments: int = 1,
        state: StepState | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.slice_in, self.slice_out = slice_in, slice_out
        self.in_segments, self.out_segments, self.state = in_segments, out_segments, state

    def forward(self, x: Tensor, width: Width = FULL, **epilogue: Any) -> Tensor:  # type: ignore[override]
        """[..., inputs at this width] to [..., outputs at this width]; epilogue: `sliced_linear`'s."""
        return sliced_linear(
            x,
            self.weight,
            self.bias,
            out_features=width.of(self.out_features) if self.slice_out else self.out_features,
            side=width.side,
            in_segments=self.in_segments,
            out_segments=self.out_segments,
            state=self.state if self.state is not None and self.state.gathers else None,
            **epilogue,
        )

    def slices(self, width: Width) -> dict[str, Tensor]:
        """The parameters of the standalone layer at `width`."""
        found: dict[str, Tensor] = dict(self.named_parameters())
        if self.slice_out:
            found = {name: width.take(p, 0, self.out_segments) for name, p in found.items()}
        if self.slice_in:
            found["weight"] = width.take(found["weight"], 1, self.in_segments)
        return found


class LayerNorm(nn.LayerNorm):
    """Normalises over the features of a width."""

    def __init__(self, features: int, eps: float, sliced: bool = True) -> None:
        super().__init__(features, eps)
        self.sliced = sliced

    def slices(self, width: Width) -> dict[str, Tensor]:
        return {name: width.take(p) if self.sliced else p for name, p in self.named_parameters()}

    def forward(self, x: Tensor, width: Width = FULL) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps, **self.slices(width))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, features: int, first: float, sliced: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((features,), first))
        self.sliced = sliced

    def slices(self, width: Width) -> dict[str, Tensor]:
        return {"gamma": width.take(self.gamma) if self.sliced else self.gamma}

    def forward(self, x: Tensor, width: Width) -> Tensor:
        return x * self.slices(width)["gamma"]


class Conv2d(nn.Conv2d):
    """A convolution whose output channels, and input channels where `slice_in` is on, are sliced; of a depthwise one,
    which has a kernel a channel, the channels.

    Args:
        out_segments: equal parts of the output channels that are sliced one by one.
        round_in, round_out: of the input and output channels where a width need not divide them.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        slice_in: bool,
        slice_out: bool,
        out_segments: int = 1,
        round_in: Rounding | None = None,
        round_out: Rounding | None = None,
        **options: Any,
    ) -> None:
        super().__init__(c_in, c_out, kernel, **options)
        self.slice_in, self.slice_out, self.out_segments = slice_in, slice_out, out_segments
        self.round_in, self.round_out = round_in, round_out

    def slices(self, width: Width) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.named_parameters())
        if self.slice_out:
            found = {name: width.take(p, 0, self.out_segments, self.round_out) for name, p in found.items()}
        if self.slice_in:
            found["weight"] = width.take(found["weight"], 1, rounding=self.round_in)
        return found

    def forward(self, x: Tensor, width: Width = FULL) -> Tensor:
        found = self.slices(width)
        weight, is_depthwise = found["weight"], self.groups == self.in_channels == self.out_channels
        groups = weight.shape[0] if is_depthwise else self.groups
        return F.conv2d(x, weight, found.get("bias"), self.stride, self.padding, self.dilation, groups)
