"""A slimmable HSViT answers with any of its submodules at any width, and each pair has a score."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.results import present
from hsvit_ds.results.saved import open_run

from .test_explain import run_of

SLIM = ["task.kind=scala", "model.widths.smallest=0.5", "model.widths.granularity=0.5"]


@pytest.mark.heavy
def test_subsets_are_scored_at_the_widths_asked_for(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", "hsvit", [*SLIM, "grid.submodule_ranks=1"])
    asked = ["evaluate", str(folder), "--present", "sweep", "--split", "val"]
    for options in ([], ["--widths", "0.5,1"]):
        result = CliRunner().invoke(app, [*asked, *options], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    assert result.output.count("submodules present") == 2
    run = open_run(folder)
    for width in run.widths("0.5,1"):
        (rows,) = present.of_folder(folder, str(width)).values()
        assert [row.subset for row in rows] == [(0,), (1,), (0, 1)]
        whole, _ = run.evaluate("val", (width,))
        assert rows[-1].top1 == pytest.approx(whole["top1"], abs=1e-4)
        if width.is_full:
            assert present.of_folder(folder) == {"val": rows}
        else:
            assert present.of_folder(folder) != {"val": rows}
