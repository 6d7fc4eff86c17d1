"""What the passes of one optimizer step share about sliced weights."""

from __future__ import annotations

import torch
from torch import Tensor


class StepState:
    """What the passes of one optimizer step share about full weights: low-precision copies and fp32 main gradients.

    A backward adds its gradient to the slice of the main gradient and hands autograd nothing, except in the step's
    last pass, which hands over the whole as the weight's ordinary gradient, without a copy; every weight of a step must
    be used in that pass, once. Engines that reduce, clip and step then need to know nothing about it.

    last: whether the backward that comes is the step's last. Set it before each; `clear` after each step.
    gathers: whether a model that owns this state uses it. Off until an engine that keeps these rules says so, as an
        ordinary training loop would not.
    """

    def __init__(self) -> None:
        self.last, self.gathers = True, False
        self._low: dict[tuple[int, torch.dtype], Tensor] = {}
        self._main: dict[int, Tensor] = {}

    def low(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, cast once until `clear`."""
        if weight.dtype == dtype:
            return weight.detach()
        key = (id(weight), dtype)
        if key not in self._low:
            self._low[key] = weight.detach().to(dtype)
        return self._low[key]

    def main(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """The fp32 gradient of `weight` so far. shape: the weight's, as an engine may have taken its data away."""
        if id(weight) not in self._main:
            self._main[id(weight)] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        return self._main[id(weight)]

    def handed(self, weight: Tensor) -> Tensor | None:
        """The main gradient in the last pass, after which nothing here holds it, so that autograd keeps it as it is."""
        return self._main.pop(id(weight)) if self.last else None

    def clear(self) -> None:
        """Forget copies and gradients: after a step, and whenever weights have changed."""
        self._low.clear()
        self._main.clear()
