"""Ask a trained network: from image files to class names and probabilities."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.decode import BadImageError
from ..data.preprocessing import Preprocessing
from ..engine.interop import MODEL, read_model
from ..errors import RefusedError
from ..models import Model
from .budget import Budget, Chosen, cost_of

BATCH = 32
"""Images of a forward at most."""


@dataclass(frozen=True)
class Prediction:
    """Of one image. answers: (class, probability), the likeliest first; empty where `wrong` says what is wrong with the
    file. ms: that reading it and its share of the forward took."""

    image: str
    answers: tuple[tuple[str, float], ...]
    ms: float
    wrong: str = ""


@dataclass(frozen=True)
class Predictor:
    """A network with what goes before and after it. chosen: which one it is, and what it costs, in words."""

    model: Model
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    chosen: str

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """fp32 [B, C, S, S], preprocessed, to fp32 [B, Q]."""
        device = next(self.model.parameters()).device
        logits: Tensor = self.model(images.to(device))
        return logits.float().softmax(-1).cpu()

    def predict(self, images: Sequence[tuple[str, Path | bytes]], top: int) -> Iterator[Prediction]:
        """The `top` likeliest classes of each image, (name, file or its content), in their order."""
        for start in range(0, len(images), BATCH):
            yield from self._predict(images[start : start + BATCH], top)

    def _predict(self, images: Sequence[tuple[str, Path | bytes]], top: int) -> Iterator[Prediction]:
        began = time.perf_counter()
        pixels: list[Tensor] = []
        wrong = dict[int, str]()
        for place, (_, content) in enumerate(images):
            try:
                data = content if isinstance(content, bytes) else content.read_bytes()
                pixels.append(self.preprocessing(data))
            except (BadImageError, OSError) as error:
                wrong[place] = str(error) if isinstance(error, BadImageError) else str(error.strerror)
        answers = iter(self._answers(torch.stack(pixels), top) if pixels else [])
        ms = 1000 * (time.perf_counter() - began) / len(images)
        for place, (name, _) in enumerate(images):
            yield Prediction(name, (), ms, wrong[place]) if place in wrong else Prediction(name, next(answers), ms)

    def _answers(self, images: Tensor, top: int) -> list[tuple[tuple[str, float], ...]]:
        best = self.probabilities(images).topk(min(top, self.model.classes))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        named = self.classes or [str(label) for label in range(self.model.classes)]
        return [tuple((named[label], value) for label, value in zip(*row, strict=True)) for row in rows]


def open_predictor(
    path: Path, width: str = "", budget: str = "", checkpoint: str = "latest", ema: bool = False, root: str = ""
) -> Predictor:
    """A run's network, or that of an export, which needs nothing beside it. Arguments: see `SavedRun.choose` and
    `open_run`.

    Raises:
        RefusedError: neither, no such width, or none within the budget.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / "checkpoints").is_dir():
        from .saved import open_run  # here, as an export is to be asked without what reads a recipe

        run = open_run(path, ema, root, checkpoint)
        chosen = run.choose(width, budget)
        small = run.at(chosen.width).subnet(chosen.width).to(device).eval()
        return Predictor(small, run.preprocessing, run.classes, f"{run.read}, {chosen.words}")
    if not path.exists():
        raise RefusedError(f"{path}: no such run or export")
    if path.is_dir() and not (path / MODEL).exists():
        raise RefusedError(f"{path}: neither a run (no checkpoints/ in it) nor an export (no {MODEL})")
    if ema or checkpoint != "latest":
        raise RefusedError(f"{path}: --checkpoint and --ema are a run's; an export has one set of weights")
    file = read_model(path)
    if file.preprocessing is None:
        raise RefusedError(f"{path}: does not say what an image goes through before it; ask an export or a run")
    found = _of_file(path, file.model, file.width, width, budget)
    small = file.model.subnet(found.width).to(device).eval()
    return Predictor(small, file.preprocessing, file.classes, found.words)


def _of_file(path: Path, model: Model, own: str, width: str, budget: str) -> Chosen:
    """Of an export, which has one width, `own` of the network that it was taken from."""
    if width and budget:
        raise RefusedError("give one of --width and --budget")
    (only,) = model.config.widths.family
    if width and not _same(width, own):
        raise RefusedError(f"{path}: has width {own} alone, not {width}; export that one from its run")
    if budget:
        Budget.of(budget).choose(model, (only,), {}, "")
    words = cost_of(model, only)
    return Chosen(only, words.replace(f"width {only}", f"width {own}") if own else words)


def _same(width: str, own: str) -> bool:
    try:
        return float(width) == float(own)
    except ValueError:
        raise RefusedError(f"--width {width}: must be a number such as 0.5") from None
