"""One start of a run on several hosts by DeepSpeed's launcher, to its end; and what is left of a run on its hosts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import Exit, RefusedError, warn
from ..run.processes import Stops
from .cluster import SSH_OPTIONS, Host, on_all

STOP_SECONDS = 300
"""That the ranks may take to save and end."""
_GRACE = {255: 2, Exit.STOPPED: STOP_SECONDS}
"""Seconds that the others may take to end after the ranks of a host, by its exit code: where a host is gone (255) the
others wait for it in vain."""
_OTHERWISE = 15  # s; a collective over a rank that is gone may last until its timeout
_LOOK = 0.2  # s
_ENDED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
_LEFT, _IMMORTAL = 90, 91  # exit codes of what `tidy` runs


class Ended(NamedTuple):
    """How the ranks ended. first: the host whose ranks ended first, "" where nobody told."""

    code: int
    first: str


def deepspeed_command(
    hostfile: Path, master: str, port: int, recipe: Path, folder: Path, overrides: list[str]
) -> list[str]:
    """What starts the ranks that `hostfile` names; rank 0 listens on `master`:`port`."""
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--hostfile", str(hostfile), "--force_multi", "--launcher", "pdsh", "--no_ssh_check"),
        *("--master_addr", master, "--master_port", str(port), "--module", "hsvit_ds.train"),
        *map(quoted, [str(recipe), "--run", str(folder), *overrides]),
    ]


def quoted(argument: str) -> str:
    """As `deepspeed` has to get a rank's argument: pdsh replaces %h and %n, and a shell on the host reads the rest."""
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    # DeepSpeed puts double quotes around such a one and escapes those in it, but nothing else.
    return re.sub(r"([\\$`])", r"\\\1", argument)


def deepspeed_environment(environment: Mapping[str, str], variables: Path) -> dict[str, str]:
    """Of deepspeed: `variables` is a file of NAME=VALUE lines for the ranks."""
    ssh = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    return {**environment, "DS_ENV_FILE": str(variables.absolute()), "PDSH_SSH_ARGS_APPEND": ssh}


def _processes(folder: Path) -> str:
    """Extended regular expression for the command lines of a run's processes, but for none that holds it."""
    return "[-]-run " + re.sub(r"([][\\.^$*+?(){}|])", r"\\\1", str(folder)) + "( |$)"


def _ranks(folder: Path) -> str:
    """The same for its ranks alone: DeepSpeed's launcher would die of SIGUSR1."""
    return "hsvit_ds.train --local_rank=.* " + _processes(folder)


def running(hosts: Sequence[Host], folder: Path) -> list[str]:
    """The hosts with processes of a run.

    Raises:
        RefusedError: a host lacks pgrep.
    """
    answers = on_all(list(hosts), ["pgrep", "-f", _processes(folder)])
    for name, answer in answers.items():
        if answer.code not in (0, 1, 255):
            raise RefusedError(f"{name}: pgrep does not work ({answer.error.strip()}); install procps there")
    return [name for name, answer in answers.items() if answer.code == 0]


def tidy(hosts: Sequence[Host], folder: Path) -> dict[str, bool]:
    """Kill what is left of a run: {host that answers and is free of it: whether something was left}."""
    pattern = shlex.quote(_processes(folder))
    script = (
        f"pgrep -f {pattern} > /dev/null || exit 0; "
        f"pkill -KILL -f {pattern}; for second in 1 2 3 4 5 6 7 8 9 10; do sleep 1; "
        f"pgrep -f {pattern} > /dev/null || exit {_LEFT}; done; exit {_IMMORTAL}"
    )
    answers = on_all(list(hosts), ["sh", "-c", script])
    for name, answer in answers.items():
        if answer.code == _IMMORTAL:
            warn(f"{name}: processes of the run cannot be killed; left out")
    return {name: answer.code == _LEFT for name, answer in answers.items() if answer.code in (0, _LEFT)}


class Attempt:
    """deepspeed, and the ranks that it started.

    Args:
        command, environment: of deepspeed. hosts: that take ranks. folder: of the run.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], hosts: Sequence[Host], folder: Path) -> None:
        self.hosts, self.folder = list(hosts), folder
        self._first: tuple[str, int, float] | None = None
        """The host whose ranks ended first, their exit code, and when."""
        self._gone: set[str] = set()
        """Hosts that ssh has lost."""
        self._killed = False
        # In a session of its own: Ctrl-C reaches us alone, and on SIGINT or SIGTERM deepspeed would end every DeepSpeed
        # job of this user on these hosts.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            match = _ENDED.match(line)
            if match and self._first is None:
                self._first = match[1], int(match[2]), time.monotonic()
            if match and match[2] == "255":
                self._gone.add(match[1])
            with suppress(OSError):  # whoever read it is gone
                sys.stderr.write(line)
                sys.stderr.flush()

    def wait(self, stops: Stops) -> Ended:
        """Until deepspeed has ended.

        Asked to stop, the ranks are asked. They are killed at the second request, when they have not ended after
        `STOP_SECONDS`, and when those of one host have ended and the others do not follow.
        """
        heard, next_call = False, 0.0
        while self._process.poll() is None:
            time.sleep(_LOOK)
            if stops.count and not heard and time.monotonic() > next_call:
                heard, next_call = self._ask(), time.monotonic() + 2
            if self._is_overdue(stops):
                self._kill()
        self._reader.join(timeout=5)  # the ssh to a host that is gone may hold the pipe longer
        return self._ended(stops)

    def _ask(self) -> bool:
        """Ask the ranks to save and stop; whether one has heard it, as it tells the others. At first there is none."""
        answers = on_all(self.hosts, ["pkill", "-USR1", "-f", _ranks(self.folder)])
        return any(answer.code == 0 for answer in answers.values())

    def _is_overdue(self, stops: Stops) -> bool:
        now = time.monotonic()
        if stops.count > 1 or (stops.count and now - stops.since > STOP_SECONDS):
            return True
        return self._first is not None and now - self._first[2] > _GRACE.get(self._first[1], _OTHERWISE)

    def _kill(self) -> None:
        self._killed = True
        there = [host for host in self.hosts if host.name not in self._gone]
        on_all(there, ["pkill", "-KILL", "-f", _processes(self.folder)])
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ended(self, stops: Stops) -> Ended:
        code, first = self._process.returncode, ""
        if self._first is not None:
            first = self._first[0]
            code = self._first[1] if self._killed else code
        elif self._killed or code < 0:
            code = Exit.FAILED
        # Python, while it starts, dies of the signal that later asks it to stop: nothing was there to be saved.
        if stops.count and code == 256 - signal.SIGUSR1:
            code = Exit.STOPPED
        return Ended(code, first)
