"""Every command's help has an example, whose arguments are taken."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hsvit_ds import __version__, train
from hsvit_ds.cli import app


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Those of typer's own copy of click, or of click, by their path."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def examples(command: Any) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"Example: (.+)", command.help or "")]


def parse(path: tuple[str, ...], words: list[str]) -> None:
    """Refuses what the command of the path does not take."""
    assert tuple(words[: len(path) + 1]) == ("hsvit", *path)
    COMMANDS[path].make_context(" ".join(path), words[len(path) + 1 :])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_with_options_that_it_takes(path: tuple[str, ...]) -> None:
    found = examples(COMMANDS[path])
    assert found, f"hsvit {' '.join(path)} --help has no line `Example: hsvit {' '.join(path)} …`"
    for words in found:
        parse(path, words)


def test_an_option_that_is_gone_is_found() -> None:
    with pytest.raises(Exception, match="--gone"):
        parse(("evaluate",), ["hsvit", "evaluate", "run", "--gone"])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_example_is_shown_whole_on_a_line_of_80_columns(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for words in examples(COMMANDS[path]):
        assert f"Example: {shlex.join(words)}" in lines


def test_the_example_of_a_rank_is_taken() -> None:
    program, arguments = train.EXAMPLE.split(" hsvit_ds.train ")
    assert program.startswith("deepspeed ")
    assert train.parse(shlex.split(arguments)).overrides == ["run.seed=1"]


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"hsvit-ds {__version__}\n"
