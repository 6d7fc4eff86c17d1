"""A run that has ended, opened to be scored or exported."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, count
from math import comb
from pathlib import Path

import torch
from torch import Tensor

from hsvit_kernels.random import Site, sequence

from .. import models
from ..data.order import Share
from ..data.preprocessing import Preprocessing
from ..data.reader import Reader
from ..data.sets import Facts
from ..data.splits import facts, named_as_before
from ..engine.interop import load_run
from ..errors import RefusedError
from ..grid.exchange import Channel
from ..grid.grid import Config as GridConfig
from ..grid.grid import Grid
from ..models import Model
from ..models.hsvit import HSViT
from ..models.slimmable import Width
from ..run import metrics
from ..run import recipe as recipes
from ..run.evaluation import Answers, Score, evaluate, evaluate_subsets, needs_calibration, recalibrate_widths
from ..run.pictures import accuracy_of, class_column
from ..run.recipe import Recipe
from ..tasks import scala
from .budget import Budget, Chosen, cost_of
from .card import Card, Row

ROLES = ("train", "val", "test")
SUBSETS = 20
"""Subsets of submodules of one size that a sweep scores at most."""
LONGEST = 160
"""Letters of the widths in the name of a file, of which a file system takes 255."""


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of the run in `folder`, whole on this rank."""

    folder: Path
    model: Model
    recipe: Recipe
    trained: tuple[Width, ...]
    """The widths that its steps so far have trained and not abandoned, the smallest first."""
    steps: int
    classes: tuple[str, ...] = ()
    """What the labels mean; () where its data did not say."""
    names_splits: bool = True
    """Whether its recipe says which splits are `data.val` and `data.test`; once none did."""
    ema: bool = False
    """Whether these are the averaged weights."""
    best: bool = False
    """Whether the checkpoint was asked for as the best one."""

    @property
    def read(self) -> str:
        """Which weights these are, in words."""
        return f"step {self.steps}{' (best)' if self.best else ''}{', averaged weights' if self.ema else ''}"

    @cached_property
    def grid(self) -> Grid:
        return Grid(GridConfig(), submodules=1)

    @cached_property
    def reader(self) -> Reader:
        share = Share(self.recipe.run.global_batch, 1, self.grid.replicas, self.grid.replica)
        data = self.recipe.data if self.names_splits else named_as_before(self.recipe.data)
        return Reader(data, self.recipe.augment, recipes.order(self.recipe), share, self.grid)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.facts, self.recipe.augment)

    @property
    def facts(self) -> Facts:
        return facts(self.recipe.data)

    def widths(self, text: str, untrained: bool = False) -> tuple[Width, ...]:
        """The widths in "all" or "0.25,0.5", the smallest first; refused where a width is not a trained one."""
        if text == "all":
            return self.trained
        return self._found(self.model.config.widths.find, text.split(","), untrained)

    def mixes(self, texts: Sequence[str], untrained: bool = False) -> tuple[Width, ...]:
        """Those in texts such as "0.25x3,1", the smallest first; refused where a layer's width is not a trained one."""
        return self._found(self.model.config.widths.mix, texts, untrained)

    def _found(self, find: Callable[[str, bool], Width], texts: Sequence[str], untrained: bool) -> tuple[Width, ...]:
        try:
            found = [find(text, untrained) for text in texts]
            for width in found:
                self.model.config.check_width(width)
        except ValueError as error:
            raise RefusedError(f"{self.folder}: {error}") from error
        missing = [layer for width in found for layer in width.each if layer not in self.trained]
        if missing and not untrained:
            known = ", ".join(str(width) for width in self.trained)
            past = any(missing[0] in family for _, family in self.recipe.model.widths.families[:-1])
            why = "was never trained, or is abandoned" if past else "was never trained"
            raise RefusedError(
                f"{self.folder}: width {missing[0]} {why} (trained: {known}); --untrained takes it anyway"
            )
        return tuple(sorted(dict.fromkeys(found), key=float))

    def split(self, role: str) -> str:
        """The name of the split that is "train", "val" or "test" to the run."""
        if role not in ROLES:
            raise RefusedError(f"--split {role}: must be one of {', '.join(ROLES)}")
        return role if role == "train" else str(getattr(self.reader.config, role))

    def accuracy_of(self, split: str) -> str:
        return accuracy_of(split, self.reader.count(split))

    def evaluate(self, split: str, widths: tuple[Width, ...]) -> tuple[dict[str, float], Answers]:
        """See `evaluation.evaluate`, with its counts; without the submodules that were absent at the end.
        Collective."""
        model = self.model.to(self.grid.device)
        forward: Callable[..., Tensor] = model
        if self.recipe.grid.absent:
            present = torch.tensor([m in self.submodules for m in range(self.recipe.model.submodules)])
            forward = partial(model, present=present)
        try:
            classes = self.facts.classes
            counts = Answers.of(widths, classes, self.grid.device)
            found = evaluate(forward, model, self.reader, split, widths, self._runs_differ, counts=counts)
            return found, counts
        finally:
            self.reader.close()

    def evaluate_subsets(
        self, split: str, subsets: list[tuple[int, ...]], widths: tuple[Width, ...]
    ) -> list[list[Score]]:
        """See `evaluation.evaluate_subsets`; for each width. Collective."""
        model = self.model.to(self.grid.device)
        assert isinstance(model, HSViT)
        try:
            return [evaluate_subsets(model, self.reader, split, subsets, width, self._runs_differ) for width in widths]
        finally:
            self.reader.close()

    @property
    def submodules(self) -> list[int]:
        """Those that the last steps trained; others were absent, and are as they were before."""
        return [m for m in range(self.recipe.model.submodules) if m not in self.recipe.grid.absent]

    def subsets(self, text: str) -> list[tuple[int, ...]]:
        """The subsets of submodules in "0,2,3", or in "sweep": of every size all, or where those are many, some.

        Raises:
            RefusedError: no such submodules, or a model without.
        """
        m = self.recipe.model.submodules
        if m == 1:
            raise RefusedError(f"--present {text}: the model of {self.folder} has no submodules; leave it out")
        if text == "sweep":
            return [subset for size in range(1, len(self.submodules) + 1) for subset in self._subsets(size)]
        numbers = text.split(",")
        if not all(number.strip().isdecimal() and int(number) < m for number in numbers):
            raise RefusedError(f"--present {text}: must be sweep, or numbers from 0 to {m - 1}, as in 0,{m - 1}")
        return [tuple(sorted({int(number) for number in numbers}))]

    def _subsets(self, size: int) -> list[tuple[int, ...]]:
        """All subsets of so many submodules, or `SUBSETS` of them, always the same."""
        if comb(len(self.submodules), size) <= SUBSETS:
            return list(combinations(self.submodules, size))
        found: set[tuple[int, ...]] = set()
        draws = count()
        while len(found) < SUBSETS:
            luck = sequence(0, Site.SUBMODULE, size, next(draws), count=len(self.submodules)).tolist()
            chosen = sorted(zip(luck, self.submodules, strict=True))[:size]
            found.add(tuple(sorted(submodule for _, submodule in chosen)))
        return sorted(found)

    def choose(self, width: str, budget: str, untrained: bool = False, mix: str = "") -> Chosen:
        """The width of `width`, the mix of `mix`, or what `Budget.choose` takes within `budget`; by default the largest
        trained width."""
        if bool(width) + bool(budget) + bool(mix) > 1:
            raise RefusedError(f"give one of --width{', --mix' if mix else ''} and --budget")
        if budget:
            split = self.recipe.data.val
            return Budget.of(budget).choose(self.at(*self.trained), self.trained, self.measured(split), split)
        found = self.widths(width, untrained) if width else self.mixes([mix], untrained) if mix else self.trained[-1:]
        if len(found) != 1:
            raise RefusedError(f"--width {width}: must be one width")
        return Chosen(found[0], cost_of(self.model, found[0]))

    def measured(self, split: str) -> dict[Width, float]:
        """Top-1, %, of these very weights on a split, of each width where it was measured in training."""
        found: dict[Width, float] = {}
        for line in metrics.read(self.folder):
            for width in self.trained if line["step"] == self.steps else ():
                score = "top1" if len(self.trained) == 1 else f"top1_w{width}"
                key = f"ema/{split}_{score}" if self.ema else f"{split}/{score}"
                found |= {width: line[key]} if key in line else {}
        return found

    def at(self, *widths: Width) -> Model:
        """The model, with BatchNorm's statistics of the widths taken.

        Raises:
            RefusedError: some of its submodules were absent when it was trained last.
        """
        if self.recipe.grid.absent:
            raise RefusedError(
                f"{self.folder}: its last steps were without submodules {list(self.recipe.grid.absent)} (grid.absent), "
                "which do not fit the others any more; resume it whole, then export it"
            )
        model = self.model.to(self.grid.device)
        if needs_calibration(model, widths):
            recalibrate_widths(model, model, self.reader, widths, self._runs_differ)
            self.reader.close()
        return model.eval()

    def card(self, width: Width) -> Card:
        """What a model card says of the network at a width."""
        data = self.recipe.data
        splits = dict.fromkeys((data.val, data.test))
        scores = {split: self.measured(split) for split in splits}
        rows = tuple(
            Row(
                w,
                models.parameters(self.model, w),
                models.macs(self.model, w),
                {s: scores[s].get(w) for s in splits},
                set(w.each) <= set(self.trained),
            )
            for w in sorted(dict.fromkeys((*self.trained, width)), key=float)
        )
        sizes = {split: self.reader.count(split) for split in splits if scores[split]}
        return Card(
            self.folder.name,
            data.name,
            Path(self.recipe.model.weights).name,
            self.read,
            self.classes,
            self.preprocessing,
            rows,
            "mlp" if getattr(self.model.config, "sliced", "") == "mlp" else self.model.config.widths.slice,
            sizes,
            self._by_class(width),
        )

    def _by_class(self, width: Width) -> tuple[str, list[tuple[str, str, str]]] | None:
        """(split, [class, images, top-1 in %]) of these weights at a width, as the run or `hsvit evaluate` wrote it."""
        test = self.recipe.data.test
        name = drawn_name(self, "classes", test)
        files = [self.folder / f"{name}.csv", *self.folder.glob(f"{name}-[01]*.csv")]  # of some widths alone
        last = max((line["step"] for line in metrics.read(self.folder)), default=-1)
        if not self.ema and self.steps == last and self.measured(test):
            files.append(self.folder / f"classes-{test}.csv")
        for file in filter(Path.exists, files):
            with file.open(encoding="utf-8", newline="") as opened:
                rows = list(csv.DictReader(opened))
            if rows and (column := class_column(width)) in rows[0]:
                return test, [(row["class"], row["images"], row[column]) for row in rows]
        return None

    @property
    def _runs_differ(self) -> Channel | None:
        return self.grid.norms if self.grid.replicas > 1 else None


def drawn_name(run: SavedRun, what: str, split: str, widths: Sequence[Width] = ()) -> str:
    """What `hsvit evaluate` calls a file of its own: the run drew others. widths: of some alone."""
    named = [str(width) for width in widths]
    if len("-".join(named)) > LONGEST:
        named[1:-1] = [f"{len(named) - 2}-more"]
    return "-".join(["evaluate", what, split, f"step-{run.steps}", *(["ema"] if run.ema else []), *named])


def open_run(folder: Path, ema: bool = False, root: str = "", checkpoint: str = "latest") -> SavedRun:
    """Open a run. ema, checkpoint: see `load_run`. root: of its data, where that is not the run's own.

    Raises:
        RefusedError: no checkpoint there, or a damaged one; or its data comes from a command, which only a person may
            give, as a run can be anybody's.
    """
    loaded = load_run(folder, ema, checkpoint)
    recipe = recipes.from_table(loaded.recipe, str(folder))
    if root:
        recipe = replace(recipe, data=recipe.data.moved(root))
    elif commands := recipe.data.commands:
        raise RefusedError(
            f"{folder}: its data comes from a command, which is not run because a checkpoint says so: "
            f"{commands[0]!a}; if it is one to run, say so with --root"
        )
    family = recipe.model.widths.all
    trained = family[-1:]
    if isinstance(recipe.task, scala.Config):
        at = loaded.position
        # In the first epoch it is enough that an epoch is longer than the run so far.
        steps = (at.total - at.step) // at.epoch if at.epoch else at.total + 1
        sampler = scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, steps)
        trained = sampler.trained(loaded.position.total)
    return SavedRun(
        folder,
        loaded.model,
        recipe,
        trained,
        loaded.position.total,
        loaded.classes,
        names_splits="test" in loaded.recipe["data"],
        ema=ema,
        best=checkpoint == "best",
    )
