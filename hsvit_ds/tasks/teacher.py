"""A frozen network whose answers a step learns from: any timm model, or a finished run of this project.

It is outside the engine: no gradient, no optimizer state, no sharding; in eval mode and in the run's low precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.sets import Facts
from ..engine.interop import load_run
from ..errors import RefusedError
from ..models import timm_models
from ..spans import Part, spanned
from .cache import Rows, digest


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = ""
    """"timm/" and a model's name (timm/regnety_160), or the folder of a run of this project; empty: no teacher.
    It sees the student's images, normalised for the data set."""
    weights: str = ""
    """A timm teacher's: a local file (.safetensors, .pth), or empty for timm's pretrained ones, which it downloads."""
    distillation: str = "hard"
    """"hard": cross-entropy to the teacher's class; "soft": KL divergence to its probabilities (DeiT's equations)."""
    alpha: float = 0.5
    """Weight of the teacher's loss; the labels' is 1 - alpha."""
    temperature: float = 1.0
    """Of both softmaxes in soft distillation; its loss is multiplied with the square."""
    cache: str = ""
    """Folder for its answers by step and sample: runs with the same teacher, data, augmentation, seed and global batch
    share them; it is asked only for what is not there. Soft answers take 2 bytes a class, hard ones 2 in all."""

    def __post_init__(self) -> None:
        if self.distillation not in ("hard", "soft"):
            raise ValueError(f'distillation = "{self.distillation}": must be "hard" or "soft"')
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha}: must be above 0 and at most 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: must be above 0")
        if not self.name and (self.weights or self.cache):
            raise ValueError("weights and cache are a teacher's: set name too")
        if self.weights and not self.name.startswith("timm/"):
            raise ValueError(f'weights = "{self.weights}": only for a timm teacher; a run has its own')


def loss(config: Config, logits: Tensor, answers: Tensor) -> Tensor:
    """logits [B, Q] fp32 against the teacher's answers, classes [B] or logits [B, Q]."""
    if config.distillation == "hard":
        return F.cross_entropy(logits, answers)
    t = config.temperature
    target = (answers / t).log_softmax(-1)
    return t * t * F.kl_div((logits / t).log_softmax(-1), target, reduction="batchmean", log_target=True)


def load(config: Config, facts: Facts) -> nn.Module:
    """The teacher in eval mode with frozen weights; on the meta device without them.

    Raises:
        RefusedError: no such model or weights, or other classes, channels or images than the data's.
    """
    model = _timm(config, facts) if config.name.startswith("timm/") else _run(config, facts)
    return model.eval().requires_grad_(False)


def _timm(config: Config, facts: Facts) -> nn.Module:
    import timm  # here, as it takes 6 s

    key, name = "task.teacher.name", config.name.removeprefix("timm/")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classes = facts.classes if config.weights or known is None else known.num_classes
    side = facts.image_size
    wanted = known.input_size[-1] if known is not None and known.fixed_input_size else side
    _fit(config, facts, classes=classes, image_size=wanted)
    try:
        return timm_models.create(
            key,
            name,
            classes=classes,
            channels=facts.channels,
            image_size=side,
            weights=config.weights or timm_models.DEFAULT,
            same_classes=True,
        )
    except ValueError as error:
        raise RefusedError(str(error)) from error


def _run(config: Config, facts: Facts) -> nn.Module:
    run = load_run(Path(config.name))
    if absent := run.recipe["grid"]["absent"]:
        raise RefusedError(
            f"task.teacher.name = {config.name} was last saved without its submodules {list(absent)}; train it on with "
            "all of them first"
        )
    _fit(config, facts, classes=run.model.classes, image_size=run.model.image_size)
    return run.model


def _fit(config: Config, facts: Facts, *, classes: int, image_size: int) -> None:
    for what, its, ours in (("classes", classes, facts.classes), ("pixels a side", image_size, facts.image_size)):
        if its != ours:
            raise RefusedError(f"task.teacher.name = {config.name} is for {its} {what}, the data has {ours}")


class Teacher:
    """Answers once a micro batch, for all passes.

    Args:
        steps: of the whole run, for the cache's size. key: what the images of a step depend on.
    """

    def __init__(
        self, config: Config, facts: Facts, device: torch.device, dtype: torch.dtype, batch: int, key: Mapping[str, Any]
    ) -> None:
        self.config, self.dtype, self.global_batch = config, dtype, batch
        self.module = load(config, facts).to(device, dtype)
        self.cache = None
        if config.cache:
            about = {
                **key,
                "teacher": asdict(config) | {"cache": ""},
                "weights": digest(self.module),
                "dtype": str(dtype),
            }
            is_hard = config.distillation == "hard"
            numbers, kind = (1, torch.int16) if is_hard else (facts.classes, torch.float16)
            self.cache = Rows(Path(config.cache), about, numbers, kind, "task.teacher.cache")

    @spanned(Part.TEACHER)
    @torch.no_grad()
    def __call__(self, batch: Batch, images: Tensor) -> Tensor:
        """images fp32 [B, C, H, W], as the student sees them, to int64 classes [B] or fp32 logits [B, Q]."""
        rows = (batch.step * self.global_batch + batch.index).tolist()
        if self.cache is not None and (found := self.cache.read(rows)) is not None:
            return self._meaning(found.to(images.device))
        logits = self.module(images.to(self.dtype))
        # What can be stored is what is used, so that a cached run equals the one that fills the cache.
        stored = logits.argmax(-1, keepdim=True).short() if self.config.distillation == "hard" else logits.half()
        if self.cache is not None:
            self.cache.write(rows, stored)
        return self._meaning(stored)

    def _meaning(self, stored: Tensor) -> Tensor:
        return stored[:, 0].long() if self.config.distillation == "hard" else stored.float()
