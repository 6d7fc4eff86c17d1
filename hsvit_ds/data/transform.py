"""One image file to one uint8 tensor, in a worker: cropped, flipped and augmented, keyed on (seed, epoch, sample)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hsvit_kernels.random import Site, key

from . import augment
from .augment import VIEW
from .decode import BadImageError, Box, Picture, check_size

_RATIO = (math.log(3 / 4), math.log(4 / 3))


class Transform:
    """What `augment` asks of the workers.

    Args:
        size: side of the images that the model takes. decoder: see `decode.installed`. seed: of the run. channels: C,
        3 or 1. convert: where C is 1, take an image in colours by its luminance; otherwise it is bad.
    """

    def __init__(
        self, config: augment.Config, size: int, decoder: str, seed: int, channels: int = 3, convert: bool = False
    ) -> None:
        self.config, self.size, self.decoder, self.seed = config, size, decoder, seed
        self.channels, self.convert = channels, convert

    def training(self, data: bytes, epoch: int, sample: int, copy: int) -> tuple[Tensor, list[float]]:
        """(uint8 [C, S, S], its view: empty unless the device is to cut it out). Everything random is drawn from
        Python's, NumPy's and PyTorch's generators, which are set here: see `own_generators`.

        Raises:
            BadImageError: it cannot be read.
        """
        c = self.config
        high, low = self._seed(epoch, sample, copy)
        picture = self._picture(data)
        if c.canvas:
            return self._whole(picture), self._view(picture.height, picture.width)
        box = self._crop(picture.height, picture.width)
        flip = random.random() < c.flip
        x = self._whole(picture) if c.crop != "random_resized" else self._resized(picture, box)
        x = x.flip(2) if flip else x
        if self._policies:
            np.random.seed(low)
            torch.manual_seed(high << 32 | low)
            # Of one channel an image of mode L, as torchvision and timm expect it.
            image = Image.fromarray((x.permute(1, 2, 0) if len(x) > 1 else x[0]).numpy())
            for policy in self._policies:
                image = policy(image)
            x = torch.from_numpy(np.array(image)).view(self.size, self.size, -1).permute(2, 0, 1)
        return x, []

    def same(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        """(uint8 [C, S, S], height and width of the image): what of a training image is the same every time, where only
        a `view` of it is random.

        Raises:
            BadImageError: it cannot be read.
        """
        picture = self._picture(data)
        return self._whole(picture), (picture.height, picture.width)

    def view(self, size: tuple[int, int], epoch: int, sample: int, copy: int) -> list[float]:
        """What `training` would cut out of an image of this height and width: see `augment.VIEW`."""
        self._seed(epoch, sample, copy)
        return self._view(*size)

    def held_out(self, data: bytes) -> Tensor:
        """uint8 [C, S, S] for evaluation: see `augment.Config.eval_crop`.

        Raises:
            BadImageError: it cannot be read.
        """
        return self._centred(self._picture(data))

    def _picture(self, data: bytes) -> Picture:
        picture = Picture(data, self.decoder, self.channels)
        if self.channels == 1 and not picture.is_grey and not self.convert:
            raise BadImageError("three channels, in a set of one")
        return picture

    def _seed(self, epoch: int, sample: int, copy: int) -> tuple[int, int]:
        high, low = key(self.seed, int(Site.AUGMENT), epoch, sample, copy)
        random.seed(high << 32 | low)
        return high, low

    def _whole(self, picture: Picture) -> Tensor:
        """All of a training image, as the device or a flip takes it."""
        if not self.config.canvas and self.config.crop == "none":
            return self._centred(picture)
        return self._resized(picture, Box(0, 0, picture.height, picture.width))

    def _resized(self, picture: Picture, box: Box) -> Tensor:
        side = self.config.canvas or self.size
        return _resized(picture.pixels(box, side), (side, side), self.config.filter)

    def _centred(self, picture: Picture) -> Tensor:
        share, size = self.config.eval_crop, self.size
        height, width = picture.height, picture.width
        if not share:
            return _resized(picture.pixels(Box(0, 0, height, width), size), (size, size), self.config.filter)
        shorter = round(size / share)
        scale = shorter / min(height, width)
        resized = (round(height * scale), round(width * scale))
        check_size(*resized)  # of 1 x 60,000 pixels four billion would become
        x = _resized(picture.pixels(Box(0, 0, height, width), shorter), resized, self.config.filter)
        top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
        return x[:, top : top + size, left : left + size]

    def _crop(self, height: int, width: int) -> Box:
        """A random part of the image; after ten that do not fit, the largest of a permitted aspect ratio."""
        if self.config.crop != "random_resized":
            return Box(0, 0, height, width)
        for _ in range(10):
            area = height * width * random.uniform(*self.config.crop_scale)
            ratio = math.exp(random.uniform(*_RATIO))
            tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < tall <= height and 0 < wide <= width:
                return Box(random.randint(0, height - tall), random.randint(0, width - wide), tall, wide)
        low, high = (math.exp(ratio) for ratio in _RATIO)
        tall, wide = min(height, round(width / low)), min(width, round(height * high))
        return Box((height - tall) // 2, (width - wide) // 2, tall, wide)

    def _view(self, height: int, width: int) -> list[float]:
        box = self._crop(height, width)
        flip = random.random() < self.config.flip
        most = self.config.colour_jitter
        colours = [random.uniform(1 - most, 1 + most) for _ in range(3)]
        view = [box.top / height, box.left / width, box.height / height, box.width / width, float(flip), *colours]
        assert len(view) == VIEW
        return view

    @property
    def modules(self) -> list[str]:
        """What `training` imports when it is first called."""
        is_timms = self.config.policy not in ("", *augment.POLICIES)
        is_torchvisions = self.config.policy in augment.POLICIES or self.config.colour_jitter
        return (["timm.data.auto_augment"] if is_timms else []) + (
            ["torchvision.transforms"] if is_torchvisions else []
        )

    @cached_property
    def _policies(self) -> list[Any]:
        """Functions of a Pillow image. Imported where they are used: timm takes 6 s."""
        c = self.config
        found: list[Any] = []
        if c.policy in augment.POLICIES:
            from torchvision import transforms

            mode = transforms.InterpolationMode.BILINEAR
            found.append(getattr(transforms, c.policy)(interpolation=mode))
        elif c.policy:
            from timm.data.auto_augment import (
                augment_and_mix_transform,
                auto_augment_transform,
                rand_augment_transform,
            )

            filter_ = Image.Resampling[c.filter.upper()]
            kind = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}
            make = kind.get(c.policy[:4], auto_augment_transform)
            # What uncovered pixels become: ImageNet's mean colour, or its luminance.
            mean = (124, 116, 104) if self.channels == 3 else 117
            hparams = {"translate_const": int(self.size * 0.45), "img_mean": mean, "interpolation": filter_}
            found.append(make(c.policy, hparams))
        if c.colour_jitter:
            from torchvision import transforms

            found.append(transforms.ColorJitter(*[c.colour_jitter] * 3))
        return found


def _resized(image: np.ndarray, size: tuple[int, int], filter_: str) -> Tensor:
    """uint8 [H, W, C] to uint8 [C, *size], antialiased. PyTorch's own is two to three times as fast as Pillow's."""
    x = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)
    if x.shape[1:] == size:
        return x
    return F.interpolate(x[None], size, mode=filter_, antialias=True)[0]


@contextmanager
def own_generators() -> Iterator[None]:
    """Leave Python's, NumPy's and PyTorch's generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
