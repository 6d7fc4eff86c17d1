"""From what was asked for to a run in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.splits import named_as_before
from ..errors import Log, RefusedError
from ..grid.grid import Grid, world_size
from . import folders, title
from . import recipe as recipes
from .about import Asked

if TYPE_CHECKING:
    from .trainer import Trainer


def start(path: Path, overrides: list[str], asked: Path | None, resume: bool, log: Log) -> Trainer:
    """A run on this rank that is ready to be trained. Collective.

    Args:
        path: of the recipe. asked: the folder. resume: the newest one of its name. log: opened in the folder.
    """
    recipe = recipes.read(path, overrides)
    if not folders.names_splits(recipe.run, asked, resume):
        recipe = replace(recipe, data=named_as_before(recipe.data))
    changes = title.changes(path, overrides, recipe)
    given = Asked.of(path, recipe)
    recipe, plan = recipes.resolve(recipe, world_size())
    grid = Grid(recipe.grid, recipe.model.submodules)
    try:
        text = recipes.dumps(recipe)
        folder = grid.agree(lambda: folders.open_folder(recipe.run, asked, resume, text, changes))
    except RefusedError:
        grid.close()  # all ranks are refused, and gloo aborts where one exits before the others
        raise
    log.open(folder / folders.log_name(grid.rank))
    from .trainer import Trainer  # with DeepSpeed, which has something to say

    return Trainer(recipe, plan, grid, folder, resume or asked is not None, given)
