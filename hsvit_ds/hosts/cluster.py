"""The hosts of a run: the hostfile, and commands on them over ssh."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefusedError, read_text

SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=5 "  # never ask, never wait for a host that is gone
    "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"  # without it ssh never notices a link that is down
)
NO_FOLDER, NO_PYTHON = 97, 98
"""Exit codes of `rank_command` where the working folder, or this interpreter, is not there."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks that it takes."""

    @property
    def address(self) -> str:
        """Its name without the user to log in as."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Answer:
    """What a command on a host did. code: 255 where the host was not reached. sent: when, in seconds since 1970, and
    took: seconds, by this machine's clock."""

    code: int
    out: str
    error: str
    sent: float = 0
    took: float = 0


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in a file of lines `NAME slots=N`, in their order.

    Raises:
        RefusedError: not there, or a line that is wrong. DeepSpeed would silently start on the local machine alone
            where the file is missing.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise RefusedError(
            f"hostfile {path}: cannot be read ({error.strerror}); write a line `NAME slots=N` for every host"
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None:
            raise RefusedError(f"{path}, line {number}: `{text}` is not `NAME slots=N`, as in `node-1 slots=8`")
        name, slots = match[1], int(match[2])
        if slots < 1:
            raise RefusedError(f"{path}, line {number}: {name} has slots={slots}; at least 1, or delete the line")
        if name in hosts:
            raise RefusedError(f"{path}, line {number}: {name} is listed twice; add its slots up in one line")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise RefusedError(f"hostfile {path} names no host; write a line `NAME slots=N` for every host")
    return list(hosts.values())


def write_hostfile(hosts: list[Host], path: Path) -> None:
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), "utf-8")


def rank_command(module: str) -> list[str]:
    """What runs a module on a host as DeepSpeed's launcher runs the ranks: by the path of this interpreter, in this
    working folder, with its PYTHONPATH."""
    folder = os.getcwd()
    path = f"{folder}:{os.environ['PYTHONPATH']}" if "PYTHONPATH" in os.environ else folder
    python = shlex.quote(sys.executable)
    script = (
        f"cd {shlex.quote(folder)} || exit {NO_FOLDER}; test -x {python} || exit {NO_PYTHON}; "
        f"PYTHONPATH={shlex.quote(path)} exec {python} -m {module}"
    )
    return ["sh", "-c", script]


def ssh(host: str, command: list[str], given: str = "", timeout: float = 60) -> Answer:
    """Run `command` on a host, with `given` as its standard input."""
    sent, started = time.time(), time.monotonic()
    try:
        done = subprocess.run(
            ["ssh", *SSH_OPTIONS.split(), host, shlex.join(command)],
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(255, "", f"no answer within {timeout:g} s", sent, timeout)
    except FileNotFoundError:
        raise RefusedError("ssh is not installed here; install an OpenSSH client") from None
    return Answer(done.returncode, done.stdout, done.stderr, sent, time.monotonic() - started)


def on_all(hosts: list[Host], command: list[str], given: str = "", timeout: float = 60) -> dict[str, Answer]:
    """Run `command` on every host at once; the answers by host."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = pool.map(lambda host: ssh(host.name, command, given, timeout), hosts)
        return {host.name: answer for host, answer in zip(hosts, answers, strict=True)}
