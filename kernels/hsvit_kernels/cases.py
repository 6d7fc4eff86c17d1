"""What an operation is asked to compute, as far as a kernel is compiled or chosen for it, and what a model asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = {
    "grouped_attention": ("T", "D", "heads", "depth", "dropout", "training", "all_tokens"),
    "linear_forward": ("n", "k", "bias", "gelu", "residual", "saved"),
    "linear_input_gradient": ("n", "k"),
    "linear_weight_gradient": ("n", "k", "bias"),
}
"""What the sizes of a case say, by operation; those that are 0 or 1 are written as a word or not at all."""
_FLAGS = ("dropout", "training", "all_tokens", "bias", "gelu", "residual", "saved")
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class Case(NamedTuple):
    """An operation and what its kernels are chosen for.

    dtype: that products are computed in. weights: dtype of the parameters. sizes: see `FIELDS`.
    """

    operation: str
    dtype: torch.dtype
    weights: torch.dtype
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """As in "grouped_attention bf16 (weights fp32) T33 D64 heads8 depth8 dropout training"."""
        parts = [
            name * value if name in _FLAGS else f"{name}{value}"
            for name, value in zip(FIELDS[self.operation], self.sizes, strict=True)
        ]
        weights = "" if self.weights == self.dtype else f" (weights {_SHORT[self.weights]})"
        return " ".join([self.operation, _SHORT[self.dtype] + weights, *filter(None, parts)])

    def size(self, name: str) -> int:
        return self.sizes[FIELDS[self.operation].index(name)]


Cases = dict[Case, tuple[int, ...]]
"""Cases, and the largest extent that each was met with: images and groups of attention, rows of a linear layer."""

_listed: Cases | None = None


@contextmanager
def listing() -> Iterator[Cases]:
    """Within the block operations compute nothing: they note what they are asked for and return zeros.

    A model's forwards in it, in training with gradients enabled, list what `prepare` shall try.
    """
    global _listed
    before, _listed = _listed, {}
    try:
        yield _listed
    finally:
        _listed = before


def is_listing() -> bool:
    return _listed is not None


def note(case: Case, *extent: int) -> None:
    """Add a case to the list that is being made."""
    assert _listed is not None
    _listed[case] = max(_listed.get(case, extent), extent)


def stand_in(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, differentiable: bool) -> Tensor:
    """What an operation returns while cases are listed; what follows it in a model asks whether it needs a gradient."""
    return like.new_zeros(shape, dtype=dtype).requires_grad_(differentiable).clone()
