"""What a ViT is: the published variants, the checks, the network at a width, multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from ..errors import counted
from . import slimmable
from .network import OneRank
from .slimmable import FULL, Mix, Width


@dataclass(frozen=True)
class Variant:
    embedding: int
    heads: int


VARIANTS = {"DeiT-Ti": Variant(192, 3), "DeiT-S": Variant(384, 6), "DeiT-B": Variant(768, 12)}


@dataclass(frozen=True, kw_only=True)
class Architecture(OneRank):
    """The numbers that a ViT is made of, and what follows from them; a recipe's `model` is a `vit.Config`."""

    kind: Literal["vit"] = "vit"
    variant: str = ""
    """A published variant: DeiT-Ti, DeiT-S, DeiT-B; gives embedding and heads where not set."""
    embedding: int = 0
    """Width of a token at full width (d); 0: the variant's."""
    heads: int = 0
    """Attention heads, of every width unless `widths.slice` is "heads"; 0: the variant's."""
    depth: int = 12
    """Blocks."""
    mlp_ratio: float | tuple[float, ...] = 4.0
    """Hidden features of an MLP over `embedding`; a list: of each block's."""
    patch_size: int = 16
    """Side of a patch, pixels; divides the image's."""
    distilled: bool = False
    """A distillation token with a head of its own, which learns from the teacher; answers are the mean of both."""
    drop_path: float = 0.0
    """Probability of skipping a branch for an image in training, from 0 linearly to this at the last block."""
    layer_scale: float = 0.0
    """First value of LayerScale's factors (CaiT, arXiv 2103.17239); 0: none."""
    qkv: str = "per_role"
    """"per_role": q, k, v and every head are sliced one by one, so each keeps its role and each subnet is an ordinary
    ViT; "fused": the three as one block, as in the published Scala code, where rows trade roles between widths."""
    softmax_scale: str = "head"
    """1 / sqrt of the head width at the "head"'s width, or of the "full" network's at every width, as published."""
    norm_eps: float = 1e-6
    """Of every LayerNorm: 1e-6 as in timm; the published Scala code computes with 1e-5."""
    sliced: str = "all"
    """"all" layers, or only the hidden features of each "mlp" (MatFormer, arXiv 2310.07707)."""
    widths: slimmable.Config = field(default_factory=slimmable.Config)

    def __post_init__(self) -> None:
        choices = {"qkv": ("per_role", "fused"), "softmax_scale": ("head", "full"), "sliced": ("all", "mlp")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f'variant = "{self.variant}": must be one of {", ".join(VARIANTS)}')
        if not self.variant and not (self.embedding and self.heads):
            raise ValueError("name a variant, or set both embedding and heads")
        for name in ("depth", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("embedding", "heads", "layer_scale", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        self._check_ratios()
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path = {self.drop_path}: must be in [0, 1)")
        if self.slices_heads:
            self._check_heads()

    def _check_ratios(self) -> None:
        if min(self._ratios, default=0.0) <= 0:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: must be above 0")
        if len(self._ratios) != self.depth:
            raise ValueError(
                f"mlp_ratio = {list(self._ratios)} has {counted(len(self._ratios), 'number')} for depth = "
                f"{self.depth}; give one a block, or one for all"
            )

    @property
    def _ratios(self) -> tuple[float, ...]:
        each = self.mlp_ratio
        return (each,) * self.depth if isinstance(each, float | int) else each

    def _check_heads(self) -> None:
        if self.qkv == "fused":
            raise ValueError(
                'qkv = "fused" slices q, k and v as one block, where a width has no whole heads, which '
                'widths.slice = "heads" takes; set qkv = "per_role"'
            )
        if self.sliced == "mlp":
            raise ValueError(
                'sliced = "mlp" slices MLPs alone, which have no heads for widths.slice = "heads"; set sliced = "all"'
            )

    @property
    def slices_heads(self) -> bool:
        """Whether a width has fewer heads of their full width, instead of narrower ones."""
        return self.widths.slice == "heads"

    @property
    def hidden(self) -> tuple[int, ...]:
        """Features inside each block's MLP, at full width."""
        return tuple(round(self.embedding * ratio) for ratio in self._ratios)

    @property
    def special_tokens(self) -> int:
        return 2 if self.distilled else 1

    def resolved(self, image_size: int) -> Self:
        """Fill what the variant gives; refuse what cannot be divided, with the arithmetic."""
        full = self
        if self.variant:
            variant = VARIANTS[self.variant]
            full = replace(self, embedding=self.embedding or variant.embedding, heads=self.heads or variant.heads)
        if full.embedding % full.heads:
            raise ValueError(f"heads = {full.heads} does not divide embedding = {full.embedding}")
        if image_size % full.patch_size:
            raise ValueError(f"patch_size = {full.patch_size} does not divide the images' side of {image_size} pixels")
        for width in full.widths.all:
            full.check_width(width)
        return full

    def check_width(self, width: Width) -> None:
        """Refuse a width that the heads or a layer cannot be cut to, with the nearest that they can, and a mix that the
        blocks cannot have."""
        if isinstance(width, Mix):
            self._check_mix(width)
        parts = [("MLP", size, 1, width.layer(number)) for number, size in enumerate(self.hidden)]
        if self.slices_heads:
            parts.insert(0, ("heads", self.heads, 1, width))
        elif self.sliced == "all":
            parts.insert(0, ("embedding", self.embedding, self.heads, width))
        for name, size, unit, own in dict.fromkeys(parts):
            if size * own.numerator % (own.denominator * unit):
                valid = tuple(Width(n, size // unit) for n in range(1, size // unit + 1))
                raise ValueError(
                    f"width {own}: {float(own):g} x {name} {size} = {size * float(own):g} is not "
                    f"{f'a multiple of heads = {unit}' if unit > 1 else 'a whole number'}; "
                    f"{slimmable.nearest(float(own), valid)}"
                )

    def _check_mix(self, mix: Mix) -> None:
        if self.sliced != "mlp":
            raise ValueError(
                f'mix {mix}: sliced = "{self.sliced}" slices what blocks hand on, which would not fit from one width '
                'to another; a mix needs a network that was trained with sliced = "mlp"'
            )
        if len(mix.layers) != self.depth:
            raise ValueError(
                f"mix {mix} has {counted(len(mix.layers), 'width')} for {counted(self.depth, 'block')}; give one a "
                "block"
            )

    def at(self, width: Width) -> Self:
        """The standalone network at a width: an ordinary ViT; at a mix each block has its own `mlp_ratio`."""
        outer = width if self.sliced == "all" else FULL
        embedding = outer.of(self.embedding)
        ratios = tuple(width.layer(number).of(size) / embedding for number, size in enumerate(self.hidden))
        return replace(
            self,
            variant="",
            embedding=embedding,
            heads=width.of(self.heads) if self.slices_heads else self.heads,
            mlp_ratio=ratios if len(set(ratios)) > 1 else ratios[0],
            softmax_scale="head",
            sliced="all",
            widths=slimmable.Config(),
        )

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward (Scala's GFLOPs); norms, softmax, GELU and additions not counted. The
        last block is counted for all tokens, although only the special ones are computed there."""
        c = self.resolved(image_size).at(width)
        patches = (image_size // c.patch_size) ** 2
        tokens, d = patches + c.special_tokens, c.embedding
        blocks = c.depth * (4 * tokens * d * d + 2 * tokens**2 * d) + 2 * tokens * d * sum(c.hidden)
        return patches * channels * c.patch_size**2 * d + blocks + c.special_tokens * d * classes
