"""From an image file to what a trained model takes: evaluation's way, without a recipe or a data set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import augment, decode
from .sets import Facts
from .transform import Transform


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through.

    image_size: side, pixels. channels: 3, or 1, to which colours are converted by luminance. mean, std: by channel, in
    units of full scale. filter, eval_crop: see `augment.Config`.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str = "bicubic"
    eval_crop: float = 0.0

    @classmethod
    def of(cls, facts: Facts, augmentation: augment.Config) -> Preprocessing:
        """That of a run's evaluations."""
        return cls(facts.image_size, facts.channels, facts.mean, facts.std, augmentation.filter, augmentation.eval_crop)

    @property
    def description(self) -> str:
        side = self.image_size
        if not self.eval_crop:
            return f"resized to {side} x {side} px, aspect ratio not kept, {self.filter}"
        shorter = round(side / self.eval_crop)
        return f"shorter side resized to {shorter} px, {self.filter}, centre of {side} x {side} px cut out"

    def __call__(self, data: bytes, decoder: str = "") -> Tensor:
        """The content of an image file to fp32 [C, S, S], normalised. decoder: see `decode.installed`.

        Raises:
            BadImageError: it cannot be read.
        """
        asked = augment.Config(filter=self.filter, eval_crop=self.eval_crop)
        name = decoder or decode.installed("auto")
        transform = Transform(asked, self.image_size, name, seed=0, channels=self.channels, convert=True)
        return augment.normalise(transform.held_out(data)[None], self.mean, self.std)[0]
