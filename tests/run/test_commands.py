"""What a run says can be done next can be done."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from hsvit_ds import train
from hsvit_ds.models.slimmable import Config
from hsvit_ds.run import commands

from ..test_help import parse

FOLDER = Path("runs/it's a run-001")


@pytest.mark.parametrize("smallest", [1.0, 0.25])
def test_the_next_commands_are_taken(smallest: float) -> None:
    widths = Config(smallest=smallest, granularity=0.25).all
    lines = [shlex.split(line) for line in commands.after(FOLDER, widths, "sqlite:////x/mlflow.db")]
    assert [line[1] for line in lines] == ["evaluate", *(["export"] if smallest < 1 else []), "predict", "ui"]
    assert lines[-1][1:] == ["ui", "--backend-store-uri", "sqlite:////x/mlflow.db"]
    for program, name, *arguments in lines[:-1]:
        assert Path(program).name == "hsvit"
        assert arguments[0] == str(FOLDER)
        parse((name,), ["hsvit", name, *arguments])


@pytest.mark.parametrize(
    ("environment", "starts"),
    [
        ({}, ["python", "-m"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, ["deepspeed", "--num_accelerators", "2", "--module"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            ["torchrun", "--standalone", "--nproc_per_node=2", "-m"],
        ),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, None),  # two hosts
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),  # Slurm
    ],
)
def test_a_stopped_run_is_resumed_as_it_was_started(
    environment: dict[str, str], starts: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = commands.again(Path("a b.toml"), ["run.seed=1", "data.name=x y"], FOLDER)
    if starts is None:
        assert not line
        return
    program, *words = shlex.split(line)
    assert [Path(program).name, *words[: len(starts) - 1]] == starts
    assert words[len(starts) - 1] == "hsvit_ds.train"
    args = train.parse(words[len(starts) :])
    assert (args.recipe, args.overrides, args.run) == (Path("a b.toml"), ["run.seed=1", "data.name=x y"], FOLDER)


def test_a_program_that_is_not_on_the_path_is_named_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    line = commands.again(Path("a.toml"), [], FOLDER)
    assert shlex.split(line)[0] == str(Path(sys.executable).with_name("python"))
