"""Widths of a slimmable network (Scala, arXiv 2412.04786; HydraViT, arXiv 2409.17978; MatFormer, arXiv 2310.07707).

A width is a whole number of T-ths of every sliced axis, and the end of the axis that it takes. Isolated Activation
(equations 2 and 3): the smallest width and the widths between take opposite ends, so that training the smallest at
every step disturbs the others least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby, pairwise
from math import lcm

from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How an axis is cut that a width need not divide: to the nearest multiple of `multiple`, of two as near the
    larger, at least to one, and never below 0.9 of the exact number (MobileNetV2's code; US-Net, arXiv 1903.05134). One
    of `times` equal parts, as a block's channels times its expansion, has so many times what one has."""

    multiple: int
    times: int = 1

    def of(self, size: int, share: Fraction) -> int:
        """How much of `size` is used."""
        part = size // self.times
        exact = part * share
        used = max(self.multiple, (exact / self.multiple + Fraction(1, 2)).__floor__() * self.multiple)
        if 10 * used < 9 * exact:
            used += self.multiple
        return min(used, part) * self.times


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
    def ratio(self) -> Fraction:
        return Fraction(self.numerator, self.denominator)

    @property
    def is_full(self) -> bool:
        return self.numerator == self.denominator

    def of(self, size: int, rounding: Rounding | None = None) -> int:
        """How much of an axis of `size` is used.

        Raises:
            ValueError: not a whole number, and no rounding for it.
        """
        if rounding is not None:
            return rounding.of(size, self.ratio)
        used, rest = divmod(size * self.numerator, self.denominator)
        if rest:
            raise ValueError(f"width {self} of {size} is {float(self) * size:g}, not a whole number")
        return used

    def take(self, x: Tensor, axis: int = 0, segments: int = 1, rounding: Rounding | None = None) -> Tensor:
        """What is used of an axis that consists of so many equal segments, each sliced by itself."""
        if self.is_full:
            return x
        if segments > 1:
            parts = x.unflatten(axis, (segments, -1))
            return self.take(parts, axis + 1, rounding=rounding).flatten(axis, axis + 1)
        size = x.shape[axis]
        used = self.of(size, rounding)
        return x.narrow(axis, 0 if self.side == "leading" else size - used, used)

    def layer(self, number: int) -> Width:
        """That of a layer: every one has the same."""
        return self

    @property
    def each(self) -> tuple[Width, ...]:
        """The widths that layers have."""
        return (self,)

    @property
    def words(self) -> str:
        return f"width {self}"


@dataclass(frozen=True)
class Mix(Width):
    """A width for each layer (Mix'n'Match of MatFormer, arXiv 2310.07707), the first layer's first; as a number their
    mean. A network that asks for its layers' widths can be cut to it, others refuse it."""

    layers: tuple[Width, ...] = ()

    @classmethod
    def of_layers(cls, layers: Sequence[Width]) -> Mix:
        """Raises:
        ValueError: no layers, or a layer that is narrower than the one before it.
        """
        if not layers:
            raise ValueError("a mix needs a width for each layer")
        mean = sum((width.ratio for width in layers), Fraction(0)) / len(layers)
        sides = {width.side for width in layers if not width.is_full}
        made = cls(*mean.as_integer_ratio(), sides.pop() if len(sides) == 1 else "both", tuple(layers))
        for before, width in pairwise(layers):
            if width.ratio < before.ratio:
                raise ValueError(f"mix {made}: {width} after {before}; widths must not decrease from layer to layer")
        return made

    def __str__(self) -> str:
        """0.25x3,0.50,1.00x2: the widths, and how many layers in a row have them."""
        runs = [(width, len(list(run))) for width, run in groupby(map(str, self.layers))]
        return ",".join(width if count == 1 else f"{width}x{count}" for width, count in runs)

    def of(self, size: int, rounding: Rounding | None = None) -> int:
        raise ValueError(f"{self.words}: there is no width of all layers that {size} could be cut to")

    def layer(self, number: int) -> Width:
        return self.layers[number]

    @property
    def each(self) -> tuple[Width, ...]:
        return self.layers

    @property
    def words(self) -> str:
        return f"mix {self}"


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
    family: tuple[Ratio, ...] = ()
    """The widths one by one, from the smallest to 1, instead of `smallest` and `granularity`: ["1/8", "1/4", "1/2", 1]
    (MatFormer, arXiv 2310.07707)."""
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
        self._check_family()
        self._check_then()

    def _check_family(self) -> None:
        """Refuse widths that are no family, or beside which others are set."""
        if not self.family:
            return
        named = f"family = {list(self.family)}"
        for key, default in (("smallest", 1.0), ("granularity", 0.125), ("then", ())):
            if getattr(self, key) != default:
                raise ValueError(f"{named} says every width of the run; leave {key} out, or family")
        widths = [ratio(value, "family: width") for value in self.family]
        if widths[0] <= 0:
            raise ValueError(f"{named}: width {self.family[0]} must be above 0")
        for (before, last), (value, own) in pairwise(zip(self.family, widths, strict=True)):
            if own <= last:
                raise ValueError(f"{named}: width {value} must be above the {before} before it")
        if widths[-1] != 1:
            raise ValueError(f"{named}: must end with 1, the full width")
        if len(widths) == 1:
            raise ValueError(f"{named} has one width, which a model that is not sliced has; leave family out")

    def _check_then(self) -> None:
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
        if self.family:
            named = (ratio(value) for value in self.family)
            return ((0, tuple(self._width(own.numerator, own.denominator) for own in named)),)
        s = ratio(self.smallest)
        steps = {0: ratio(self.granularity)} | {change.epoch: ratio(change.granularity) for change in self.then}
        # One T for all, so that a width of two families is the same.
        t = lcm(s.denominator, *(step.denominator for step in steps.values()))
        return tuple(
            (epoch, tuple(self._width(n, t) for n in range(int(s * t), t + 1, int(step * t))))
            for epoch, step in steps.items()
        )

    @cached_property
    def all(self) -> tuple[Width, ...]:
        """Every width that is trained at some time, the smallest first, with its side."""
        return tuple(sorted({width for _, widths in self.families for width in widths}, key=float))

    @property
    def least(self) -> Fraction:
        """The smallest width (s)."""
        return ratio(self.family[0] if self.family else self.smallest)

    @property
    def said(self) -> str:
        """What slices the model, as its recipe says it."""
        return f"widths.family = {list(self.family)}" if self.family else f"widths.smallest = {self.smallest}"

    def is_large(self, width: Fraction) -> bool:
        """Whether it lies above the middle of the smallest width and 1 (equations 7 and 8)."""
        return 2 * width > 1 + self.least

    def _width(self, numerator: int, denominator: int) -> Width:
        if numerator == denominator:
            return FULL
        s, own = self.least, Fraction(numerator, denominator)
        part = "large" if self.is_large(own) else "small"
        takes_other = own > s and self.isolated in (True, part)
        return Width(numerator, denominator, _OTHER[self.side] if takes_other else self.side)

    def mix(self, values: str | Sequence[Ratio], untrained: bool = False) -> Mix:
        """The mix of a ratio for each layer, or of a text such as "0.25x3,0.5,1x2". untrained: see `find`.

        Raises:
            ValueError: as of `find`, a text that says something else, or widths that decrease.
        """
        each = _each(values) if isinstance(values, str) else values
        return Mix.of_layers([self.find(value, untrained) for value in each])

    def find(self, value: Ratio, untrained: bool = False) -> Width:
        """The width of a ratio such as 0.5 or "1/12".

        untrained: also one that is not among the X, between them or, from the smallest's side, below.

        Raises:
            ValueError: not a number, outside, or not one of the X, with the nearest that are.
        """
        own = ratio(value, "width")
        for width in self.all:
            if width.ratio == own:
                return width
        if not (0 if untrained else self.least) < own <= 1:
            among = f"from {self.all[0]} to 1" if len(self.all) > 1 else "1, this model's only one"
            raise ValueError(f"width {value}: must be {'above 0 and at most 1' if untrained else among}")
        if untrained:
            return self._width(own.numerator, own.denominator)
        raise ValueError(
            f"width {value} is not one of the {len(self.all)} of this model; {nearest(float(own), self.all)}"
        )


def _each(text: str) -> list[str]:
    """0.5x2,1 is 0.5, 0.5, 1."""
    found: list[str] = []
    for part in text.split(","):
        value, times, count = part.partition("x")
        if times and not (count.strip().isdecimal() and int(count)):
            raise ValueError(f'mix "{text}": {part} must be a width, or one of several layers in a row, as 0.5x3')
        found += [value.strip()] * (int(count) if times else 1)
    return found


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
