"""Runs as MLflow has them, on a server or in a database."""

from __future__ import annotations

import ast
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RefusedError, first_line, masked, warn
from ..run import metrics, mlflow_copy, mlflow_run, summary
from ..run.summary import FAILED, RUNNING, STOPPED, Summary
from .history import Curve, History
from .record import Latest, Record

_STATES = {status: state for state, status in mlflow_copy.STATUS.items()}
# Ours by their tag, or, of an older version, by a parameter that every recipe has.
_FILTERS = (f"tags.`{mlflow_run.ID}` LIKE '%'", "params.`model.kind` LIKE '%'")
PAGE = 1000
"""Runs of an answer."""
_AT_ONCE = 8
"""Requests that wait for a server beside each other."""


def is_uri(text: str) -> bool:
    return "://" in text or text.startswith("sqlite:")


def at(uri: str) -> list[Record]:
    """All runs of this program there, those that were touched last first; of a sweep its cells alone.

    Raises:
        RefusedError: nothing answers there, or it wants a password.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    place = _database(uri) if uri.startswith("sqlite") else uri
    with readable(uri):
        client, _ = mlflow_run.connect(place, Path())
        runs = [run for run in _runs(client) if run.data.metrics or mlflow_run.SWEEP not in run.data.tags]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            summaries = list(pool.map(partial(_summary, place), runs))
    found = [_record(client, uri, *pair) for pair in zip(runs, summaries, strict=True)]
    return sorted(found, key=lambda record: -record.touched)


def _database(uri: str) -> str:
    """Of a file that is there: MLflow would make one."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    with suppress(ArgumentError):
        file = Path(make_url(uri).database or "")
        if file.is_file():
            return mlflow_run.uri_of(file)
    raise RefusedError(f"{masked(uri)}: no such file; a database is named sqlite:///runs/mlflow.db, or sqlite:////…")


@contextmanager
def readable(uri: str) -> Iterator[None]:
    """Within the block whatever MLflow meets is refused with what a person can do about it."""
    where = masked(uri)
    try:
        with mlflow_run.understood(where):
            yield
    except RefusedError:
        raise
    except Exception as error:  # whatever a remote service does
        causes = list(_causes(error))
        if any(isinstance(cause, OSError) for cause in causes):  # as those of requests are
            why = masked(getattr(causes[-1], "strerror", None) or str(causes[-1]))
            raise RefusedError(
                f"{where}: does not answer ({why}); is the server started, and the address right?"
            ) from error
        raise RefusedError(f"{where}: MLflow cannot be read there ({masked(first_line(error))})") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _runs(client: Any) -> list[Any]:
    """Of all experiments that were not deleted, each once."""
    experiments = [found.experiment_id for found in _pages(client.search_experiments)]
    found = {
        run.info.run_id: run
        for wanted in _FILTERS
        for run in _pages(client.search_runs, experiment_ids=experiments, filter_string=wanted)
    }
    return list(found.values())


def _pages(search: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**arguments, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _summary(place: str, run: Any) -> Summary | None:
    """None of a run of an older version, or where it cannot be read, which is said."""
    from mlflow.artifacts import download_artifacts

    if mlflow_run.ID not in run.data.tags:
        return None
    uri = f"{run.info.artifact_uri}/{summary.FILE}"  # a client's own way asks for the run again, three times
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=place)
            return summary.of(json.loads(Path(file).read_text("utf-8")))
    except Exception as error:  # of whatever keeps the artifacts
        warn(f"MLflow run {run.info.run_id}: its {summary.FILE} cannot be read ({masked(first_line(error))})")
        return None


def _record(client: Any, uri: str, run: Any, found: Summary | None) -> Record:
    info, points = run.info, run.data.to_proto().metrics
    state = _STATES.get(info.status, RUNNING)
    times = [point.timestamp for point in points] or [info.start_time]
    page = f"{masked(uri).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    steps = [point.step for point in points if not point.key.startswith("system/")]
    values = {point.key: point.value for point in points}
    kept = metrics.current({point.key: point.step for point in points})
    latest = Latest({name: values[name] for name in kept}, max(steps, default=0))
    curves = Curves(client, uri, info.run_id, tuple(sorted(values)))
    name = info.run_name or info.run_id

    def read() -> History:
        if not latest.values:
            raise RefusedError(f"{name}: its run in MLflow, {info.run_id}, has no metrics")
        return History(curves)

    return Record(
        name=name,
        where=page if uri.startswith("http") else f"{masked(uri)}#{info.run_id}",
        title=found.title if found else name,
        recipe={key: parsed(value) for key, value in run.data.params.items()},
        summary=found,
        state=state,
        why=found.why if found and state in (FAILED, STOPPED) else "",
        touched=(info.end_time or max(times)) / 1000,
        read=read,
        latest=latest,
        id=info.run_id,
    )


def parsed(text: str) -> Any:
    """The value of a recipe that MLflow has as `str` wrote it: "True", "[1, 2]", "0.5", or a string as it is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | list) else text


class Curves(Mapping[str, Curve]):
    """By metric; fetched when one is asked for, once.

    Args:
        names: of the metrics that the run has.
    """

    def __init__(self, client: Any, uri: str, run: str, names: tuple[str, ...]) -> None:
        self._client, self._uri, self._run = client, uri, run
        self._names = names
        self._known: dict[str, Curve] = {}

    def __getitem__(self, name: str) -> Curve:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            with readable(self._uri):
                points = self._client.get_metric_history(self._run, name)
            points = sorted(points, key=lambda point: (point.timestamp, point.step))
            self._known[name] = Curve(
                np.array([point.step for point in points], np.int64),
                np.array([point.value for point in points], np.float64),
                np.array([point.timestamp / 1000 for point in points], np.float64),
            )
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
