"""The MLflow run of a run: found again or opened, also where others open theirs at the same moment."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RefusedError, first_line
from .summary import Summary

ID = "hsvit.run"
"""Tag with the id of a run, by which it is found again wherever its folder is moved to."""
SWEEP = "hsvit.sweep"
"""Tag of the run that those of a sweep belong to, with the sweep's folder."""
FILE = "mlflow.db"
"""In the folder of all runs, where no other URI is set."""
# What SQLite says where tables are made a second time, or the next ones of them are missing.
_HALF_MADE = r"duplicate column|already exists|no such (table|column)"


class Opened(NamedTuple):
    """client: MLflow's. run: id of the MLflow run. lost: the id before it, which MLflow does not have; "" for none.
    status: what MLflow said of it before it was opened."""

    client: Any
    run: str
    lost: str
    status: str


def open_run(uri: str, experiment: str, folder: Path, summary: Summary, tags: Mapping[str, str], before: str) -> Opened:
    """The MLflow run of a run: the one that it knows, or that has its id; otherwise a new one.

    Args:
        uri: "" for a file in the folder of all runs. folder: of the run. tags: of a new one. before: its id in MLflow,
        "" where none is known.

    Raises:
        RefusedError: what a person has to put right in MLflow. Others: whatever MLflow meets.
    """
    with understood(uri):
        client, artifacts = connect(uri, folder.parent)
        place = _experiment(client, experiment, artifacts)
        if found := _find(client, place, summary.id, before):
            return Opened(client, found.info.run_id, "", found.info.status)
        started = int(summary.started * 1000)
        made = client.create_run(place, start_time=started, run_name=summary.title, tags=dict(tags))
        return Opened(client, made.info.run_id, before, "RUNNING")


def connect(uri: str, root: Path) -> tuple[Any, str | None]:
    """(A client of MLflow, where a new experiment's artifacts go or None for where the server says).

    Args:
        uri: "" for a file in `root`, the folder of all runs.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # clusters reach no outside host
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    file = _file(uri, root)
    if file is None:
        return MlflowClient(uri), None
    return _open_file(uri or uri_of(file), file), (root / "artifacts").resolve().as_uri()


@contextmanager
def understood(uri: str) -> Iterator[None]:
    """Within the block a server that asks for a password is refused with what to set."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED") and " 401 " not in str(error):
            raise
        raise RefusedError(
            f"{uri} asks for a user name and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from error


def _find(client: Any, experiment: str, id: str, before: str) -> Any:
    """The MLflow run `before`, or the one of this id in an experiment; None where neither is, or they were deleted."""
    from mlflow.exceptions import MlflowException

    try:
        if before and (run := client.get_run(before)).info.lifecycle_stage == "active":
            return run
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return next(iter(client.search_runs([experiment], f"tags.`{ID}` = '{id}'", max_results=1)), None)


def open_sweep(uri: str, experiment: str, root: Path, name: str, text: str) -> str:
    """The id of the MLflow run that the runs of a sweep belong to, made where there is none.

    Args:
        root: of all runs. text: of the sweep, in markdown.
    """
    with understood(uri):
        client, artifacts = connect(uri, root)
        place = _experiment(client, experiment, artifacts)
        found = client.search_runs([place], f"tags.`{SWEEP}` = '{root.resolve() / name}'", max_results=1)
        tags = {SWEEP: str(root.resolve() / name), "mlflow.note.content": text}
        run = found[0] if found else client.create_run(place, run_name=name, tags=tags)
        client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)


def end_sweep(uri: str, root: Path, run: str, status: str) -> None:
    """status: "FINISHED", "KILLED" or "FAILED"."""
    connect(uri, root)[0].set_terminated(run, status)


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of an experiment, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another run has made it since
    if found.lifecycle_stage != "active":
        raise RefusedError(f'experiment "{name}" was deleted there: restore it, or set tracking.experiment')
    return str(found.experiment_id)


def _file(uri: str, root: Path) -> Path | None:
    """Of SQLite; None where MLflow is elsewhere."""
    if uri and not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url

    return Path(make_url(uri).database or FILE) if uri else root.resolve() / FILE


def uri_of(file: Path) -> str:
    """With the driver's name: for a plain sqlite: MLflow also makes a folder called as the path is in the URI."""
    from sqlalchemy import URL

    return URL.create("sqlite+pysqlite", database=str(file)).render_as_string()


def _open_file(uri: str, file: Path) -> Any:
    """A client of a SQLite file, whose tables MLflow makes and changes while it opens it, in many steps.

    Two that do so at once, or one that is killed meanwhile, would leave a file that nobody can open: so they take
    turns, and a new file gets its name when it is whole.
    """
    from mlflow import MlflowClient
    from sqlalchemy.exc import DatabaseError

    with _turn(file):
        if not file.exists():
            new = file.with_name(f"{file.name}.partial")
            new.unlink(missing_ok=True)
            MlflowClient(uri_of(new))
            new.rename(file)
        try:
            return MlflowClient(uri)
        except DatabaseError as error:
            if re.search(_HALF_MADE, str(error)):
                move = shlex.join(["mv", str(file), f"{file}.broken"])
                raise RefusedError(
                    f"{file} is half-migrated ({first_line(error)}): move it away ({move}), and the next run makes a "
                    "new one"
                ) from error
            raise


@contextmanager
def _turn(file: Path) -> Iterator[None]:
    """Within the block no other run opens the file."""
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, at the latest by this process's end
        yield
