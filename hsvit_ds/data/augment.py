"""What happens to images: one by one in the workers (`transform.py` follows this Config), then together on the device.

On the device: crop, flip and colours where the workers leave them to it, normalisation, shifts, erasing, mixup and
cutmix over fixed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_kernels.random import Draw, Site, uniform

from ..spans import Part, spanned
from .batch import Batch
from .sets import Facts

CROPS = ("none", "resize", "random_resized")
FILTERS = ("bilinear", "bicubic")
# Of torchvision; any other policy is one of timm's strings.
POLICIES = ("RandAugment", "TrivialAugmentWide")

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # HSViT on small data sets (trainers/hsvit.py of its code).
    "hsvit": {"crop": "resize", "policy": "RandAugment", "filter": "bilinear", "mixup": 1.0, "cutmix": 1.0},
    # HSViT on ImageNet, behind a backbone (trainers/hsvit_het.py).
    "hsvit_imagenet": {
        "crop": "random_resized",
        "filter": "bilinear",
        "flip": 0.5,
        "policy": "TrivialAugmentWide",
        "erase": 0.1,
        "erase_with": "zeros",
        "mixup": 0.2,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    },
    # DeiT (Touvron et al., arXiv 2012.12877, table 9).
    "deit": {
        "crop": "random_resized",
        "flip": 0.5,
        "policy": "rand-m9-mstd0.5-inc1",
        "erase": 0.25,
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "eval_crop": 0.875,
    },
    # DeiT III with 3-Augment (Touvron et al., arXiv 2204.07118, table 1).
    "deit3": {
        "crop": "random_resized",
        "flip": 0.5,
        "policy": "3a",
        "colour_jitter": 0.3,
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
        "eval_crop": 1.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    preset: str = "none"
    """A published recipe, whose keys stand where this table does not set them: "hsvit", "hsvit_imagenet", "deit" or
    "deit3"."""
    crop: str = "none"
    """"random_resized": a random part of the image, of `crop_scale` of its area; "resize": the whole image, its aspect
    ratio not kept; "none": as in evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the area; the aspect ratio is drawn from 3/4 to 4/3 (Szegedy et al., arXiv
    1409.4842)."""
    filter: str = "bicubic"
    """Of resizing, antialiased: "bilinear" or "bicubic"."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    policy: str = ""
    """"RandAugment" (2 operations, magnitude 9) or "TrivialAugmentWide" of torchvision, or timm's strings, such as
    "rand-m9-mstd0.5-inc1" or "3a" (3-Augment)."""
    colour_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: float = 0.0
    """Probability that a box of 2 to 33 % of the area is erased (Zhong et al., arXiv 1708.04896)."""
    erase_with: str = "noise"
    """What is put there: "noise" (normal, by pixel) or "zeros"."""
    repeats: int = 1
    """Repeated augmentation: times that an image stands in a global batch, each time augmented anew (Hoffer et al.,
    arXiv 1901.09335)."""
    canvas: int = 0
    """Crop, flip, colours and normalisation are computed on the device, in one function that is compiled for GPUs, from
    images that the workers resized to a square of this side; 0: by the workers, from the whole image."""
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
    eval_crop: float = 0.0
    """Evaluation: the shorter side is resized to the image size divided by this, and the centre cut out; 0: the whole
    image is resized to a square, its aspect ratio not kept (as HSViT's code does)."""

    def __post_init__(self) -> None:
        for name, allowed in {
            "preset": tuple(PRESETS),
            "crop": CROPS,
            "filter": FILTERS,
            "erase_with": ("noise", "zeros"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        for name in ("shift", "mixup", "cutmix", "canvas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        for name in ("mix_block", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("mix_probability", "label_smoothing", "flip", "erase", "colour_jitter", "eval_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale = {list(self.crop_scale)}: must be two shares in (0, 1], the smaller first")
        if self.canvas and self.policy:
            raise ValueError(f'canvas = {self.canvas}: policy = "{self.policy}" is computed by the workers only')
        _check_policy(self.policy)

    @property
    def mixes(self) -> bool:
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def random_keys(self) -> tuple[str, ...]:
        """The keys set that show an image in a new way every time."""
        found = [k for k in ("flip", "policy", "colour_jitter", "erase", "shift") if getattr(self, k)]
        found += [k for k in ("mixup", "cutmix") if self.mixes and getattr(self, k)]
        return (*found, "crop") if self.crop == "random_resized" else tuple(found)

    @property
    def needs_workers(self) -> tuple[str, ...]:
        """The keys set that workers alone can compute, from an image's file, anew each time."""
        found = tuple(k for k in ("policy", "colour_jitter") if getattr(self, k))
        found += ("crop",) if self.crop == "random_resized" else ()
        return () if self.canvas else found

    @property
    def needs_files(self) -> tuple[str, ...]:
        """The keys set that workers compute, from image files."""
        return tuple(k for k in ("flip", "policy", "colour_jitter", "canvas") if getattr(self, k)) + (
            ("crop",) if self.crop != "none" else ()
        )


def _check_policy(policy: str) -> None:
    """Refuse a name that is neither torchvision's nor of timm's kinds; timm itself takes seconds to import."""
    if policy and policy not in POLICIES and not policy.startswith(("rand-", "augmix-", "original", "v0", "3a")):
        raise ValueError(
            f'policy = "{policy}": must be {", ".join(POLICIES)}, or a string of timm\'s: rand-m9-mstd0.5-inc1, 3a, '
            "augmix-m5-w4-d2, original, v0"
        )


# What a worker leaves to the device, a row an image: top, left, height and width of the crop as shares of the image, 1
# for a flip, and the factors of brightness, contrast and saturation.
VIEW = 8


def _cut_out(canvas: Tensor, views: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, K, K] and views [B, 8] to normalised fp32 [B, C, size, size]: crop, flip, colours."""
    top, left, height, width, flip = views[:, :5].unbind(1)
    across = width * (1 - 2 * flip)
    zero = torch.zeros_like(top)
    # From [-1, 1] of the view to [-1, 1] of the canvas.
    rows = torch.stack((across, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(views), canvas.shape[1], size, size], align_corners=False)
    x = F.grid_sample(canvas.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    brightness, contrast, saturation = views[:, 5:].view(-1, 3, 1, 1, 1).unbind(1)
    x = (x * brightness).clamp(0, 255)
    mean_grey = grey(x).mean((2, 3), keepdim=True)
    x = (mean_grey + (x - mean_grey) * contrast).clamp(0, 255)
    greys = grey(x)
    x = (greys + (x - greys) * saturation).clamp(0, 255)
    return (x - mean) / std


def grey(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 1, H, W], by the weights of ITU-R 601-2; of one channel itself."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return red * 0.299 + green * 0.587 + blue * 0.114


@cache
def _compiled_cut_out() -> Any:
    return torch.compile(_cut_out, dynamic=False)


def cut_out(canvas: Tensor, views: Tensor, size: int, facts: Facts) -> Tensor:
    """`_cut_out`, compiled on GPUs."""
    mean = _by_channel([255 * m for m in facts.mean], canvas.device)
    std = _by_channel([255 * s for s in facts.std], canvas.device)
    function = _compiled_cut_out() if canvas.device.type == "cuda" else _cut_out
    return function(canvas, views, size, mean, std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, C, H, W] to fp32, (x / 255 - mean) / std for each channel."""
    scale = _by_channel([1 / (255 * s) for s in std], images.device)
    shift = _by_channel([m / s for m, s in zip(mean, std, strict=True)], images.device)
    # In place: on a CPU new memory for every operation takes three times as long as the arithmetic.
    return images.float().mul_(scale).sub_(shift)


def _by_channel(numbers: Sequence[float], device: torch.device) -> Tensor:
    return _sent(torch.tensor(numbers), device).view(1, -1, 1, 1)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it. Some kilobytes at most: with more the driver waits for all work so far."""
    return numbers.to(device, non_blocking=True)


def shift(images: Tensor, draw: Draw, largest: int) -> Tensor:
    """Move each image [B, C, H, W] by up to `largest` pixels along each axis; uncovered pixels become 0."""
    side = 2 * largest + 1
    luck = _sent(draw.uniform(Site.AUGMENT, torch.arange(2, dtype=torch.int32)), images.device)
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
    from scipy.special import betaincinv  # here, as many a command mixes nothing

    ratio = torch.as_tensor(betaincinv(alpha.numpy(), alpha.numpy(), luck[:, 2].numpy()))
    ratio = torch.where(luck[:, 0] < config.mix_probability, ratio, 1.0)
    height, width = images.shape[2:]
    sides = _cut_box(ratio, luck[:, 3:], height, width)  # [blocks, 4]: top, bottom, left, right
    area = ((sides[:, 1] - sides[:, 0]) * (sides[:, 3] - sides[:, 2])).double()
    share = torch.where(cuts, 1 - area / (height * width), ratio)
    numbers = torch.cat((sides, cuts[:, None], share[:, None]), 1).float()
    sides, cut, share = _sent(numbers, images.device).split((4, 1, 1), 1)
    # [blocks, 1, 1, H, W]: the share of the sample itself in every pixel
    share = share.view(-1, 1, 1)
    pixel = torch.where(cut.view(-1, 1, 1) > 0, 1 - _boxes(sides, height, width).float(), share)[:, None, None]
    x, y = images.unflatten(0, (blocks, block)), soft.unflatten(0, (blocks, block))
    x = x * pixel + x.flip(1) * (1 - pixel)
    y = y * share + y.flip(1) * (1 - share)
    return x.flatten(0, 1), y.flatten(0, 1)


def _cut_box(ratio: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """int64 [blocks, 4]: top, bottom, left, right of a box of area 1 - ratio around `centre` [blocks, 2], cut at the
    border."""
    sides = []
    for axis, side in enumerate((height, width)):
        half = ((1 - ratio).sqrt() * side).floor().long() // 2
        middle = (centre[:, axis] * side).long()
        sides += [(middle - half).clamp(0, side), (middle + half).clamp(0, side)]
    return torch.stack(sides, 1)


def _boxes(sides: Tensor, height: int, width: int) -> Tensor:
    """bool [n, H, W]: what is inside of boxes [n, 4]: top, bottom, left, right."""
    top, bottom, left, right = sides[:, :, None].unbind(1)
    row, column = torch.arange(height, device=sides.device), torch.arange(width, device=sides.device)
    return ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]


def erase(images: Tensor, draw: Draw, config: Config) -> Tensor:
    """Put noise or zeros into a random box of some of the normalised images [B, C, H, W]; in place.

    A box has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3; one that does not fit is cut at the border.
    """
    luck = draw.uniform(Site.ERASING, torch.arange(5, dtype=torch.int32))  # [B, 5], on the CPU
    height, width = images.shape[2:]
    area = height * width * (0.02 + luck[:, 1] * (1 / 3 - 0.02))
    ratio = torch.exp((2 * luck[:, 2] - 1) * math.log(1 / 0.3))
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (luck[:, 3] * (height - tall + 1)).floor(), (luck[:, 4] * (width - wide + 1)).floor()
    tall = torch.where(luck[:, 0] < config.erase, tall, 0)
    sides = _sent(torch.stack((top, top + tall, left, left + wide), 1), images.device)
    box = _boxes(sides, height, width)[:, None]
    if config.erase_with == "zeros":
        return images.masked_fill_(box, 0)
    here = Draw(_sent(draw.key, images.device), _sent(draw.image, images.device))
    pixels = torch.arange(images[0].numel(), dtype=torch.int32, device=images.device).view(images.shape[1:])
    first, second, *_ = here.words(Site.ERASING, pixels + 8)
    noise = (-2 * uniform(first).log()).sqrt() * torch.cos(2 * math.pi * uniform(second))  # Box and Muller
    return torch.where(box, noise, images)


def pixels(batch: Batch, config: Config, facts: Facts) -> Tensor:
    """A training batch's normalised images, fp32 [B, C, H, W], as the workers augmented them."""
    if config.canvas:
        return cut_out(batch.images, batch.views, facts.image_size, facts)
    return normalise(batch.images, facts.mean, facts.std)


@spanned(Part.AUGMENTATION)
def prepare(batch: Batch, config: Config, facts: Facts) -> tuple[Tensor, Tensor]:
    """A training batch to (images fp32 [B, C, H, W], targets fp32 [B, Q]), augmented, on its device."""
    images = pixels(batch, config, facts)
    soft = targets(batch.labels, facts.classes, config.label_smoothing)
    draw = batch.draw(0)
    if config.shift:
        images = shift(images, draw, config.shift)
    if config.erase:
        images = erase(images, draw, config)
    return mix(images, soft, draw, config) if config.mixes else (images, soft)
