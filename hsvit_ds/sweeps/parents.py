"""The MLflow runs that the cells of a sweep belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Log, RefusedError, first_line, warn
from ..run import mlflow_run
from ..run.tracking import Config
from .cells import Cell, Sweep


class Parents:
    """One in every MLflow, and experiment of it, that the cells name; by default that of the folder of all runs.

    What MLflow does not take costs a warning: the cells are then runs of no sweep there.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._default = mlflow_run.uri_of(sweep.root.resolve() / mlflow_run.FILE)
        self._opened: dict[tuple[str, str], str] = {}
        """{(URI, experiment): id}."""
        for uri, experiment in dict.fromkeys(
            self._place(cell.recipe.tracking) for cell in sweep.cells if cell.recipe.tracking.mlflow
        ):
            with self._quiet(uri):
                self._opened[uri, experiment] = mlflow_run.open_sweep(
                    uri, experiment, sweep.root, sweep.name, _text(sweep)
                )

    def _place(self, config: Config) -> tuple[str, str]:
        return config.uri or self._default, config.experiment

    def overrides(self, cell: Cell) -> list[str]:
        """Of a cell: where MLflow is, and what it belongs to there."""
        config = cell.recipe.tracking
        if not config.mlflow:
            return []
        place = self._place(config)
        parent = "" if config.parent else self._opened.get(place, "")
        return [f"tracking.uri={place[0]}", *([f"tracking.parent={parent}"] if parent else [])]

    def end(self, status: str) -> None:
        """status: "FINISHED", "KILLED" or "FAILED"."""
        for (uri, _), run in self._opened.items():
            with self._quiet(uri):
                mlflow_run.end_sweep(uri, self._sweep.root, run, status)

    @contextmanager
    def _quiet(self, uri: str) -> Iterator[None]:
        """Within the block what MLflow prints goes to a file, and what it does not take is told."""
        log = Log(debug=False)
        with log.kept():
            log.open(self._sweep.logs / "sweep.log")
            try:
                yield
            except Exception as error:  # whatever a remote service does must not touch the sweep
                why = str(error) if isinstance(error, RefusedError) else first_line(error)
                warn(f"MLflow at {uri} does not know of this sweep: {why}")


def _text(sweep: Sweep) -> str:
    """The sweep's file, its first comment as prose."""
    lines = sweep.text.splitlines()
    count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    question = "\n".join(line.removeprefix("#").strip() for line in lines[:count])
    rest = "\n".join(lines[count:]).strip()
    return f"{question}\n\n```toml\n{rest}\n```".strip()
