"""Stand-ins for `deepspeed` and `ssh`: hosts in folders, and attempts that go as planned."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hsvit_ds.cli import app
from hsvit_ds.hosts import doctor, launch
from hsvit_ds.hosts.cluster import Host
from hsvit_ds.hosts.doctor import Examination

from ..ranks import ROOT

RECIPE = ROOT / "recipes/digits/hsvit.toml"
FAILS = {"code": 1, "words": {"0": ("lost", 5.0), "2": ("failed", 4.0), "3": ("failed", 6.0)}}
SLEEPS = "import time; print(flush=True); time.sleep(60)"

_SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
echo "$host $*" >> {folder}/ssh.log
grep -qx "$host" {folder}/dead && exit 255
mkdir -p {folder}/$host
exec sh -c "$(printf %s "$*" | sed "s#/tmp/hsvit-#{folder}/$host/hsvit-#g")"
"""

_DEEPSPEED = """#!{python}
import hashlib, json, os, subprocess, sys
from pathlib import Path

folder = Path("{folder}")
given = dict(zip(sys.argv[1:], sys.argv[2:]))
hosts = Path(given["--hostfile"]).read_text().split()[::2]
number = len(list(folder.glob("started-*")))
plan = json.loads((folder / "plan.json").read_text())[number]
(folder / f"started-{{number}}").write_text(json.dumps({{
    "arguments": sys.argv[1:], "hosts": hosts, "hostfile": Path(given["--hostfile"]).read_text(),
    "environment": dict(os.environ), "variables": Path(os.environ["DS_ENV_FILE"]).read_text(),
    "secrets": {{str(path.relative_to(folder)): [oct(path.stat().st_mode & 0o777), path.read_text()]
                for path in folder.glob("*/hsvit-*/secrets")}},
    "private": [oct(path.stat().st_mode & 0o777) for path in folder.glob("*/hsvit-*")],
}}))
run = Path(given["--run"])
for rank, (kind, time) in plan.get("words", {{}}).items():
    (run / "errors").mkdir(exist_ok=True)
    word = {{"rank": int(rank), "time": time, "step": 7, "kind": kind, "error": f"why-{{time}}", "attempt": number}}
    (run / "errors" / f"rank-{{int(rank):04d}}.json").write_text(json.dumps(word))
if "saved" in plan:
    (run / "checkpoints" / "step").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text("step")
    manifest = {{"format": 2, "position": {{"total": plan["saved"]}}}}
    text = json.dumps(manifest)
    (run / "checkpoints" / "step" / "manifest.json").write_text(text)
    (run / "checkpoints" / "step" / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
if "dead" in plan:
    (folder / "dead").write_text("".join(f"{{host}}\\n" for host in plan["dead"]))
for line in plan.get("says", []):
    print(line, file=sys.stderr, flush=True)
if "rank" in plan:
    command = [sys.executable, "-c", plan["rank"], "hsvit_ds.train", "--local_rank=0", "x.toml", "--run", str(run)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    rank.stdout.readline()
    (folder / "rank").write_text(str(rank.pid))
    if "code" not in plan:
        code = rank.wait()
        sys.exit(code if code >= 0 else 256 + code)
sys.exit(plan["code"])
"""


def make(folder: Path, plan: list[dict[str, Any]]) -> Path:
    """Write the programs; their folder, for PATH.

    Each attempt of the plan may have: code, of deepspeed. words: {rank: (kind, time)}, what ranks leave. saved: steps
    in the checkpoint. dead: hosts that do not answer from then on. says: lines on standard error. rank: a program that
    runs as one, and whose exit code deepspeed takes where it has none.
    """
    programs = folder / "bin"
    programs.mkdir()
    (folder / "dead").touch()
    (folder / "plan.json").write_text(json.dumps(plan))
    texts = {"ssh": _SSH, "pdsh": "#!/bin/sh\n", "deepspeed": _DEEPSPEED}
    for name, text in texts.items():
        (programs / name).write_text(text.format(folder=folder, python=sys.executable))
        (programs / name).chmod(0o755)
    return programs


@dataclass
class Clock:
    """Time that passes at once."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Runs:
    """`hsvit launch` over planned attempts, on node-1 … node-4 with two slots each."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.clock = folder, monkeypatch, Clock()
        self.found = Examination(master="10.0.0.1", port=29600)
        self.found_later: list[Examination] = []
        """What the next looks before a restart find, where it is something else."""
        self.asked: list[tuple[list[str], Path | None]] = []
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setattr(launch, "time", self.clock)
        monkeypatch.setattr(doctor, "examine", self._examine)

    def _examine(
        self, hosts: list[Host], recipe: Path | None, overrides: list[str], quick: bool, ranks: int = 0
    ) -> Examination:
        assert quick
        self.asked.append(([host.name for host in hosts], recipe))
        return self.found_later.pop(0) if self.found_later and recipe is None else self.found

    def launch(self, plan: list[dict[str, Any]], *options: str, hosts: int = 2, ranks: int = 2) -> int:
        programs = make(self.folder, plan)
        self.monkeypatch.setattr("sys.executable", str(programs / "python"))
        self.monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        (self.folder / "hostfile").write_text("".join(f"node-{n} slots=2\n" for n in range(1, hosts + 1)))
        keys = [f"run.root={self.folder}/runs", "model.submodules=4", f"grid.submodule_ranks={ranks}"]
        return self.call(*keys, *options)

    def call(self, *options: str) -> int:
        with pytest.raises(SystemExit) as ended:
            app(["launch", str(RECIPE), "--hostfile", "hostfile", *options])
        return int(ended.value.code or 0)

    def started(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"started-{number}").read_text())
        return found

    @property
    def hosts(self) -> list[list[str]]:
        """Of each attempt."""
        return [self.started(number)["hosts"] for number in range(len(list(self.folder.glob("started-*"))))]

    def during_attempt(self, action: Callable[[], None]) -> None:
        """Do something as soon as the planned rank runs."""

        def wait() -> None:
            while not (self.folder / "rank").exists() or not (self.folder / "rank").read_text():
                time.sleep(0.05)
            action()

        threading.Thread(target=wait, daemon=True).start()

    def rank_is_gone(self) -> bool:
        pid = (self.folder / "rank").read_text()
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().split()[2] == "Z"
