"""What a UniFormer is: the published variants, the checks, the sizes of maps, the network at a width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from . import slimmable
from .network import OneRank
from .slimmable import Mix, Width

STAGES = 4


@dataclass(frozen=True)
class Variant:
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 4.0
    stem: str = "convolutions"
    downsampling: str = "patches"
    pruned: bool = False


_S, _XS = (64, 128, 320, 512), (64, 128, 256, 512)
VARIANTS = {
    "UniFormer-S": Variant(_S, (3, 4, 8, 3), (5, 8), stem="patches"),
    "UniFormer-S+": Variant(_S, (3, 5, 9, 3), (10, 16), downsampling="convolutions"),
    "UniFormer-XS": Variant(_XS, (3, 5, 9, 3), (8, 16), mlp_ratio=3.0, pruned=True),
}
NAMES = {
    "uniformer_small": "UniFormer-S",
    "uniformer_small_plus": "UniFormer-S+",
    "uniformer_xs": "UniFormer-XS",
}
"""What the published code calls them."""
_KNOWN = ("channels", "depths", "heads", "mlp_ratio", "stem", "downsampling", "pruned")


@dataclass(frozen=True, kw_only=True)
class Architecture(OneRank):
    """The numbers that a UniFormer is made of, and what follows from them; `uniformer.Config` is a recipe's `model`."""

    kind: Literal["uniformer"] = "uniformer"
    variant: str = ""
    """A published variant: UniFormer-S, UniFormer-S+ (S† in Scala's paper), UniFormer-XS; gives what is not set of
    channels, depths, heads, mlp_ratio, stem, downsampling and pruned."""
    channels: tuple[int, ...] = ()
    """Of each of the four stages, at full width."""
    depths: tuple[int, ...] = ()
    """Blocks of each stage: two of convolutions, two of attention."""
    heads: tuple[int, ...] = ()
    """Attention heads of the last two stages, of every width."""
    mlp_ratio: float = 0.0
    """Hidden channels of an MLP over its stage's; 0: the variant's, or 4."""
    stem: str = ""
    """What makes the first map of the image: two overlapping "convolutions", or one of "patches"; by default the
    variant's, or "convolutions"."""
    downsampling: str = ""
    """What makes the other stages' maps: a "convolutions" layer, or "patches"; by default the variant's, or
    "convolutions"."""
    pruned: bool | None = None
    """Whether attention leaves out the half of the tokens that a CLS token attends to least (XS), which in
    training has a head of its own; by default the variant's, or false."""
    strides: tuple[int, ...] = (4, 2, 2, 2)
    """Pixels of each stage's input to one of its map, on a side: 1, 2 or 4 of the stem, 1 or 2 of the others; smaller
    ones for small images."""
    drop_path: float = 0.0
    """Probability of skipping a branch for an image in training, from 0 linearly to this at the last block."""
    widths: slimmable.Config = field(default_factory=slimmable.Config)

    def __post_init__(self) -> None:
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f'variant = "{self.variant}": must be one of {", ".join(VARIANTS)}')
        if not self.variant and not (self.channels and self.depths and self.heads):
            raise ValueError("name a variant, or set channels, depths and heads")
        for name, count in (("channels", STAGES), ("depths", STAGES), ("strides", STAGES), ("heads", 2)):
            given = getattr(self, name)
            if given and (len(given) != count or min(given) < 1):
                raise ValueError(f"{name} = {list(given)}: must be {count} numbers of at least 1")
        if self.strides[0] not in (1, 2, 4) or max(self.strides[1:]) > 2:
            raise ValueError(
                f"strides = {list(self.strides)}: must be 1, 2 or 4 for the stem, and 1 or 2 for the others"
            )
        for name in ("stem", "downsampling"):
            if getattr(self, name) not in ("", "convolutions", "patches"):
                raise ValueError(f'{name} = "{getattr(self, name)}": must be "convolutions" or "patches"')
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: must not be negative")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path = {self.drop_path}: must be in [0, 1)")
        if self.widths.slice != "channels":
            raise ValueError(
                f'widths.slice = "{self.widths.slice}" is for a ViT; a UniFormer keeps its heads, and its convolutions '
                'have none; leave it "channels"'
            )

    def resolved(self, image_size: int) -> Self:
        """Fill what the variant gives; refuse what cannot be divided, and images too small for the strides."""
        known = VARIANTS[self.variant] if self.variant else Variant((), (), (), downsampling="convolutions")
        given = {name: getattr(self, name) for name in _KNOWN}
        unset: dict[str, Any] = {n: getattr(known, n) for n, v in given.items() if not v and v is not False}
        full = replace(self, **unset)
        for channels, heads in zip(full.channels[2:], full.heads, strict=True):
            if channels % heads:
                raise ValueError(f"heads = {heads} does not divide the {channels} channels of its stage")
        if full.stem == "convolutions" and full.channels[0] % 2:
            raise ValueError(f"channels = {list(full.channels)}: the first must be even, as the stem has half between")
        full._check_sides(image_size)
        for width in full.widths.all:
            full.check_width(width)
        return full

    def _check_sides(self, image_size: int) -> None:
        side, key = image_size, f"strides = {list(self.strides)}"
        for number, stride in enumerate(self.strides, 1):
            if stride > 1 and side < stride:
                raise ValueError(
                    f"{key}: images of {image_size} px have shrunk to {side} x {side} before stage {number}, which "
                    f"makes one pixel of {stride} on a side; set smaller ones"
                )
            if self._layer(number) == "patches" and side % stride:
                raise ValueError(
                    f"{key}: patches of {stride} pixels do not divide the side of {side} of what stage {number} sees "
                    f"of images of {image_size} px; set others, or another data.image_size"
                )
            side = -(-side // stride)
            if self.pruned and number > 2 and side == 1:
                raise ValueError(
                    f"{key}: images of {image_size} px have one token in stage {number}, and pruned = true keeps half "
                    "of them; set smaller strides"
                )

    def sides(self, image_size: int) -> list[int]:
        """Side of each stage's map, pixels."""
        sides = [image_size]
        for stride in self.strides:
            sides.append(-(-sides[-1] // stride))
        return sides[1:]

    def _layer(self, number: int) -> str:
        return self.stem if number == 1 else self.downsampling

    @property
    def hidden(self) -> tuple[int, ...]:
        """Channels inside each stage's MLPs, at full width."""
        return tuple(round(channels * self.mlp_ratio) for channels in self.channels)

    def check_width(self, width: Width) -> None:
        """Refuse a width that the heads or a layer cannot be cut to, with the nearest that they can, and a mix."""
        if isinstance(width, Mix):
            raise ValueError(
                f"mix {width}: a UniFormer has one width for all layers; a mix needs a ViT that was trained with "
                'sliced = "mlp"'
            )
        for name, size, unit in self._axes():
            if size * width.numerator % (width.denominator * unit):
                valid = tuple(Width(n, size // unit) for n in range(1, size // unit + 1))
                raise ValueError(
                    f"width {width}: {float(width):g} x {name} {size} = {size * float(width):g} is not "
                    f"{f'a multiple of heads = {unit}' if unit > 1 else 'a whole number'}; "
                    f"{slimmable.nearest(float(width), valid)}"
                )

    def _axes(self) -> Iterator[tuple[str, int, int]]:
        """(What, its size, what a width's part is a multiple of) of all that is sliced."""
        if self.stem == "convolutions":
            yield "the stem's channels", self.channels[0] // 2, 1
        for number, (channels, hidden, heads) in enumerate(
            zip(self.channels, self.hidden, (1, 1, *self.heads), strict=True), 1
        ):
            yield f"stage {number}'s channels", channels, heads
            yield f"stage {number}'s MLP", hidden, 1

    def at(self, width: Width) -> Self:
        """The standalone network at a width."""
        channels = tuple(width.of(size) for size in self.channels)
        return replace(self, variant="", channels=channels, widths=slimmable.Config())
