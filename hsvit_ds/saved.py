"""A run that has ended, opened to be scored or exported."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import recipe as recipes
from .data.order import Order, Share
from .data.reader import Reader, facts
from .errors import RefusedError
from .evaluation import evaluate, recalibrate_widths
from .export import Budget
from .grid import Channel, Grid
from .grid import Config as GridConfig
from .interop import load_run
from .models import Model
from .models.slimmable import Width
from .recipe import Recipe
from .tasks import scala
from .tracking import read_metrics


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
        run, data = self.recipe.run, self.recipe.data
        order = Order(facts(data).samples["train"], data.window, run.global_batch, run.seed)
        return Reader(data, order, Share(run.global_batch, 1, self.grid.replicas, self.grid.replica), self.grid)

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
        if split not in self.reader.facts.samples:
            raise RefusedError(f"--split {split}: {self.recipe.data.name} has {', '.join(self.reader.facts.samples)}")
        model = self.model.to(self.grid.device)
        return evaluate(model, model, self.reader, split, widths, self._runs_differ)

    def choose(self, width: str, budget: str, untrained: bool) -> Width:
        """The width of `width`, or the widest trained one within `budget`."""
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
        recalibrate_widths(model, model, self.reader, widths, self._runs_differ)
        return model.eval()

    def about(self, width: Width) -> dict[str, str]:
        """What a model card says of the run: its name, data, steps and accuracy at a width, where it was measured."""
        facts = self.reader.facts
        lines = {"run": self.folder.name, "data": self.recipe.data.name, "steps": str(self.steps)}
        lines |= {"mean": str(list(facts.mean)), "standard deviation": str(list(facts.std))}
        key = "test/top1" if len(self.trained) == 1 else f"test/top1_w{width}"
        scores = [line[key] for line in read_metrics(self.folder) if key in line]
        return lines | ({"test top-1, %": f"{scores[-1]:.2f}"} if scores else {})

    @property
    def _runs_differ(self) -> Channel | None:
        return self.grid.norms if self.grid.replicas > 1 else None


def open_run(folder: Path, ema: bool = False) -> SavedRun:
    """Open a run. ema: with its averaged weights.

    Raises:
        RefusedError: no checkpoint there, or a damaged one.
    """
    loaded = load_run(folder, ema)
    recipe = recipes.from_table(loaded.recipe, str(folder))
    family = recipe.model.widths.family
    trained = family[-1:]
    if isinstance(recipe.task, scala.Config):
        steps = sum(facts(recipe.data).samples["train"]) // recipe.run.global_batch
        sampler = scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, steps)
        trained = sampler.trained(loaded.position.total)
    return SavedRun(folder, loaded.model, recipe, trained, loaded.position.total)
