"""A run on several hosts, started by DeepSpeed's launcher and started again until it is finished."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.checkpoint_files import pointed, read_manifest
from ..errors import Exit, RefusedError, counted, masked
from ..run import folders
from ..run import recipe as recipes
from ..run.processes import Stops
from ..run.recipe import Recipe
from ..run.summary import rank_words
from . import attempt, doctor
from .attempt import Attempt, Ended
from .cluster import Host, write_hostfile
from .layout import fitted, whole
from .secrets import VARIABLE, Secrets

FAILURES = 3
"""In a row without a newer checkpoint, after which a run is given up."""
LONGEST_PAUSE = 300  # s
_LOOK = 0.2  # s


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to start, and how long to go on with it."""

    recipe: Path
    overrides: list[str]
    hosts: int
    """That take ranks, the first ones of the hostfile; the others are spares. 0: all of them."""
    max_restarts: int
    shrink: bool
    """Go on with fewer ranks where a host is gone and there is no spare."""
    resume: bool
    """Continue the newest run of the recipe's name."""


class Failure(NamedTuple):
    """Why the ranks ended. host: of the rank that failed first, "" where none is known."""

    host: str
    text: str


def prepare(options: Options, hosts: list[Host]) -> Launch:
    """Look at the hosts and make the run's folder.

    Raises:
        RefusedError: what cannot be started. SystemExit: what the hosts lack, printed.
    """
    if options.hosts > len(hosts):
        raise RefusedError(f"--hosts {options.hosts}: the hostfile names {len(hosts)}; add hosts to it")
    recipe = recipes.read(options.recipe, options.overrides)
    ranks = sum(host.slots for host in hosts[: options.hosts or None])
    found = doctor.examine(hosts, options.recipe, options.overrides, quick=True, ranks=ranks)
    for warning in found.warnings:
        _say(f"warning: {warning}")
    if found.failures:
        for failure in found.failures:
            print(f"hsvit: error: {failure}", file=sys.stderr, flush=True)
        raise SystemExit(int(Exit.REFUSED))
    there = folders.newest(recipe.run) if options.resume else None
    folder = (there or folders.claim(recipe.run)).absolute()
    if busy := attempt.running(hosts, folder):  # a new one too: of a run whose folder was removed meanwhile
        if there is None:
            folder.rmdir()
        raise RefusedError(f"{folder} is still going on {', '.join(busy)}; stop it before you resume it")
    try:
        (folder / "launch").mkdir(exist_ok=True)
    except OSError as error:
        raise RefusedError(f"run folder {folder}: {error.strerror}; set run.root") from error
    return Launch(options, recipe, hosts, folder, found)


class Launch:
    """One run, from start to start.

    Args:
        hosts: of the hostfile. folder: of the run, absolute. found: what was seen of the hosts.
    """

    def __init__(
        self, options: Options, recipe: Recipe, hosts: list[Host], folder: Path, found: doctor.Examination
    ) -> None:
        self.options, self.recipe, self.hosts, self.folder, self.found = options, recipe, hosts, folder, found
        self.first = hosts[: options.hosts or len(hosts)]
        """Those of the first attempt; as many as take ranks whenever there are enough."""
        self.degraded = recipe.run.survive == "degraded"
        self.layout = whole(self.first, recipe)
        self.secrets = Secrets(doctor.variables()[0])
        self.stops = Stops()
        self.attempts, self.restarts = 0, 0
        self.saved = steps_saved(folder)
        self.failures, self.pauses = 0, 0
        """Since there was a newer checkpoint."""
        self.suspect = ""
        """Host of the rank that failed first the last time."""
        self.failed: dict[str, int] = {}
        """Hosts that failed: the last attempt in which they did."""

    def run(self) -> Exit:
        """Until the run is finished, stopped or refused.

        Raises:
            RefusedError: it cannot go on, with the failure.
        """
        try:
            with self.stops.heard():
                return self._run()
        finally:
            if left := [host.name for host in self.secrets.left]:
                _say(f"warning: {', '.join(left)} did not answer and may still have {self.secrets.path}")

    def _run(self) -> Exit:
        hosts = self.first
        while hosts:
            ended, failure, free = self._attempt(hosts)
            if ended.code == Exit.FINISHED:
                return Exit.FINISHED
            if ended.code == Exit.REFUSED:
                _say("the ranks were refused; not started again")
                return Exit.REFUSED
            if ended.code == Exit.STOPPED:
                break
            _say(f"attempt {self.attempts} failed: {failure.text}")
            if self.stops.count:
                raise RefusedError(f"asked to stop, but {failure.text}; --resume goes on from the last checkpoint")
            hosts = self._next(failure, free)
        _say(f"{self.folder} is stopped; --resume goes on with it")
        return Exit.STOPPED

    # One attempt

    def _attempt(self, hosts: list[Host]) -> tuple[Ended, Failure, set[str]]:
        """Start the ranks and wait for their end: how, what failed first, the hosts that answer and are free again."""
        self.attempts += 1
        if self.attempts > 1:  # the first host may be another, and its port was free some time ago
            self.found = doctor.examine(hosts, None, [], quick=True)
            if not self.found.master:
                return self._unmet(hosts[0].name)
        if hosts == self.first:
            self.layout = whole(hosts, self.recipe)
        else:  # without a checkpoint there is nothing that an absent submodule could keep
            self.layout = fitted(hosts, self.recipe, self.layout, self.degraded and self.saved >= 0)
        _say(f"attempt {self.attempts}: {self.layout}")
        hostfile, variables = self._files()
        overrides = [*self.options.overrides, *self.layout.overrides(self.recipe)]
        command = attempt.deepspeed_command(
            hostfile, self.found.master, self.found.port, self.options.recipe, self.folder, overrides
        )
        _say(masked(shlex.join(command)))
        environment = {name: value for name, value in os.environ.items() if name not in self.secrets.values}
        before = rank_words(self.folder)
        try:
            self.secrets.put(list(self.layout.hosts))
            environment = attempt.deepspeed_environment(environment, variables)
            ended = Attempt(command, environment, self.layout.hosts, self.folder).wait(self.stops)
        finally:
            found = attempt.tidy(self.hosts, self.folder)
            self.secrets.remove(found)
        if ended.code == Exit.FINISHED and any(found.values()):
            ended = Ended(Exit.FAILED, "")  # when pdsh is killed deepspeed ends with 0
        words = [word for word in rank_words(self.folder) if word not in before]
        return ended, first_failure(words, self.layout.places, set(found), ended), set(found)

    def _unmet(self, host: str) -> tuple[Ended, Failure, set[str]]:
        free = set(attempt.tidy(self.hosts, self.folder))
        return Ended(Exit.FAILED, host), Failure(host, f"{host} does not answer, or has no way to the others"), free

    def _files(self) -> tuple[Path, Path]:
        """The attempt's hostfile, and the variables of its ranks as DeepSpeed reads them, in the run's folder."""
        hostfile, variables = (
            self.folder / "launch" / f"{name}-{self.attempts:03d}" for name in ("hostfile", "variables")
        )
        write_hostfile(list(self.layout.hosts), hostfile)
        _, lines = doctor.variables()
        lines += [f"{VARIABLE}={self.secrets.path}"] if self.secrets.values else []
        variables.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return hostfile, variables

    # Between two attempts

    def _next(self, failure: Failure, free: set[str]) -> list[Host]:
        """The hosts of the next attempt, after a pause where one may help; none when asked to stop meanwhile.

        Raises:
            RefusedError: no more attempts.
        """
        if (saved := steps_saved(self.folder)) > self.saved:
            self.saved, self.failures, self.pauses = saved, 0, 0
        else:
            self.failures += 1
        if self.failures == FAILURES:
            raise RefusedError(
                f"{counted(FAILURES, 'failure')} in a row without a newer checkpoint; the last one: {failure.text}"
            )
        culprit = failure.host if failure.host == self.suspect else ""
        self.suspect = failure.host
        had = [host.name for host in self.layout.hosts]
        self.failed |= {name: self.attempts for name in had if name not in free or name == culprit}
        while not self.stops.count:
            self.restarts += 1
            if self.restarts > self.options.max_restarts:
                raise RefusedError(f"--max-restarts {self.options.max_restarts} are used up; {failure.text}")
            hosts = self._choose(free, culprit)
            if hosts and not set(had) <= {host.name for host in hosts}:
                return hosts  # without a pause: what failed was left out, or replaced
            missing = ", ".join(host.name for host in self.hosts if host.name not in free)
            self._pause("starts again" if hosts else f"waits for {missing}")
            free = set(attempt.tidy(self.hosts, self.folder))
            hosts = self._choose(free, culprit)
            if hosts and not self.stops.count:
                return hosts
        return []

    def _choose(self, free: set[str], culprit: str) -> list[Host]:
        """As many hosts as take ranks, those that never failed first; fewer where the run may shrink; or none."""
        shrinks = self.options.shrink or self.degraded
        usable = [host for host in self.hosts if host.name in free]
        others = [host for host in usable if host.name != culprit]
        if len(others) >= len(self.first) or (shrinks and others):
            usable = others
        if len(usable) < len(self.first) and not shrinks:
            return []
        chosen = sorted(usable, key=lambda host: self.failed.get(host.name, 0))[: len(self.first)]
        return [host for host in self.hosts if host in chosen]

    def _pause(self, why: str) -> None:
        seconds = min(2**self.pauses, LONGEST_PAUSE)
        self.pauses += 1
        _say(f"restart {self.restarts} of at most {self.options.max_restarts}: {why}, in {seconds} s")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stops.count:
            time.sleep(_LOOK)


def steps_saved(folder: Path) -> int:
    """Of a run's latest checkpoint; -1 without one that can be read."""
    try:
        latest = pointed(folder / "checkpoints", "latest")
        return int(read_manifest(latest)["position"]["total"]) if latest else -1
    except RefusedError:
        return -1


def first_failure(words: list[dict[str, Any]], places: list[str], free: Collection[str], ended: Ended) -> Failure:
    """The rank that failed first, and how.

    Args:
        words: of the attempt's ranks. places: the host of each rank. free: hosts that answer.
    """
    if causes := [word for word in words if word["kind"] != "lost"]:
        first = min(causes, key=lambda word: word["time"])
        host = places[first["rank"]]
        text = f"rank {first['rank']} on {host} {first['kind']} after step {first['step']}: {first['error']}"
        return Failure(host, masked(text))
    told = {word["rank"] for word in words}
    silent = [rank for rank in range(len(places)) if rank not in told]
    if gone := [rank for rank in silent if places[rank] not in free]:
        silent = gone
    elif not words:  # the others may have been killed while they waited for those of the first host
        silent = [rank for rank in silent if places[rank] == ended.first]
    if not silent:
        return Failure("", f"no rank failed by itself; deepspeed's exit code is {ended.code}, its output is above")
    host = places[silent[0]]
    ranks = [str(rank) for rank in silent if places[rank] == host]
    if len(ranks) == 1:
        return Failure(host, f"rank {ranks[0]} on {host} left no word: killed, or its host is gone")
    return Failure(host, f"ranks {', '.join(ranks)} on {host} left no word: killed, or their host is gone")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"hsvit: {text}", flush=True)
