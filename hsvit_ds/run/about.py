"""What a run says of itself to others: its summary at the first step, and that it is going on."""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, models
from ..data.augment import PRESETS
from ..data.reader import Reader
from ..engine.checkpoint import Position
from ..grid.grid import Grid
from ..models import Model
from ..models.slimmable import Width
from ..tasks import supervised
from . import recipe as recipes
from . import system, table
from .recipe import Plan, Recipe
from .summary import Cost, Data, Summary, held
from .tracking import Tracker, Untracked
from .widths import expected_epochs

LIBRARIES = ("torch", "torchvision", "triton", "deepspeed", "timm", "numpy", "mlflow")
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run was started from: the recipe's file, and the keys that it and the command line set otherwise than the
    defaults."""

    recipe: str = ""
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> Asked:
        """recipe: as it was read, before anything is derived."""
        return cls(recipe=str(path), changed=changed(recipe))


UNKNOWN = Asked()


def changed(recipe: Recipe) -> dict[str, Any]:
    """{key: value} of what is not its default, nor what a preset of augmentations makes of it; of how a run is called
    and tracked nothing."""
    defaults = table.flat(_defaults(recipe)) | {"model.kind": None, "task.kind": supervised.Config.kind}
    if preset := PRESETS.get(recipe.augment.preset):
        defaults |= {f"augment.{key}": value for key, value in preset.items()}
    now = recipes.flat(recipe)
    return {
        key: value
        for key, value in now.items()
        if defaults.get(key) != value and key not in ("run.name", "run.root") and not key.startswith("tracking.")
    }


def _defaults(config: Any) -> dict[str, Any]:
    """Of a Config and those inside it; without the keys that have none."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            found[entry.name] = _defaults(value)
        elif entry.default is not dataclasses.MISSING:
            found[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            found[entry.name] = entry.default_factory()
    return found


@contextmanager
def recorded(
    summary: Summary, folder: Path, recipe: Recipe, grid: Grid, start: Position
) -> Iterator[Tracker | Untracked]:
    """Within the block the run is seen to go on, its hosts are measured for MLflow, and its tracker is there.

    summary: as `begin` gives it. start: where this attempt begins.
    """
    with ExitStack() as stack:
        if recipe.tracking.mlflow and grid.is_first_of_host:
            stack.enter_context(system.watched(folder))
        if grid.is_main:
            stack.enter_context(held(folder))
            yield Tracker(recipe.tracking, folder, recipes.flat(recipe), summary, start)
        else:
            yield Untracked()


def begin(
    asked: Asked,
    title: str,
    recipe: Recipe,
    plan: Plan,
    grid: Grid,
    reader: Reader,
    model: Model,
    widths: Sequence[Width],
) -> Summary:
    """The summary of what has not begun yet. Collective, as every host tells its name.

    widths: that are trained, the smallest first.
    """
    hosts = tuple(dict.fromkeys(grid.gather(socket.gethostname())))
    commit, dirty = checkout(_PACKAGE)
    cuda = grid.device.type == "cuda"
    data, epochs = recipe.data, expected_epochs(recipe, plan)
    splits = dict.fromkeys(("train", data.val, data.test))
    return Summary(
        id=uuid.uuid4().hex,
        title=title,
        recipe=asked.recipe,
        changed=asked.changed,
        data=Data(
            name=data.name,
            fingerprint=data.fingerprint,
            counts={split: reader.count(split) for split in splits},
            val=data.val,
            test=data.test,
            classes=reader.facts.classes,
            image_size=reader.facts.image_size,
        ),
        costs=tuple(
            Cost(width=str(w), parameters=models.parameters(model, w), macs=models.macs(model, w), epochs=epochs[w])
            for w in widths
        ),
        ranks=grid.size,
        cores=0 if cuda else torch.get_num_threads() * grid.size,
        gpus=grid.size if cuda else 0,
        hosts=hosts,
        device=torch.cuda.get_device_name(grid.device) if cuda else system.cpu(),
        launcher=_launcher(),
        commit=commit,
        dirty=dirty,
        versions={"python": platform.python_version(), "hsvit-ds": __version__, **_versions()},
        started=time.time(),
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=recipe.run.epochs,
    )


def checkout(package: Path) -> tuple[str, bool]:
    """(The commit that the package's files were checked out at, whether some of them were changed since); ("", False)
    where git does not know them."""
    git = ["git", "-C", str(package)]
    try:
        known = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False)
        if known.returncode:  # installed, as into the environment of another project's checkout
            return "", False
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "", False
    return commit.stdout.strip(), bool(changes.stdout.strip())


def _launcher() -> str:
    if "RANK" not in os.environ:
        return "python"
    return "torchrun" if "LOCAL_WORLD_SIZE" in os.environ else "deepspeed" if "LOCAL_SIZE" in os.environ else "other"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # as on a machine that has torch from elsewhere
            continue
    return found
