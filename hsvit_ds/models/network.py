"""What every model here has in common: timm's names, randomness for plain loops, and inputs that are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsvit_kernels.random import Draw

from . import slimmable
from .slimmable import FULL, Ratio, Width

AnyWidth = Width | float | Sequence[Ratio]
"""As a forward takes it."""


def any_seed() -> int:
    """Of new weights: from PyTorch's generator, so that `torch.manual_seed` repeats them."""
    return int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))


class Network(nn.Module):
    """A classifier of square images.

    Args:
        config: its own; resolved. image_size: side of the images, pixels. channels: of an image. classes: Q.
    """

    keyed = False
    """Whether an engine gives every pass its draw; then none is made up here."""

    def __init__(self, config: Any, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.channels, self.classes = image_size, channels, classes

    @property
    def num_classes(self) -> int:
        return self.classes

    def width(self, width: AnyWidth) -> Width:
        """One of the model's widths by its ratio, as 0.5, or the mix of one for each layer, as [0.5, 1]; another Width
        stays, if the model can be cut to it.

        Raises:
            ValueError: not one of them, with the nearest, or a mix that the model has not.
        """
        widths: slimmable.Config = self.config.widths
        if isinstance(width, Width):
            found = width
        else:
            found = widths.mix(width) if isinstance(width, list | tuple) else widths.find(width)  # type: ignore[arg-type]
        if found is not FULL:
            self.config.check_width(found)
        return found

    def _check(self, images: Tensor) -> None:
        """Refuse images of another size or dtype than the model's, with a ValueError."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}: must be [B, {', '.join(map(str, expected))}]")
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}: must be floating point and normalised, (x / 255 - mean) / std"
            )
        weights = next(self.parameters()).dtype
        if images.dtype != weights and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images are {images.dtype}, the weights {weights}: give images.to({weights}), or use torch.autocast"
            )

    def _draw(self, images: Tensor, draw: Draw | None, grid: Any = None) -> Draw:
        """The randomness of a training forward. In a plain loop it is keyed on PyTorch's generator.

        Raises:
            ValueError: no draw on several ranks or under an engine, where masks must not depend on the process.
        """
        if draw is not None:
            return draw
        if self.keyed or grid is not None:
            raise ValueError(
                "on a grid and under an engine a training forward needs its randomness: "
                "draw=hsvit_kernels.Draw.of(seed, step, image=torch.arange(len(images)), device=images.device), where "
                "image counts in the global batch"
            )
        return Draw.anew(len(images), images.device)
