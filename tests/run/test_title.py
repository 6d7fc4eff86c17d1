"""A run's title says what its command line changed of what is trained; its first line what is trained on what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hsvit_ds.run import folders, table, title
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.recipe import Run

from ..ranks import RECIPES, ROOT, environment

SCALA = ROOT / "recipes/digits/scala.toml"


def changes(*overrides: str) -> str:
    return title.changes(SCALA, list(overrides), recipes.read(SCALA, list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), ""),
        (("model.widths.isolated=false", "run.seed=2"), "isolated=false seed=2"),
        (("run.seed=0", "model.depth=4"), ""),  # as they are
        (("run.seed=1", "run.seed=2"), "seed=2"),
        (("run.name=a", "run.root=b", "data.workers=1", "tracking.mlflow=false", "grid.timeout=5"), ""),
        (("engine.zero_stage=0", "checkpoint.keep_last=1", "engine.precision=bf16"), "precision=bf16"),
        (("model.widths={smallest=0.5, granularity=0.25}",), "smallest=0.5 granularity=0.25"),
        (("model.widths={family=['1/8', 1]}",), "family=1/8,1"),
        (("task.teacher.name=a/b/run-001",), "teacher.name=run-001"),
        (("optimizer.lr=1e-3",), "lr=0.001"),
    ],
)
def test_what_is_trained_in_another_way_is_said_by_the_shortest_key(overrides: tuple[str, ...], said: str) -> None:
    assert changes(*overrides) == said


def test_every_key_that_is_named_as_trained_is_one() -> None:
    keys = recipes.flat(recipes.read(SCALA))
    for top, names in table.TRAINED.items():
        assert any(key.startswith(f"{top}.") for key in keys)
        assert {f"{top}.{name}" for name in names or ()} <= keys.keys()


def test_a_resumed_run_keeps_its_title(tmp_path: Path) -> None:
    run = Run(name="a", root=str(tmp_path))
    folder = folders.open_folder(run, None, False, "", "seed=2")
    assert title.of(folder) == "a-001 seed=2"
    assert title.of(folders.open_folder(run, None, True, "", "")) == "a-001 seed=2"
    (folder / title.FILE).unlink()
    assert title.of(folder) == "a-001"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_has_a_first_line_that_is_true(path: Path) -> None:
    needed = ["data.root=/data"] if path.parent.name != "digits" else []
    recipe, said = recipes.read(path, needed), table.first_words(path, needed, 2)
    assert said.startswith(f"{recipe.run.name}: a")
    assert said.endswith(f" on {recipe.data.name}, 2 ranks")
    assert ("slimmable" in said) == (len(recipe.model.widths.all) > 1)
    assert table._MODELS[recipe.model.kind] in said


def test_overrides_are_in_the_first_line() -> None:
    overrides = ["run.name=x", "model.widths.smallest=1.0", "data.name=other", "data.classes=3"]
    assert table.first_words(SCALA, overrides, 1) == "x: a ViT on other, 1 rank"


def test_a_model_with_named_widths_is_slimmable_in_the_first_line() -> None:
    assert "a slimmable ViT" in table.first_words(SCALA, ["model.widths={family=['1/8', 1]}"], 1)


@pytest.mark.parametrize("text", ["", "model = 1", "[model]\nkind = 3", "[model", "data = []\n[model]\nkind = 'vit'"])
def test_bad_input_has_no_first_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert table.first_words(path, [], 1) == ""
    assert table.first_words(tmp_path / "none.toml", [], 1) == ""


@pytest.mark.heavy
@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_says_it_before_anything_that_takes_seconds_to_import(rank: str) -> None:
    script = """
import builtins, sys
from hsvit_ds import train
def check():
    print("then", sorted({"torch", "numpy", "pydantic", "rich", "deepspeed", "mlflow"} & set(sys.modules)))
    raise SystemExit
train.check_kernels = check
train.main(["recipes/digits/scala.toml"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(RANK=rank, WORLD_SIZE="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    said = "hsvit-ds 0.1.0: digits-scala: a slimmable ViT on digits, 2 ranks\n" if rank == "0" else ""
    assert done.stdout == f"{said}then []\n", done.stderr


def test_a_title_does_not_repeat_what_the_folder_is_named_by(tmp_path: Path) -> None:
    run = Run(name="digits-hsvit,seed=4", root=str(tmp_path))
    folder = folders.open_folder(run, None, False, "", "epochs=2 seed=4")
    assert title.of(folder) == "digits-hsvit,seed=4-001 epochs=2"
