"""In MLflow the cells of a sweep belong to a run of their own, wherever they are tracked."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from hsvit_ds.run import mlflow_run, table
from hsvit_ds.sweeps.parents import Parents

from .test_cells import HSVIT, sweep

pytestmark = pytest.mark.heavy


def tracked(overrides: list[str]) -> dict[str, str]:
    """The keys that a cell's launcher is given."""
    return table.flat(table.read(Path(HSVIT), overrides).get("tracking", {}))


def test_cells_belong_to_the_run_of_their_sweep_also_when_it_is_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = f"sqlite:///{tmp_path}/own.db"
    listed = [{}, {"tracking.uri": own}, {"tracking.mlflow": False}, {"tracking.parent": "mine"}]
    made = sweep(tmp_path, "# Which one is it?\n# Nobody knows.\n", cells=listed)
    made.logs.mkdir(parents=True)
    parents = Parents(made)
    first, second, third, fourth = (tracked(parents.overrides(cell)) for cell in made.cells)
    default = mlflow_run.uri_of(tmp_path / "runs/mlflow.db")
    assert (first["uri"], second["uri"], third) == (default, own, {})
    assert fourth == {"uri": default}  # its own parent stays
    parents.end("FAILED")
    again = Parents(made)
    assert [tracked(again.overrides(cell)) for cell in made.cells] == [first, second, third, fourth]
    again.end("FINISHED")
    for found in (first, second):
        run = MlflowClient(found["uri"]).get_run(found["parent"])
        assert (run.info.run_name, run.info.status) == ("my-study", "FINISHED")
        text = run.data.tags["mlflow.note.content"]
        assert text.startswith("Which one is it?\nNobody knows.\n\n```toml\nrecipes = [")
    said = capfd.readouterr()
    assert said.out + said.err == ""  # what MLflow prints is in a file


def test_a_server_that_does_not_answer_costs_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = sweep(tmp_path, keys={"tracking.uri": "http://127.0.0.1:9"})
    made.logs.mkdir(parents=True)
    parents = Parents(made)
    assert "warning: MLflow at http://127.0.0.1:9 does not know of this sweep: " in capsys.readouterr().err
    assert tracked(parents.overrides(made.cells[0])) == {"uri": "http://127.0.0.1:9"}
    parents.end("FINISHED")
