"""What libraries print is in the run's log; what is said to a person, and what a crash says, on the terminal."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .engine.test_checkpoint import train_arguments
from .ranks import ROOT, environment, finish, fork

SCRIPT = """
import logging, os, subprocess, sys, threading, warnings
from pathlib import Path
from hsvit_ds.errors import Log, out, tell, warn
early = logging.StreamHandler()
log = Log(len(sys.argv) > 2)
with log.kept():
    logging.getLogger("other").addHandler(logging.StreamHandler())
    print("library before", flush=True)
    log.open(Path(sys.argv[1]))
    print("library prints")
    sys.stderr.write("library complains\\n")
    warnings.warn("library warns")
    logging.getLogger("other").warning("library logs")
    os.write(1, b"native prints\\n")
    subprocess.run("echo compiler complains >&2", shell=True)
    log.is_set_up()
    print("for a person", file=out())
    warn("ours")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    os.write(2, b"native crash\\n")
    {end}
"""
LIBRARIES = ("library prints", "library complains", "library warns", "library logs", "native prints", "compiler compl")
PERSON = ("library before", "for a person", "hsvit: warning: ours", "ZeroDivisionError", "native crash")


def run(end: str, path: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end), str(path), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise ValueError('a defect')", 1, "ValueError: a defect"),
        ("os._exit(3)", 3, ""),
        ("import faulthandler; faulthandler.enable(); os.abort()", -6, ""),
        ("tell('last words'); os.kill(os.getpid(), 11)", -11, "last words"),
    ],
)
def test_libraries_are_in_the_log_and_a_person_reads_the_rest(end: str, code: int, said: str, tmp_path: Path) -> None:
    ended, output = run(end, tmp_path / "log.txt")
    assert ended == code
    log = (tmp_path / "log.txt").read_text()
    for text in LIBRARIES:
        assert text in log
        assert text not in output
    for text in (*PERSON, said):
        assert text in output
        assert not text or text not in log


@pytest.mark.heavy
def test_debugging_shows_both(tmp_path: Path) -> None:
    _, output = run("pass", tmp_path / "log.txt", "--debug")
    for text in (*LIBRARIES, *PERSON):
        assert text in output
    log = (tmp_path / "log.txt").read_text()
    for text in LIBRARIES:
        assert text in log


@pytest.mark.heavy
def test_a_log_that_cannot_be_written_leaves_it_on_the_terminal(tmp_path: Path) -> None:
    _, output = run("pass", tmp_path / "none" / "log.txt")
    assert "log.txt: No such file or directory; what libraries print stays on the terminal" in output
    for text in (*LIBRARIES, *PERSON):
        assert text in output


@pytest.mark.heavy
def test_a_run_says_nothing_of_its_libraries_and_each_rank_has_a_log(tmp_path: Path) -> None:
    output = finish(fork("hsvit_ds.train", [*train_arguments(tmp_path), "run.epochs=1", "tracking.mlflow=true"], 2))
    folder = tmp_path / "digits-hsvit-001"
    assert "mlflow.store" not in output
    assert "mlflow.store" in (folder / "log.txt").read_text()
    assert (folder / "log-0001.txt").exists()
    assert "best val/top1" in output
    assert f"hsvit evaluate {folder}" in output
    assert f"mlflow ui --backend-store-uri sqlite+pysqlite:///{tmp_path}/mlflow.db" in output


def test_ranks_print_for_a_person_by_way_of_errors_alone() -> None:
    """On sys.stderr it would be in the log."""
    found = [
        path.relative_to(ROOT)
        for room in ("data", "engine", "grid", "models", "run", "tasks")
        for path in (ROOT / "hsvit_ds" / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if ast.unparse(node) in ("sys.stderr", "sys.stdout")
    ]
    assert found == []
