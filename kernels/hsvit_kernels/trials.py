"""What the first use tries for a case: the same random problem for a kernel and for the reference, and one to time.

A kernel is right where its error against fp64 is at most twice (a result) or three times (a gradient) that of the
PyTorch reference in the same dtype, plus rounding: 4 units of the dtype, and of fp32 for each square root of the terms
that a number sums up (both sum in fp32, in orders of their own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cases import Case
from .configurations import Place
from .grouped_attention import dropout_mask, grouped_attention, places
from .random import Draw
from .sliced_linear import accumulate, forward, input_gradient, place

IMAGES, ROWS = 64, 4096
"""The most that is compared; what is timed is as large as the run's."""
_DROPOUT = 0.2


def excess(ours: Tensor, plain: Tensor, exact: Tensor, *, gradient: bool, terms: int = 1) -> float:
    """The largest error of `ours` over the one that is allowed; above 1 is wrong. All of one shape; masks have none.

    plain: the reference in the dtype of `ours`. exact: in fp64. terms: how many numbers each one sums up.
    """
    if ours.dtype == torch.bool:
        return 0.0 if torch.equal(ours, exact) else float("inf")
    exact = exact.double()
    error = (ours.double() - exact).abs().amax() if exact.numel() else exact.sum()
    if not bool(error.isfinite()):
        return float("inf")
    rounding = 4 * torch.finfo(ours.dtype).eps + 4 * torch.finfo(torch.float32).eps * terms**0.5
    allowed = (3 if gradient else 2) * (plain.double() - exact).abs().amax() + rounding * exact.abs().amax()
    return float(error / allowed) if allowed else float("inf") if error else 0.0


class Trial(Protocol):
    """A case on a device."""

    places: list[Place]
    """The entries of the table that it is launched with."""
    terms: int
    """How many numbers an element of a gradient sums up."""

    def results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is compared, computed in `dtype` by the implementation that is forced: "result", then gradients."""
        ...

    def step(self) -> Callable[[], Any]:
        """What is timed, as large as the run's."""
        ...


def trial(case: Case, extent: Sequence[int], device: torch.device) -> Trial:
    """A case of the extents that `cases.note` was given."""
    if case.operation == "grouped_attention":
        return AttentionTrial(case, extent[0], extent[1], device)
    return LinearTrial(case, extent[0], device)


class _Numbers:
    """Normal numbers on a device that no other generator knows of."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.source = device, torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, device=self.device, generator=self.source) * scale).to(dtype)


class AttentionTrial:
    def __init__(self, case: Case, images: int, groups: int, device: torch.device) -> None:
        self.case, self.images, self.groups, self.device = case, images, groups, device
        self.places = places(case)
        self.terms = min(images, IMAGES) * case.size("T")

    def _inputs(self, images: int) -> dict[str, Tensor]:
        """Weights of a trained layer's size, so that errors are rounding's; all numbers can be held in every dtype."""
        t, d, a, g = self.case.size("T"), self.case.size("D"), self.case.size("depth"), self.groups
        normal = _Numbers(self.device)
        found = {
            "tokens": normal(images, g * (t - 1), d),
            "cls": normal(g, d),
            "positions": normal(g, t, d),
            "norm_weight": 1 + normal(g, a, d, scale=0.1),
            "norm_bias": normal(g, a, d, scale=0.1),
            "qkv_weight": normal(g, a, 3 * d, d, scale=d**-0.5),
            "qkv_bias": normal(g, a, 3 * d, scale=0.1),
            "out_weight": normal(g, a, d, d, scale=d**-0.5),
            "out_bias": normal(g, a, d, scale=0.1),
        }
        return {name: tensor.to(self.case.dtype) for name, tensor in found.items()}

    def _draw(self, images: int) -> Draw:
        return Draw.of(1, 2, 3, image=torch.arange(7, 7 + images), device=self.device)

    def _call(self, tensors: dict[str, Any], images: int) -> Tensor:
        drops = bool(self.case.size("dropout"))
        return grouped_attention(
            **tensors,
            heads=self.case.size("heads"),
            first_group=3,
            all_tokens=bool(self.case.size("all_tokens")),
            dropout=_DROPOUT * drops,
            draw=self._draw(images) if drops else None,
        )

    def _typed(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tokens in `dtype`, weights as the case has them (or exactly)."""
        weights = self.case.weights if dtype == self.case.dtype else dtype
        grad = bool(self.case.size("training"))
        return {name: t.to(dtype if name == "tokens" else weights).requires_grad_(grad) for name, t in tensors.items()}

    def results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        images = min(self.images, IMAGES)
        tensors = self._typed(self._inputs(images), dtype)
        with torch.set_grad_enabled(bool(self.case.size("training"))):
            y = self._call(tensors, images)
            found = {"result": y.detach()}
            if y.requires_grad:
                weight = _Numbers(self.device)(*y.shape).to(self.case.dtype).to(y.dtype)
                found |= dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), weight), strict=True))
        if self.case.size("dropout"):
            heads, tokens = self.case.size("heads"), self.case.size("T")
            found["mask"] = dropout_mask(self._draw(1), _DROPOUT, layer=0, heads=heads, group=3, tokens=tokens)
        return found

    def step(self) -> Callable[[], Any]:
        tensors = self._typed(self._inputs(self.images), self.case.dtype)
        leaves = list(tensors.values())
        if not self.case.size("training"):
            return torch.no_grad()(lambda: self._call(tensors, self.images))
        weight = torch.ones(self.images, self.groups, self.case.size("D"), dtype=self.case.dtype, device=self.device)

        @torch.enable_grad()
        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(self._call(tensors, self.images), leaves, weight)

        return step


class LinearTrial:
    """One kernel of the sliced linear layer, on the trailing slice of a larger weight."""

    def __init__(self, case: Case, rows: int, device: torch.device) -> None:
        self.case, self.rows, self.device = case, rows, device
        self.n, self.k = case.size("n"), case.size("k")
        self.places = [place(case.operation, self.n, self.k)]
        self.terms = min(rows, ROWS)

    def _run(self, rows: int, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
        case, normal, low = self.case, _Numbers(self.device), self.case.dtype

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            return normal(*shape, scale=scale).to(low).to(dtype)

        kernel, around = case.operation, 64
        full = drawn(self.n + around, self.k + around, scale=self.k**-0.5)
        weight = full[around:, around:]
        if kernel == "linear_forward":
            x, bias = drawn(rows, self.k), drawn(self.n) if case.size("bias") else None
            residual = drawn(rows, self.n) if case.size("residual") else None
            gelu, saved = bool(case.size("gelu")), bool(case.size("saved"))

            def layer() -> dict[str, Tensor]:
                y, z = forward(x, weight, bias, residual, gelu, saved)
                return {"result": y, "saved": z} if saved else {"result": y}

            return layer
        dz = drawn(rows, self.n)
        if kernel == "linear_input_gradient":
            return lambda: {"x": input_gradient(dz, weight)}
        x = drawn(rows, self.k)
        total = torch.float64 if dtype == torch.float64 else torch.float32
        main, sums = full.to(total), drawn(self.n).to(total) if case.size("bias") else None

        def add() -> dict[str, Tensor]:
            accumulate(main[around:, around:], sums, dz, x)
            return {"weight": main} | ({} if sums is None else {"bias": sums})

        return add

    def results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._run(min(self.rows, ROWS), dtype)()

    def step(self) -> Callable[[], Any]:
        return torch.no_grad()(self._run(self.rows, self.case.dtype))
