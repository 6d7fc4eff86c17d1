"""Ask a trained network: from image files to class names and probabilities."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.decode import BadImageError
from ..data.preprocessing import Preprocessing
from ..engine.interop import MODEL, read_model
from ..errors import RefusedError
from ..models import Model
from .budget import Budget, Chosen, cost_of

if TYPE_CHECKING:
    from .saved import SavedRun

BATCH = 32
"""Images of a forward at most."""


Answers = tuple[tuple[str, float], ...]
"""(class, probability), the likeliest first."""


@dataclass(frozen=True)
class Prediction:
    """Of one image. answers: empty where `wrong` says what is wrong with the file. ms: that reading it and its share of
    the forward took."""

    image: str
    answers: Answers
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

    def read(self, image: Path | bytes) -> Tensor | str:
        """A file or its content to fp32 [C, S, S], preprocessed; or what is wrong with it."""
        try:
            return self.preprocessing(image if isinstance(image, bytes) else image.read_bytes())
        except BadImageError as error:
            return str(error)
        except OSError as error:
            return str(error.strerror)

    def predict(self, images: Sequence[tuple[str, Path | bytes]], top: int) -> Iterator[Prediction]:
        """The `top` likeliest classes of each image, (name, file or its content), in their order."""
        for start in range(0, len(images), BATCH):
            yield from self._predict(images[start : start + BATCH], top)

    def _predict(self, images: Sequence[tuple[str, Path | bytes]], top: int) -> Iterator[Prediction]:
        began = time.perf_counter()
        pixels: list[Tensor] = []
        wrong = dict[int, str]()
        for place, (_, content) in enumerate(images):
            read = self.read(content)
            if isinstance(read, str):
                wrong[place] = read
            else:
                pixels.append(read)
        answers = iter(self.best(self.probabilities(torch.stack(pixels)), top) if pixels else [])
        ms = 1000 * (time.perf_counter() - began) / len(images)
        for place, (name, _) in enumerate(images):
            yield Prediction(name, (), ms, wrong[place]) if place in wrong else Prediction(name, next(answers), ms)

    def best(self, probabilities: Tensor, top: int) -> list[Answers]:
        """The `top` likeliest classes of each row of [B, Q]."""
        best = probabilities.topk(min(top, self.model.classes))
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
    if (path / "checkpoints").is_dir():
        from .saved import open_run  # here, as an export is to be asked without what reads a recipe

        run = open_run(path, ema, root, checkpoint)
        return predictor(run, run.choose(width, budget))
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
    small = file.model.subnet(found.width).to(_device()).eval()
    return Predictor(small, file.preprocessing, file.classes, found.words)


def predictor(run: SavedRun, chosen: Chosen) -> Predictor:
    """One of a run's networks."""
    small = run.at(chosen.width).subnet(chosen.width).to(_device()).eval()
    return Predictor(small, run.preprocessing, run.classes, f"{run.read}, {chosen.words}")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _of_file(path: Path, model: Model, own: str, width: str, budget: str) -> Chosen:
    """Of an export, which has one width, `own` of the network that it was taken from."""
    if width and budget:
        raise RefusedError("give one of --width and --budget")
    (only,) = model.config.widths.all
    if width and not _same(width, own):
        raise RefusedError(f"{path}: has width {own} alone, not {width}; export that one from its run")
    if budget:
        Budget.of(budget).choose(model, (only,), {}, "")
    words = cost_of(model, only)
    named = f"{'mix' if 'x' in own or ',' in own else 'width'} {own}"
    return Chosen(only, words.replace(f"width {only}", named) if own else words)


def _same(width: str, own: str) -> bool:
    try:
        asked = float(width)
    except ValueError:
        raise RefusedError(f"--width {width}: must be a number such as 0.5") from None
    return own.replace(".", "").isdecimal() and asked == float(own)  # a mix's is none
