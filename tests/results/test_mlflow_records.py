"""A run is the same from its folder and from MLflow; a server that cannot be read is refused with the remedy."""

from __future__ import annotations

import json
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.results import mlflow_records, records, rows
from hsvit_ds.run import mlflow_copy, mlflow_run, summary, table
from hsvit_ds.run.summary import held

from ..mlflow_server import served
from ..ranks import free_port
from .made import points, run

WIDTHS = ("0.25", "0.50", "1.00")
SAME = (
    *("title", "recipe", "state", "why", "epoch", "epochs", "step", "steps", "best", "best_split", "best_step"),
    *("top1", "top1_split", "images_per_sec"),
    *(f"{name}_w{width}" for name in ("best", "top1") for width in WIDTHS),
)


def send(folder: Path, uri: str) -> None:
    """As a run does it."""
    found = summary.read(folder)
    assert found is not None
    recipe = table.flat(tomllib.loads((folder / "recipe.toml").read_text()))
    copy, _ = mlflow_copy.Copy.open(uri, "hsvit-ds", folder, recipe, found)
    copy.send_metrics((folder / "metrics.jsonl").stat().st_size)
    copy.tell(found)
    if found.state != "running":
        copy.end(found.state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlflow") / "runs"
    final = {"step": 100, "test/top1": 93.7, **{f"test/top1_w{width}": 80 + float(width) for width in WIDTHS}}
    run(root / "scala-001", [*points(10, 94.25, WIDTHS), final], {"task.kind": "scala"}, widths=WIDTHS)
    run(root / "a-001", points(10, 71.0, val="dev"), {"data.val": "dev", "data.test": "dev", "optimizer.lr": 1e-05})
    run(root / "a-002", points(3, 88.0), state="stopped", why="SIGTERM")
    run(root / "a-003", points(2, 88.0), state="failed", why="rank 0 on node17: KeyError: 'x'")
    run(root / "a-004", points(4, 88.0), state="running")
    return root


@pytest.fixture(scope="module")
def uri(folder: Path) -> Iterator[str]:
    with served(folder.parent) as server:
        uri = server.uri
        for path in sorted(folder.iterdir()):
            send(path, uri)
        client = MlflowClient(uri)
        (experiment,) = [found.experiment_id for found in client.search_experiments() if found.name == "hsvit-ds"]
        client.create_run(experiment, run_name="a sweep", tags={mlflow_run.SWEEP: "1", mlflow_run.ID: "s"})
        other = client.create_run(experiment, run_name="somebody else's").info.run_id
        client.log_metric(other, "accuracy", 1.0)
        yield uri


@pytest.mark.heavy
def test_a_run_is_told_alike_from_its_folder_and_from_mlflow(folder: Path, uri: str) -> None:
    with held(folder / "a-004"):
        of_folder = {record.title: record for record in records.all_in(str(folder))}
    of_mlflow = {record.title: record for record in records.all_in(uri)}
    assert of_mlflow.keys() == of_folder.keys()
    for title, here in of_folder.items():
        there = of_mlflow[title]
        assert there.recipe == here.recipe
        assert there.splits == here.splits
        expected, found = rows.of(here).values, rows.of(there).values
        assert {name: found.get(name) for name in SAME} == {name: expected.get(name) for name in SAME}
        history, copied = here.read(), there.read()
        assert history.curves.keys() <= copied.curves.keys()
        for name, curve in history.curves.items():
            assert np.array_equal(copied.curves[name].steps, curve.steps)
            assert np.array_equal(copied.curves[name].values, curve.values)
            assert np.allclose(copied.curves[name].times, curve.times, rtol=0, atol=0.001)
        assert copied.last("train/loss") == history.last("train/loss")
        assert "no/metric" not in copied.curves


@pytest.mark.heavy
def test_runs_of_a_server_are_found_by_name_and_id_and_listed(uri: str) -> None:
    everything = records.all_in(uri)
    assert everything == sorted(everything, key=lambda record: -record.touched)
    (one,) = [record for record in everything if record.name == "a-002"]
    found = records.find(["a-003", one.id, "id-of-a-001", "a-*", uri], uri)
    assert [record.name for record in found[:3]] == ["a-003", "a-002", "a-001"]
    assert {record.name for record in found[3:]} == {"a-004", "scala-001"}
    assert urllib.request.urlopen(one.where.partition("#")[0], timeout=20).status == 200
    done = CliRunner().invoke(app, ["runs", "--runs", uri, "state=failed", "--format", "json"])
    assert [row["name"] for row in json.loads(done.stdout)] == ["a-003"]


@pytest.mark.heavy
def test_finished_runs_of_a_folder_are_sent_once_and_others_are_named(tmp_path: Path) -> None:
    run(tmp_path / "runs/a-001", points(2, 71.0))
    run(tmp_path / "runs/a-002", points(2, 72.0), state="stopped", why="SIGTERM")
    uri = f"sqlite:///{tmp_path}/all.db"
    said = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["runs", "name=a-*", "--runs", str(tmp_path / "runs"), "--to", uri])
        assert done.exit_code == 0, done.output
        said.append(sorted(done.stdout.splitlines()))
    assert said[0] == ["a-001: sent", "a-002: not sent, as it is stopped"]
    assert said[1] == ["a-001: is there already", "a-002: not sent, as it is stopped"]
    (record,) = records.all_in(uri)
    there, history = records.of_folder(tmp_path / "runs/a-001").read(), record.read()
    for name, curve in there.curves.items():
        assert np.array_equal(history.curves[name].values, curve.values)
    done = CliRunner().invoke(app, ["runs", "--runs", uri, "--to", uri])
    assert (done.exit_code, "runs are sent from a folder to a URI" in done.stderr) == (2, True)


@pytest.mark.heavy
def test_a_run_of_an_older_version_is_told_without_a_summary(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    place = client.create_experiment("hsvit-ds", (tmp_path / "artifacts").as_uri())  # not in the current folder
    made = client.create_run(place, run_name="old-001").info.run_id
    client.log_param(made, "model.kind", "hsvit")
    client.log_param(made, "run.epochs", "10")
    for step, top1 in ((1, 60.0), (2, 70.0), (3, 65.0)):
        client.log_batch(made, [Metric("val/top1", top1, 1_700_000_000_000 + step, step)])
    (record,) = records.all_in(uri)
    values = rows.of(record).values
    assert (values["best"], values["best_step"], values["top1"]) == (70.0, 2, 65.0)
    assert (record.state, record.touched, values["epochs"], values["step"]) == ("running", 1_700_000_000.003, 10, 3)
    assert record.where == f"{uri}#{made}"
    empty = client.create_run(place, run_name="new-001", tags={mlflow_run.ID: "n"}).info.run_id
    client.log_artifact(empty, str(_text(tmp_path / "summary.json", "{")))
    (found,) = records.find(["new-001"], uri)
    with pytest.raises(RefusedError, match="has no metrics"):
        found.read()


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "value", [True, False, 2, 0.5, 1e-05, [1, 2], [0.9, 0.999], [], "auto", "", "a'b", "runs/a-001", "1.2.3", "{", "-"]
)
def test_what_str_makes_of_a_recipes_value_is_read_back(value: object) -> None:
    assert mlflow_records.parsed(str(value)) == value
    assert type(mlflow_records.parsed(str(value))) is type(value)


@pytest.mark.heavy
def test_many_runs_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow answers in pages."""
    monkeypatch.setattr(mlflow_records, "PAGE", 2)
    client = MlflowClient(uri := f"sqlite:///{tmp_path}/mlflow.db")
    for number in range(5):
        client.create_run("0", run_name=f"a-{number} seed={number}", tags={mlflow_run.ID: str(number)})
        client.create_experiment(str(number))
    assert {record.name for record in records.all_in(uri)} == {f"a-{number} seed={number}" for number in range(5)}
    assert [record.name for record in records.find(["a-3", "a-1 seed=1"], uri)] == ["a-3 seed=3", "a-1 seed=1"]


class Answer(BaseHTTPRequestHandler):
    status = 401

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_GET = do_POST

    def log_message(self, *words: object) -> None: ...


@contextmanager
def answering(status: int) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), type("Answers", (Answer,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "asks for a user name and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "asks for a user name and password: set MLFLOW_TRACKING_USERNAME"),
        (404, "MLflow cannot be read there (API request to endpoint"),
        (200, "MLflow cannot be read there ("),
    ],
)
def test_a_server_that_gives_no_runs_is_refused_with_the_remedy(status: int, said: str) -> None:
    with answering(status) as host, pytest.raises(RefusedError) as refused:
        records.all_in(f"http://me:s3cr3t@{host}")
    assert said in str(refused.value)
    assert f"http://***@{host}" in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


def test_a_server_that_is_not_there_is_refused() -> None:
    done = CliRunner().invoke(app, ["runs", "--runs", f"http://me:s3cr3t@127.0.0.1:{free_port()}"])
    assert done.exit_code == 2
    assert "does not answer (Connection refused); is the server started, and the address right?" in done.stderr
    assert "s3cr3t" not in done.stderr
    with pytest.raises(RefusedError, match="does not answer"):
        records.all_in("http://nowhere.invalid:5000")


@pytest.mark.parametrize("uri", ["sqlite:///{}/gone.db", "sqlite:gone", "sqlite://"])
def test_a_database_that_is_not_there_is_refused_and_not_made(uri: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such file; a database is named sqlite:///"):
        records.all_in(uri.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_mlflow_is_refused(tmp_path: Path) -> None:
    _text(tmp_path / "text.db", "no database at all, but a text that is long enough to be taken for one" * 20)
    for uri in (f"sqlite:///{tmp_path}/text.db", "gopher://here"):
        with pytest.raises(RefusedError, match="MLflow cannot be read there"):
            records.all_in(uri)


def test_a_server_that_goes_away_while_it_is_read_is_refused() -> None:
    class Client:
        def get_metric_history(self, run: str, name: str) -> None:
            raise MlflowException("API request failed") from ConnectionError(111, "Connection refused")

    curves = mlflow_records.Curves(Client(), "http://me:s3cr3t@here", "0", ("train/loss",))
    with pytest.raises(RefusedError, match=r"^http://\*\*\*@here: does not answer \(Connection refused\)"):
        curves["train/loss"]
