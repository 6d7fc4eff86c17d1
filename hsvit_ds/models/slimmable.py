"""Widths, and layers that compute with the slice of their parameters that a width uses (Scala, arXiv 2412.04786;
HydraViT, arXiv 2409.17978).

A width is a whole number of T-ths of every sliced axis, and the end of the axis that it takes. Isolated Activation
(equations 2 and 3): the smallest width and the widths between take opposite ends, so that training the smallest at
every step disturbs the others least.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import StepState, sliced_linear


@dataclass(frozen=True)
class Width:
    """`numerator` / `denominator` of every sliced axis, from its end `side`, "leading" or "trailing"."""

    numerator: int
    denominator: int
    side: str = "leading"

    def __str__(self) -> str:
        """The ratio with two decimals at least: 0.50, 0.3125."""
        text = f"{float(self):.6f}".rstrip("0")
        return text + "0" * (2 - len(text.partition(".")[2]))

    def __float__(self) -> float:
        return self.numerator / self.denominator

    @property
    def is_full(self) -> bool:
        return self.numerator == self.denominator

    def of(self, size: int) -> int:
        """How much of an axis of `size` is used.

        Raises:
            ValueError: not a whole number.
        """
        used, rest = divmod(size * self.numerator, self.denominator)
        if rest:
            raise ValueError(f"width {self} of {size} is {float(self) * size:g}, not a whole number")
        return used

    def take(self, x: Tensor, axis: int = 0, segments: int = 1) -> Tensor:
        """What is used of an axis that consists of so many equal segments, each sliced by itself."""
        if self.is_full:
            return x
        if segments > 1:
            parts = x.unflatten(axis, (segments, -1))
            return self.take(parts, axis + 1).flatten(axis, axis + 1)
        size = x.shape[axis]
        used = self.of(size)
        return x.narrow(axis, 0 if self.side == "leading" else size - used, used)


FULL = Width(1, 1)
Ratio = float | str
"""A share of the channels: a decimal fraction, 0.25, or a common one, "1/12"."""
_OTHER = {"leading": "trailing", "trailing": "leading"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another granularity after so many epochs."""

    epoch: int
    granularity: Ratio


@dataclass(frozen=True, kw_only=True)
class Config:
    smallest: Ratio = 1.0
    """The smallest width (s), 0.25 or "3/12"; 1: the model is not sliced."""
    granularity: Ratio = 0.125
    """Step between widths (epsilon), 0.125 or "1/12"; divides 1 - smallest. The widths are X = (1 - smallest) /
    granularity + 1."""
    slice: str = "channels"
    """What a width takes its share of: the "channels" of every head, so that all are narrower (Scala); or a ViT's
    "heads", fewer of their full width, k of H at width k / H (HydraViT, arXiv 2409.17978)."""
    side: str = "trailing"
    """End of each axis that the smallest width uses: "trailing" as in the paper, "leading" as in the published code."""
    isolated: bool | str = True
    """Isolated Activation: the widths between use the other end. Of them only those above the middle of smallest and 1
    ("large": table 10, b), or only the others ("small": table 10, c). False: every width uses `side`."""
    then: tuple[Change, ...] = ()
    """Other families later: [{epoch = 70, granularity = 0.125}] trains these widths after 70 epochs. Smallest and sides
    stay; a width that is not among them is abandoned, and no longer reported."""

    def __post_init__(self) -> None:
        if not 0 < ratio(self.smallest, "smallest") <= 1:
            raise ValueError(f"smallest = {self.smallest}: must be above 0 and at most 1")
        if self.slice not in ("channels", "heads"):
            raise ValueError(f'slice = "{self.slice}": must be "channels" or "heads"')
        if self.side not in _OTHER:
            raise ValueError(f'side = "{self.side}": must be "leading" or "trailing"')
        if self.isolated not in (True, False, "large", "small"):
            raise ValueError(f'isolated = "{self.isolated}": must be true, false, "large" or "small"')
        self._check_step("", self.granularity)
        if self.then and ratio(self.smallest) == 1:
            raise ValueError("then: smallest = 1 has one width, which stays; set smallest below 1")
        before = 0
        for change in self.then:
            if change.epoch <= before:
                least = f"above the {before} before it" if before else "at least 1"
                raise ValueError(f"then: epoch = {change.epoch}: must be {least}")
            before = change.epoch
            self._check_step(f"then: after epoch {change.epoch} ", change.granularity)

    def _check_step(self, where: str, granularity: Ratio) -> None:
        """Refuse a family that full width or the smallest is not in."""
        s, step = ratio(self.smallest), ratio(granularity, f"{where}granularity")
        if not 0 < step <= 1:
            raise ValueError(f"{where}granularity = {granularity}: must be above 0 and at most 1")
        if (1 - s) % step:
            below = (1 - s) // step
            near = [_written((1 - s) / n) for n in (below, below + 1) if n]
            raise ValueError(
                f"{where}granularity = {granularity} does not divide 1 - smallest = {_written(1 - s)}"
                f"{', which would lose the smallest' if where else ''}; the nearest that do: {', '.join(near)}"
            )

    @cached_property
    def families(self) -> tuple[tuple[int, tuple[Width, ...]], ...]:
        """(The epoch from which on it is trained, its X widths, the smallest first) of each family, in order."""
        s = ratio(self.smallest)
        steps = {0: ratio(self.granularity)} | {change.epoch: ratio(change.granularity) for change in self.then}
        # One T for all, so that a width of two families is the same.
        t = lcm(s.denominator, *(step.denominator for step in steps.values()))
        return tuple(
            (epoch, tuple(self._width(n, t) for n in range(int(s * t), t + 1, int(step * t))))
            for epoch, step in steps.items()
        )

    @cached_property
    def family(self) -> tuple[Width, ...]:
        """Every width that is trained at some time, the smallest first, with its side."""
        return tuple(sorted({width for _, widths in self.families for width in widths}, key=float))

    def _width(self, numerator: int, denominator: int) -> Width:
        if numerator == denominator:
            return FULL
        s, own = ratio(self.smallest), Fraction(numerator, denominator)
        part = "large" if 2 * own > 1 + s else "small"
        takes_other = own > s and self.isolated in (True, part)
        return Width(numerator, denominator, _OTHER[self.side] if takes_other else self.side)

    def find(self, value: Ratio, untrained: bool = False) -> Width:
        """The width of a ratio such as 0.5 or "1/12".

        untrained: also one that is not among the X, between them or, from the smallest's side, below.

        Raises:
            ValueError: not a number, outside, or not one of the X, with the nearest that are.
        """
        own = ratio(value, "width")
        for width in self.family:
            if Fraction(width.numerator, width.denominator) == own:
                return width
        if not (0 if untrained else ratio(self.smallest)) < own <= 1:
            among = f"from {self.family[0]} to 1" if len(self.family) > 1 else "1, this model's only one"
            raise ValueError(f"width {value}: must be {'above 0 and at most 1' if untrained else among}")
        if untrained:
            return self._width(own.numerator, own.denominator)
        raise ValueError(
            f"width {value} is not one of the {len(self.family)} of this model; {nearest(float(own), self.family)}"
        )


def nearest(value: float, among: tuple[Width, ...]) -> str:
    """The two widths closest to a ratio, for a message."""
    close = sorted(sorted(among, key=lambda width: abs(float(width) - value))[:2], key=float)
    return f"nearest: {', '.join(str(width) for width in close)}"


def ratio(value: Ratio, name: str = "") -> Fraction:
    """As written: 0.1 is a tenth. What a width prints is that width again: 0.083333 is a twelfth.

    Raises:
        ValueError: not a number; name: what of.
    """
    try:
        exact = Fraction(str(value))
    except ValueError:
        raise ValueError(f'{name} = "{value}": must be a number such as 0.5, or a fraction such as "1/12"') from None
    except ZeroDivisionError:
        raise ValueError(f'{name} = "{value}": a fraction\'s denominator must not be 0') from None
    simple = exact.limit_denominator(1000)
    return simple if f"{float(simple):.6f}" == f"{float(exact):.6f}" else exact


def _written(value: Fraction) -> str:
    """As a recipe can say it: 0.0625, "1/12"."""
    decimal = str(float(value))
    return decimal if Fraction(decimal) == value else f'"{value}"'


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
        **options: Any,
    ) -> None:
        super().__init__(c_in, c_out, kernel, **options)
        self.slice_in, self.slice_out, self.out_segments = slice_in, slice_out, out_segments

    def slices(self, width: Width) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.named_parameters())
        if self.slice_out:
            found = {name: width.take(p, 0, self.out_segments) for name, p in found.items()}
        if self.slice_in:
            found["weight"] = width.take(found["weight"], 1)
        return found

    def forward(self, x: Tensor, width: Width = FULL) -> Tensor:
        found = self.slices(width)
        weight, is_depthwise = found["weight"], self.groups == self.in_channels == self.out_channels
        groups = weight.shape[0] if is_depthwise else self.groups
        return F.conv2d(x, weight, found.get("bias"), self.stride, self.padding, self.dilation, groups)
