"""What every model here has in common: timm's names, randomness for plain loops, and inputs that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hsvit_kernels.random import Draw, Site

from ..errors import first_line
from . import slimmable
from .slimmable import FULL, Ratio, Width

AnyWidth = Width | float | Sequence[Ratio]
"""As a forward takes it."""


class Distilled(NamedTuple):
    """Logits [B, Q] of the class head and of the one that learns from the teacher."""

    classes: Tensor
    distillation: Tensor


class Twin(NamedTuple):
    """Logits [B, Q] of two heads that learn the same; the first answers."""

    classes: Tensor
    cls: Tensor


class OneRank:
    """A Config of models that are not shared between submodule ranks."""

    @property
    def submodules(self) -> int:
        """The whole model."""
        return 1

    @property
    def splits_images(self) -> bool:
        """See HSViT."""
        return False


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
    all_heads = False
    """Whether a training forward answers with the logits of all heads, where a model has several."""

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

    def _drop_path(self, images: Tensor, draw: Draw | None, depth: int, branches: int) -> Tensor | None:
        """[depth x branches, B, 1, 1]: 0, or 1 over the keep rate, for every branch of a block and image; None where
        nothing is dropped. The rates rise linearly from 0 to `config.drop_path` at the last block."""
        most: float = self.config.drop_path
        if not self.training or not most:
            return None
        draw = self._draw(images, draw)
        element = torch.arange(depth * branches, dtype=torch.int32, device=draw.key.device)
        rates = torch.linspace(0, most, depth, device=draw.key.device).repeat_interleave(branches)
        kept = (draw.uniform(Site.DROP_PATH, element) >= rates) / (1 - rates)  # [B, depth x branches]
        return kept.t()[:, :, None, None]

    def _slices(self, width_of: Callable[[str], Width]) -> dict[str, Tensor]:
        """What the layers that can be sliced have at the width of each, by its path."""
        return {
            f"{path}.{name}": value
            for path, module in self.named_modules()
            if hasattr(module, "slices")
            for name, value in module.slices(width_of(path)).items()
        }

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


def _linear_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


_FLOPS: dict[Any, Any] = {torch.ops.hsvit_kernels.sliced_linear: _linear_flops}
"""Of operations that PyTorch's counter does not know."""


def count_macs(model: nn.Module, what: str, image_size: int, channels: int) -> tuple[int, Tensor]:
    """(multiply-adds of one image, its answer) of a model on the meta device.

    Raises:
        ValueError: it has no answer to images of this size.
    """
    model.eval().requires_grad_(False)  # the counter of FLOPs stumbles over parameters that are inputs
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            answer = model(torch.empty(1, channels, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{what} has no answer to images of {image_size} px ({first_line(error)})") from error
    return int(counter.get_total_flops()) // 2, answer


@lru_cache(maxsize=256)
def counted_macs(config: Any, what: str, image_size: int, channels: int, classes: int) -> int:
    """Of the network of a config, as `count_macs`."""
    with torch.device("meta"):
        model = config.build(image_size=image_size, channels=channels, classes=classes)
    return count_macs(model, what, image_size, channels)[0]
