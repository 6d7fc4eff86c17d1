"""A real MLflow server on this machine, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from .ranks import environment, free_port

PATIENCE = 180  # s; it imports for long on a busy machine


class Server:
    """folder: of its database and artifacts."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers."""
        store = [
            f"--backend-store-uri=sqlite:///{self.folder}/server.db",
            f"--artifacts-destination={self.folder}/files",
        ]
        place = ["--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        command = [str(Path(sys.executable).with_name("mlflow")), "server", *place, *store, *self.options]
        with (self.folder / "server.log").open("ab") as log:
            # A group of its own, since it starts others.
            self._process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < until, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    """Within the block one answers. options: of `mlflow server`."""
    server = Server(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
