"""Which checkpoint and which weights a command reads, what it says of them, and what it never writes over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.results.saved import open_run

from ..workers.common import steps, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    made = trainer(folder, ["ema.decay=0.9", "checkpoint.keep_last=3"], base="scala")
    lines: list[dict[str, float]] = []
    for step, top1 in enumerate((40.0, 60.0, 50.0), 1):
        steps(made, step)
        made.start = made.at = Position(0, step, step)
        made.checkpoints.save(made.at, top1)
        assert made.checkpoints.wait() is None
        lines.append({"step": step, "time": 0.0, "val/top1_w0.50": top1, "ema/val_top1_w0.50": top1 + 1})
    lines.append({"step": 3, "time": 0.0, "test/top1_w0.50": 51.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Of three checkpoints, after steps 1, 2 and 3; the second one is the best."""
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path


def command(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
    return result.exit_code, result.output


READ = [
    ([], 3, "step 3", {"val": "50.00", "test": "51.00"}),
    (["--checkpoint", "best"], 2, "step 2 (best)", {"val": "60.00"}),
    (["--checkpoint", "1"], 1, "step 1", {"val": "40.00"}),
    (["--checkpoint", "best", "--ema"], 2, "step 2 (best), averaged weights", {"val": "61.00"}),
]


@pytest.mark.parametrize(("options", "step", "said", "scores"), READ)
def test_commands_read_the_checkpoint_that_is_asked_for_and_say_which(
    options: list[str], step: int, said: str, scores: dict[str, str], run: Path
) -> None:
    code, output = command("evaluate", run, "--widths", "0.5", *options)
    assert code == 0, output
    assert f", test, {said}" in output
    (run / "export-0.50").mkdir(exist_ok=True)
    code, output = command("export", run, "--width", "0.5", *options)
    assert code == 0, output
    card = (run / "export-0.50/README.md").read_text()
    assert f", {said}, on digits." in card
    head, _, *rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")][:9]
    (own,) = [[cell.strip(" *") for cell in row] for row in rows if "**" in row[0]]
    named = [cell.strip().removesuffix(" top-1, %") for cell in head]
    assert {split: own[named.index(split)] for split in named[3:]} == scores
    expected = open_run(run, "--ema" in options, checkpoint=str(step)).model.state_dict()
    found = open_run(run, "--ema" in options, checkpoint=options[1] if options else "latest").model.state_dict()
    other = open_run(run, checkpoint=str(step % 3 + 1)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("which", ["4", "bset", "-1", "step-00000001"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(which: str, run: Path) -> None:
    for name in ("evaluate", "export"):
        code, output = command(name, run, f"--checkpoint={which}")
        assert code == 2
        assert f"no checkpoint {which} of a run there; there are latest, best, and those of steps: 1, 2, 3" in output
    (run / "checkpoints/best").unlink()
    code, output = command("evaluate", run, "--checkpoint", "best")
    assert (code, "checkpoints/best is missing" in output) == (2, True)


def test_nothing_that_another_command_made_is_written_over(run: Path) -> None:
    before = {run / name: name.encode() for name in ("widths-test.png", "present-test.png", "curves.png")}
    for file, content in before.items():
        file.write_bytes(content)
    for more in ([], ["--widths", "0.25,0.5"], ["--checkpoint", "best"], ["--ema"], ["--split", "val"]):
        code, output = command("evaluate", run, *more)
        assert code == 0, output
        made = set(run.glob("*.png")) - before.keys()
        assert len(made) == 2  # widths and classes, and not those of another evaluation either
        before |= {file: file.read_bytes() for file in made}
        assert all(file.read_bytes() == content for file, content in before.items())


def test_an_export_writes_over_another_only_when_it_is_told_to(run: Path, tmp_path: Path) -> None:
    assert command("export", run, "--width", "0.5")[0] == 0
    kept = (run / "export-0.50/README.md").read_text()
    code, output = command("export", run, "--width", "0.5", "--ema")
    assert (code, "export-0.50: there is something already" in output, "--force" in output) == (2, True, True)
    assert (run / "export-0.50/README.md").read_text() == kept
    code, output = command("export", run, "--width", "0.5", "--ema", "--force")
    assert code == 0, output
    assert "averaged weights" in (run / "export-0.50/README.md").read_text()
    weights, out = run / "export-0.50/model.safetensors", tmp_path / "own.safetensors"
    out.write_bytes(b"precious")
    code, output = command("import", weights, "--heads", "1", "-o", out)
    assert (code, out.read_bytes()) == (2, b"precious")
    code, output = command("import", weights, "--heads", "1", "-o", out, "--force")
    assert code == 0, output
    assert out.read_bytes() != b"precious"
