"""A run that has ended, opened to be scored or exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from . import recipe as recipes
from .data.order import Share
from .data.reader import Reader, facts
from .data.sets import Facts
from .errors import RefusedError
from .evaluation import evaluate, needs_calibration, recalibrate_widths
from .export import Budget
from .grid import Channel, Grid
from .grid import Config as GridConfig
from .interop import load_run
from .models import Model
from .models.slimmable import Width
from .recipe import Recipe
from .tasks import scala
from .tracking import read_metrics

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SavedRun:
    """The newest checkpoint of the run in `folder`, whole on this rank."""

    folder: Path
    model: Model
    recipe: Recipe
    trained: tuple[Width, ...]
    """The widths that its steps so far have trained, the smallest first."""
    steps: int

    @cached_property
    def grid(self) -> Grid:
        return Grid(GridConfig(), submodules=1)

    @cached_property
    def reader(self) -> Reader:
        share = Share(self.recipe.run.global_batch, 1, self.grid.replicas, self.grid.replica)
        return Reader(self.recipe.data, self.recipe.augment, recipes.order(self.recipe), share, self.grid)

    @property
    def facts(self) -> Facts:
        return facts(self.recipe.data)

    def widths(self, text: str, untrained: bool = False) -> tuple[Width, ...]:
        """The widths in "all" or "0.25,0.5", the smallest first; refused where a width was never trained."""
        if text == "all":
            return self.trained
        try:
            found = [self.model.config.widths.find(part, untrained) for part in text.split(",")]
            for width in found:
                self.model.config.check_width(width)
        except ValueError as error:
            raise RefusedError(f"{self.folder}: {error}") from error
        missing = [width for width in found if width not in self.trained]
        if missing and not untrained:
            known = ", ".join(str(width) for width in self.trained)
            raise RefusedError(
                f"{self.folder}: width {missing[0]} was never trained (trained: {known}); --untrained takes it anyway"
            )
        return tuple(sorted(set(found), key=float))

    def evaluate(self, split: str, widths: tuple[Width, ...]) -> dict[str, float]:
        """See `evaluation.evaluate`. Collective."""
        if split not in SPLITS:
            raise RefusedError(f"--split {split}: must be one of {', '.join(SPLITS)}")
        model = self.model.to(self.grid.device)
        try:
            return evaluate(model, model, self.reader, split, widths, self._runs_differ)
        finally:
            self.reader.close()

    def choose(self, width: str, budget: str, untrained: bool) -> Width:
        """The width of `width`, or the widest trained one within `budget`; without both the only trained one."""
        if not width and not budget and len(self.trained) == 1:
            return self.trained[0]
        if bool(width) == bool(budget):
            raise RefusedError("give one of --width and --budget")
        if budget:
            return Budget.of(budget).widest(self.at(*self.trained), self.trained)
        found = self.widths(width, untrained)
        if len(found) != 1:
            raise RefusedError(f"--width {width}: must be one width")
        return found[0]

    def at(self, *widths: Width) -> Model:
        """The model, with BatchNorm's statistics of the widths taken."""
        model = self.model.to(self.grid.device)
        if needs_calibration(model, widths):
            recalibrate_widths(model, model, self.reader, widths, self._runs_differ)
            self.reader.close()
        return model.eval()

    def about(self, width: Width) -> dict[str, str]:
        """What a model card says of the run: its name, data, steps and accuracy at a width, where it was measured."""
        facts = self.facts
        lines = {"run": self.folder.name, "data": self.recipe.data.name, "steps": str(self.steps)}
        lines |= {"mean": str(list(facts.mean)), "standard deviation": str(list(facts.std))}
        key = "test/top1" if len(self.trained) == 1 else f"test/top1_w{width}"
        side, share = facts.image_size, self.recipe.augment.eval_crop
        how = f"shorter side resized to {round(side / share)}, centre cut out" if share else "aspect ratio not kept"
        lines["image"] = f"{side} x {side} px, {how}, {self.recipe.augment.filter}"
        scores = [line[key] for line in read_metrics(self.folder) if key in line]
        return lines | ({"test top-1, %": f"{scores[-1]:.2f}"} if scores else {})

    @property
    def _runs_differ(self) -> Channel | None:
        return self.grid.norms if self.grid.replicas > 1 else None


def open_run(folder: Path, ema: bool = False, root: Path | None = None) -> SavedRun:
    """Open a run. ema: with its averaged weights. root: of its data, where that is not the run's own.

    Raises:
        RefusedError: no checkpoint there, or a damaged one.
    """
    loaded = load_run(folder, ema)
    recipe = recipes.from_table(loaded.recipe, str(folder))
    if root is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=str(root)))
    family = recipe.model.widths.family
    trained = family[-1:]
    if isinstance(recipe.task, scala.Config):
        at = loaded.position
        # In the first epoch it is enough that an epoch is longer than the run so far.
        steps = (at.total - at.step) // at.epoch if at.epoch else at.total + 1
        sampler = scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, steps)
        trained = sampler.trained(loaded.position.total)
    return SavedRun(folder, loaded.model, recipe, trained, loaded.position.total)
