"""What an HSViT is: the published variants, the checks, the sizes of maps, the network at a width, multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from ..errors import counted
from . import backbone as backbones
from . import slimmable
from .slimmable import FULL, Mix, Width


@dataclass(frozen=True)
class Variant:
    kernels: tuple[int, ...]
    depth: int
    pool_strides: dict[int, tuple[int, ...]]  # by image side, pixels


_C4A8_32 = (2, 1, 2, 1)
VARIANTS = {
    "C2A2": Variant((64, 128), 2, {28: (2, 2), 32: (2, 2), 64: (4, 2), 128: (4, 4)}),
    "C3A4": Variant((64, 128, 256), 4, {28: (2, 1, 2), 32: (2, 1, 2), 64: (2, 2, 2), 128: (4, 2, 2)}),
    "C4A8": Variant((64, 128, 256, 512), 8, {28: _C4A8_32, 32: _C4A8_32, 64: (2, 2, 2, 1), 128: (2, 2, 2, 2)}),
    "ImageNet-256": Variant((32, 64, 128, 256, 512), 8, {256: (2, 2, 2, 2, 2)}),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers that an HSViT is made of, and what follows from them; a recipe's `model` is a `hsvit.Config`."""

    kind: Literal["hsvit"] = "hsvit"
    variant: str = ""
    """A published variant: C2A2, C3A4, C4A8, ImageNet-256; gives kernels, depth and pool_strides where not set."""
    kernels: tuple[int, ...] = ()
    """Output channels of each conv block (K_l); the last is the number of tokens."""
    kernel_sizes: tuple[int, ...] = ()
    """Side of each block's first convolution and of its pool, pixels; 3 each by default."""
    pool_strides: tuple[int, ...] = ()
    """Stride of each block's pool; 1 means no pool."""
    depthwise: bool = False
    """Depthwise-separable convolutions in the trunk (the paper's section 4.5); the first one, of the image, stays
    dense."""
    convolution: bool = True
    """False: the ablation without trunk and projection; colour planes of `embedding` pixels become the tokens."""
    groups: int = 16
    """Attention groups (G)."""
    depth: int = -1
    """Attention layers of each group (A); 0 is the ablation without attention, CLS and positions; -1: the variant's."""
    heads: int = 8
    """Attention heads; a divisor of `embedding`."""
    embedding: int = 0
    """Width of a token (D); 0: 64, or with a backbone the pixels of its map, rounded up to a multiple of `heads`."""
    dropout: float = 0.2
    """Probability of dropping an attention weight or an embedded feature, rounded to 1/256."""
    submodules: int = 1
    """Independent shares of the model (M); divides every K_l and G. 1 is the published model."""
    tiles: int = 1
    """Cuts images into tiles x tiles equal parts; submodule m sees the part m mod tiles², counted along the rows. A
    multiple of tiles² submodules is needed. 1: every submodule sees the whole image."""
    submodule_drop: float = 0.0
    """Probability that a submodule is absent for an image in training; at least one stays."""
    backbone: backbones.Config = field(default_factory=backbones.Config)
    widths: slimmable.Config = field(default_factory=slimmable.Config)

    def __post_init__(self) -> None:
        for name in ("groups", "heads", "submodules", "tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("dropout", "submodule_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1)")
        if self.embedding < 0:
            raise ValueError(f"embedding = {self.embedding}: must not be negative")
        if self.embedding % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide embedding = {self.embedding}")
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f'variant = "{self.variant}": must be one of {", ".join(VARIANTS)}')
        if self.submodules % self.tiles**2:
            unseen = ", ".join(map(str, range(self.submodules % self.tiles**2, self.tiles**2)))
            there = counted(self.submodules, "submodule")
            raise ValueError(
                f"tiles = {self.tiles} makes {self.tiles**2} parts, which {there} cannot "
                f"share equally ({unseen} would be seen by fewer); set submodules to a multiple of {self.tiles**2}"
            )
        if self.depthwise and not self.convolution:
            raise ValueError("depthwise = true is of the trunk's convolutions, and convolution = false leaves them out")
        if self.backbone.name:
            self._check_backbone()
        elif not self.variant and (not self.kernels or self.depth < 0):
            raise ValueError("name a variant or a backbone, or set both kernels and depth")

    def _check_backbone(self) -> None:
        set_too = [name for name in ("variant", "kernel_sizes", "pool_strides", "depthwise") if getattr(self, name)]
        set_too += ["convolution"] * (not self.convolution) + ["tiles"] * (self.tiles > 1)
        if set_too:
            raise ValueError(f"{set_too[0]} is of HSViT's own trunk; a backbone takes its place")
        if self.depth < 0:
            raise ValueError("a backbone gives no depth: set depth, the attention layers (2 in the paper)")
        if len(self.widths.all) > 1:
            raise ValueError(f"{self.widths.said}: a backbone is not sliced")

    def resolved(self, image_size: int) -> Self:
        """Fill what the variant and the image side give; refuse what cannot be divided, with the arithmetic."""
        if self.backbone.name:
            shape = backbones.shape(self.backbone, image_size, 3)
            if self.kernels not in ((), (shape.channels,)):
                raise ValueError(f"kernels = {list(self.kernels)}: those of {self.backbone.name} are {shape.channels}")
            embedding = self.embedding or -(-shape.height * shape.width // self.heads) * self.heads
            full = replace(self, kernels=(shape.channels,), embedding=embedding)
            full._check_shares()
            return full
        kernels, depth, strides = self.kernels, self.depth, self.pool_strides
        side = self.tile(image_size)
        if self.variant:
            variant = VARIANTS[self.variant]
            kernels = kernels or variant.kernels
            depth = variant.depth if depth < 0 else depth
            if not strides and len(kernels) == len(variant.kernels):
                strides = variant.pool_strides.get(side, ())
        if not self.convolution:
            strides = (1,) * len(kernels)
        if not strides:
            known = (
                f"; {self.variant} has them for {list(VARIANTS[self.variant].pool_strides)} px" if self.variant else ""
            )
            raise ValueError(f"pool_strides is not set and not known for {side} px{known}")
        full = replace(
            self,
            kernels=kernels,
            depth=depth,
            pool_strides=strides,
            kernel_sizes=self.kernel_sizes or (3,) * len(kernels),
            embedding=self.embedding or 64,
        )
        full._check(image_size)
        return full

    def _check(self, image_size: int) -> None:
        for name in ("kernel_sizes", "pool_strides"):
            if len(getattr(self, name)) != len(self.kernels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.kernels)} conv blocks "
                    f"(kernels = {list(self.kernels)})"
                )
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {list(getattr(self, name))}: each must be at least 1")
        if min(self.kernels) < 1:
            raise ValueError(f"kernels = {list(self.kernels)}: each must be at least 1")
        self._check_shares()
        if not self.convolution and self.tiles > 1:
            raise ValueError(f"tiles = {self.tiles}: there are no convolutions (convolution = false) to see them")
        if not self.convolution and image_size**2 != self.embedding:
            raise ValueError(
                f"convolution = false needs images of embedding = {self.embedding} pixels; "
                f"{image_size} x {image_size} = {image_size**2}"
            )

    def _check_shares(self) -> None:
        if self.widths.slice == "heads":
            raise ValueError(
                'widths.slice = "heads" is for a ViT; the widths of an HSViT take whole attention groups, as its ranks '
                'do, with all their heads; leave it "channels"'
            )
        if self.embedding % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide embedding = {self.embedding}")
        if self.groups % self.submodules:
            raise ValueError(f"submodules = {self.submodules} does not divide groups = {self.groups}")
        for kernels in self.kernels:
            if kernels % self.submodules:
                raise ValueError(f"submodules = {self.submodules} does not divide kernels {kernels}")
        if self.kernels[-1] % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide the {self.kernels[-1]} kernels of the last block")
        for width in self.widths.all:
            self.check_width(width)

    def check_width(self, width: Width) -> None:
        """Refuse a width that the groups or a block's kernels cannot be cut to, with the nearest that they can."""
        if isinstance(width, Mix):
            raise ValueError(
                f"mix {width}: an HSViT has one width for all layers; a mix needs a ViT that was trained with "
                'sliced = "mlp"'
            )
        if not self.convolution and not width.is_full:
            raise ValueError(f"width {width}: without convolutions (convolution = false) there is nothing to slice")
        for name, size in (("groups", self.groups), *(("kernels", k) for k in self.kernels)):
            share = size // self.submodules
            if share * width.numerator % width.denominator:
                valid = tuple(Width(n, share) for n in range(1, share + 1))
                raise ValueError(
                    f"width {width}: {float(width):g} x {share} {name} of a submodule = {share * float(width):g} is "
                    f"not a whole number; {slimmable.nearest(float(width), valid)}"
                )

    def at(self, width: Width) -> Self:
        """The standalone network at a width."""
        kernels = tuple(width.of(k) for k in self.kernels)
        backbone, widths = replace(self.backbone, weights=""), slimmable.Config()
        return replace(
            self, variant="", kernels=kernels, groups=width.of(self.groups), backbone=backbone, widths=widths
        )

    @property
    def splits_images(self) -> bool:
        """Whether the ranks of a replica each compute a share of its images: those of a backbone."""
        return self.backbone.name != ""

    @property
    def tokens(self) -> int:
        """Of a group, with CLS (T), of a resolved architecture."""
        return self.kernels[-1] // self.groups + 1

    def features(self, image_size: int) -> int:
        """Pixels of the last map (f)."""
        if self.backbone.name:
            shape = backbones.shape(self.backbone, image_size, 3)
            return shape.height * shape.width
        return self.map_sides(image_size)[-1] ** 2

    def tile(self, image_size: int) -> int:
        """Side of what a submodule sees of an image, pixels.

        Raises:
            ValueError: pixels would belong to no tile.
        """
        side, rest = divmod(image_size, self.tiles)
        if rest:
            raise ValueError(
                f"tiles = {self.tiles} does not divide images of {image_size} px: the last "
                f"{counted(rest, 'row')} and {counted(rest, 'column')} would belong to no tile"
            )
        return side

    def map_sides(self, image_size: int) -> list[int]:
        """Side of the maps that leave each conv block, by the pools' real output (they round up, not down)."""
        sides, side = [], self.tile(image_size)
        for kernel, stride in zip(self.kernel_sizes, self.pool_strides, strict=True):
            side = _output(side, kernel, 1)
            side = _output(side, kernel, stride) if stride > 1 else side
            sides.append(side)
        return sides

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward; BN, LN, softmax, pooling and additions not counted.

        The published architecture's closed form, whose FLOPs are two a multiply-add. The last attention layer is
        counted for all tokens although only CLS leaves it and only CLS is computed.
        """
        c = self.resolved(image_size).at(width)
        m, total, c_in, side = c.submodules, 0, channels, c.tile(image_size)
        if c.backbone.name:
            total += backbones.shape(c.backbone, image_size, channels).macs
        elif c.convolution:
            outs = c.map_sides(image_size)
            for block, (c_out, kernel) in enumerate(zip(c.kernels, c.kernel_sizes, strict=True)):
                side = _output(side, kernel, 1)
                total += side * side * _weights(c_in, c_out, kernel, m, block == 0, c.depthwise)
                c_in, side = c_out, outs[block]
        if c.convolution:
            total += c.kernels[-1] * c.features(image_size) * c.embedding
        n, d = c.tokens, c.embedding
        total += c.groups * c.depth * (4 * n * d**2 + 2 * n**2 * d)
        return total + d * classes


def _weights(c_in: int, c_out: int, kernel: int, submodules: int, first: bool, depthwise: bool) -> int:
    """Numbers in the convolutions of a block, of which each is used once a pixel."""
    if not depthwise:
        fan_in = c_in if first else c_in // submodules
        return kernel**2 * fan_in * c_out + 9 * c_out // submodules * c_out
    before = kernel**2 * c_in * c_out if first else c_in * (kernel**2 + c_out // submodules)
    return before + c_out * (9 + c_out // submodules)


def _output(side: int, kernel: int, stride: int) -> int:
    return (side + 2 * (kernel // 2) - kernel) // stride + 1
