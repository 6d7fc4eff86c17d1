"""A run whose recipe names its shards: begun, shown, resumed and evaluated as any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.grid.grid import Grid
from hsvit_ds.run import recipe as recipes
from hsvit_ds.train import main

from ..data.shards.commands import shards
from ..tars import data_set
from ..workers.common import SMALL

pytestmark = pytest.mark.heavy

NAMED = {"train": "train.{0000..0002}.tar", "val": "held out/*.tar"}


@pytest.fixture(autouse=True)
def _the_group_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends leaves the process group, which here is that of all tests."""
    monkeypatch.setattr(Grid, "close", lambda grid: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source, folder = data_set(tmp_path / "source", train=48, val=20), tmp_path / "set"
    (folder / "held out").mkdir(parents=True)
    for path in source.glob("*.tar"):
        _, split, number = path.name.split("-")
        shutil.copy(path, folder / ("held out" if split == "val" else "") / f"{split}.{number}")
    return folder


def arguments(tmp_path: Path, data: Path, *more: str) -> list[str]:
    keys = ["data.name=tiny", "data.classes=10", "data.image_size=32", "data.workers=0", "data.test=val"]
    keys += ["grid.submodule_ranks=1", f"run.root={tmp_path}", f"data.root={data}"]
    return ["recipes/digits/hsvit.toml", *SMALL, *keys, *more]


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def test_a_run_on_named_shards_is_shown_resumed_and_evaluated(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards("index", data, *(word for s, p in NAMED.items() for word in ("--shards", f"{s}={p}")), "--processes", 1)
    overrides = [f"data.shards.{split}={pattern}" for split, pattern in NAMED.items()]
    main(arguments(tmp_path, data, *overrides, "run.epochs=1"))
    run = tmp_path / "digits-hsvit-001"
    kept = recipes.read(run / "recipe.toml")
    assert kept.data.shards == NAMED
    assert recipes.resolve(kept, 1)[0] == kept
    assert recipes.from_table(recipes.to_table(kept), "here") == kept
    assert {f"data.shards.{split}": pattern for split, pattern in NAMED.items()}.items() <= recipes.flat(kept).items()
    assert recipes.dumps(kept) in command("recipe", run / "recipe.toml", "--ranks", 1)
    evaluated = command("evaluate", run, "--split", "val")
    moved = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copy2)
    shutil.rmtree(data)
    assert command("evaluate", run, "--split", "val", "--root", moved) == evaluated
    capfd.readouterr()
    main(arguments(tmp_path, moved, *overrides, "run.epochs=2", "--resume"))
    assert "epoch 2" in capfd.readouterr().out


def test_a_pattern_that_the_shell_expanded_is_refused(data: Path, tmp_path: Path) -> None:
    overrides = [f"data.shards.train=train.000{i}.tar" for i in range(3)]
    done = CliRunner().invoke(app, ["recipe", *arguments(tmp_path, data, *overrides)])
    assert done.exit_code == 2
    assert "data.shards.train is given 3 times; quote its braces, which the shell expands" in done.stderr


@pytest.mark.parametrize("value", ['data.shards={train="a.tar", val="b.tar"}', "data.shards.train=a.tar"])
def test_shards_are_overridden_whole_or_by_split(value: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = '[model]\nkind = "hsvit"\nvariant = "C2A2"\n[data]\nname = "tiny"\nclasses = 10\nroot = "/x"\n'
    path.write_text(text + '[data.shards]\ntrain = "c.tar"\nval = "b.tar"\n')
    assert recipes.read(path, [value]).data.shards == {"train": "a.tar", "val": "b.tar"}
    assert recipes.read(path, ["data.shards={}"]).data.shards == {}
