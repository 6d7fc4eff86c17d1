"""What happens to images on the device: normalisation, shifts, mixup and cutmix over fixed blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from hsvit_kernels.random import Draw, Site

from .reader import Batch, Facts


@dataclass(frozen=True, kw_only=True)
class Config:
    shift: int = 0
    """Largest random shift in each direction, pixels; the border is filled with zeros."""
    mixup: float = 0.0
    """alpha of mixup's Beta(alpha, alpha); 0 switches it off (Zhang et al., arXiv 1710.09412)."""
    cutmix: float = 0.0
    """alpha of cutmix's Beta(alpha, alpha); 0 switches it off (Yun et al., arXiv 1905.04899)."""
    mix_probability: float = 1.0
    """Probability that a block is mixed; where both are on, half of these by cutmix."""
    mix_block: int = 8
    """Consecutive samples of the global batch among which partners are chosen; divides the micro batch."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name in ("shift", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.mix_block < 1:
            raise ValueError(f"mix_block = {self.mix_block}: must be at least 1")
        for name in ("mix_probability", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")

    @property
    def mixes(self) -> bool:
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, C, H, W] to fp32, (x / 255 - mean) / std for each channel."""
    shape = (1, -1, 1, 1)
    scale = torch.tensor([255 * s for s in std], device=images.device).view(shape)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.float() / scale - shift.view(shape)


def shift(images: Tensor, draw: Draw, largest: int) -> Tensor:
    """Move each image [B, C, H, W] by up to `largest` pixels along each axis; uncovered pixels become 0."""
    side = 2 * largest + 1
    luck = draw.uniform(Site.AUGMENT, torch.arange(2, dtype=torch.int32)).to(images.device)
    moves = (luck * side).long()  # [B, 2] in [0, 2 largest]
    height, width = images.shape[2:]
    padded = F.pad(images, (largest,) * 4)
    rows = torch.arange(height, device=images.device) + moves[:, :1]
    columns = torch.arange(width, device=images.device) + moves[:, 1:]
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 [B] to fp32 [B, classes]; each row sums to 1."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(images: Tensor, soft: Tensor, draw: Draw, config: Config) -> tuple[Tensor, Tensor]:
    """mixup or cutmix of images [B, C, H, W] and targets [B, Q], a block at a time.

    A block of `mix_block` samples is mixed with itself in reverse order, with one ratio and one box: the partner of a
    sample depends on the global batch only. `draw` is on the CPU, keyed on the pass, and its blocks by their first
    image.
    """
    block = config.mix_block
    blocks = len(images) // block
    first = Draw(draw.key, draw.image[::block])
    luck = first.uniform(Site.MIXING, torch.arange(5, dtype=torch.int32)).double()  # [blocks, 5]
    cuts = torch.full((blocks,), config.cutmix > 0)
    if config.mixup and config.cutmix:
        cuts = luck[:, 1] < 0.5
    alpha = torch.where(cuts, config.cutmix, config.mixup).double()
    ratio = torch.as_tensor(betaincinv(alpha.numpy(), alpha.numpy(), luck[:, 2].numpy()))
    ratio = torch.where(luck[:, 0] < config.mix_probability, ratio, 1.0)
    height, width = images.shape[2:]
    box = _boxes(ratio, luck[:, 3:], height, width) & cuts.view(-1, 1, 1)
    ratio = torch.where(cuts, 1 - box.double().mean((1, 2)), ratio)
    # [blocks, 1, 1, H, W]: the share of the sample itself in every pixel
    pixel = torch.where(cuts.view(-1, 1, 1), 1 - box.float(), ratio.float().view(-1, 1, 1))
    pixel = pixel[:, None, None].to(images.device)
    share = ratio.float().view(-1, 1, 1).to(images.device)
    x, y = images.unflatten(0, (blocks, block)), soft.unflatten(0, (blocks, block))
    x = x * pixel + x.flip(1) * (1 - pixel)
    y = y * share + y.flip(1) * (1 - share)
    return x.flatten(0, 1), y.flatten(0, 1)


def _boxes(ratio: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """bool [blocks, H, W]: a box of area 1 - ratio around `centre` [blocks, 2], cut at the border."""
    inside = []
    for axis, side in enumerate((height, width)):
        half = ((1 - ratio).sqrt() * side).floor().long() // 2
        middle = (centre[:, axis] * side).long()
        pixel = torch.arange(side)
        inside.append((pixel >= (middle - half)[:, None]) & (pixel < (middle + half)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def prepare(batch: Batch, config: Config, facts: Facts) -> tuple[Tensor, Tensor]:
    """A training batch to (images fp32 [B, C, H, W], targets fp32 [B, Q]), augmented, on its device."""
    images = normalise(batch.images, facts.mean, facts.std)
    soft = targets(batch.labels, facts.classes, config.label_smoothing)
    draw = batch.draw(0)
    if config.shift:
        images = shift(images, draw, config.shift)
    return mix(images, soft, draw, config) if config.mixes else (images, soft)
