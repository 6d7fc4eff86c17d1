"""Whether the hosts of a run can train it: every host is looked at over ssh, then all ranks sum numbers together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..errors import RefusedError, counted, read_text
from ..run import recipe as recipes
from ..run.recipe import Recipe
from . import bandwidth, checks
from .attempt import deepspeed_environment
from .checks import Cell
from .cluster import Answer, Host, on_all, rank_command, write_hostfile
from .secrets import in_environment, in_lines

ALL = "all hosts"
"""The host of a cell that is about all of them."""
ENVIRONMENT = ".deepspeed_env"
"""A file of variables that DeepSpeed's launcher gives to every rank. A blank line or a comment makes it crash."""


@dataclass
class Examination:
    """What was found. Nothing is wrong where `failures` is empty."""

    cells: list[Cell] = field(default_factory=list)
    master: str = ""
    """Address of the first host, on the interface that leads to the others."""
    port: int = 0
    """Of TCP, free on the first host a moment ago."""
    interface: str = ""
    """Name of the network interface between the hosts, the same on all of them; "" where the names differ."""
    warnings: list[str] = field(default_factory=list)
    wrote: str = ""
    """What was written, in words."""
    log: str = ""
    """What the launcher and the ranks of the all-reduce printed."""

    @property
    def failures(self) -> list[str]:
        """One line for each thing that is wrong: host, check, value, remedy."""
        return [f"{c.host}: {c.check}: {c.value}; {c.remedy}" for c in self.cells if c.remedy]


def examine(
    hosts: list[Host], recipe_path: Path | None, overrides: list[str], quick: bool, ranks: int = 0
) -> Examination:
    """Look at every host, for a recipe if one is given. Where nothing is wrong `ENVIRONMENT` is written in the working
    folder and, if not quick, an all-reduce is run over all ranks. ranks: that train; 0: one on every slot.

    Raises:
        RefusedError: the recipe cannot be read, run.root or the working folder cannot be written here, or ssh is not
            installed.
    """
    recipe = recipes.read(recipe_path, overrides) if recipe_path else None
    result = Examination([checks.launcher()])
    if recipe:
        result.cells.append(checks.training(recipe, ranks or sum(host.slots for host in hosts)))
    with _meeting_place(recipe) as folder:
        request = json.dumps(_request(recipe_path, recipe, folder))
        answers = on_all(hosts, rank_command("hsvit_ds.hosts.probe"), request)
        refused = {host: checks.unheard(host, answer) for host, answer in answers.items()}
        result.cells += [refusal or Cell(host, "ssh", "answers") for host, refusal in refused.items()]
        found = {host: _said(answer) for host, answer in answers.items() if refused[host] is None}
        if not found:
            return result
        # The answer is taken to come from the middle of the time that ssh took.
        ahead = {host: says["time"] - answers[host].sent - answers[host].took / 2 for host, says in found.items()}
        result.cells += checks.same_software(found) + checks.gpus(hosts, found) + checks.clocks(ahead)
        result.cells += checks.disk(recipe, found)
        if recipe_path and recipe:
            result.cells += checks.shared_memory(recipe, hosts, ranks or sum(h.slots for h in hosts), found)
            result.cells += checks.files(recipe_path, recipe, found)
            result.cells += checks.meetings(recipe.run.root, folder, found)
            if uri := checks.server(recipe):
                result.cells += checks.mlflow(uri, found)
    _find_ways(result, hosts, {host: says["address"] for host, says in found.items()})
    if not result.failures:
        _write_environment(result, min(found[host.name]["cores"] // host.slots for host in hosts))
        if not quick:
            result.cells.append(_all_reduce(result, hosts))
    return result


@contextmanager
def _meeting_place(recipe: Recipe | None) -> Iterator[Path]:
    """A new folder in run.root, for the hosts to leave files in; nothing without a recipe."""
    if recipe is None:
        yield Path()
        return
    folder = Path(recipe.run.root) / f".doctor-{uuid.uuid4()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RefusedError(
            f"run.root = {recipe.run.root}: cannot be written here ({error.strerror}); set it to a folder that all "
            "hosts and this machine share"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a host that is slow may still write


def _request(recipe_path: Path | None, recipe: Recipe | None, folder: Path) -> dict[str, Any]:
    """What every host is asked; see `probe.facts`."""
    if recipe is None:
        return {"files": [], "root": ".", "shared": "", "mlflow": ""}
    return {
        "files": [escape(str(recipe_path)), *checks.data_files(recipe), *checks.weight_files(recipe)],
        "root": recipe.run.root,
        "shared": str(folder),
        "mlflow": checks.server(recipe),
    }


def _said(answer: Answer) -> dict[str, Any]:
    """The last line, as JSON: a login shell may print others before it."""
    said: dict[str, Any] = json.loads(answer.out.strip().splitlines()[-1])
    return said


def _way(answer: Answer) -> dict[str, Any]:
    return _said(answer) if answer.code == 0 else {"error": "does not answer any more"}


def _find_ways(result: Examination, hosts: list[Host], addresses: dict[str, str]) -> None:
    """Fill in master, port and interface. addresses: where ssh reached each host.

    The first host may be this machine, where ssh reached it by a loopback address that is of no use to the others: so
    it is asked for its own address towards another host, and the others for theirs towards that one.
    """
    first, others = hosts[0], [host for host in hosts[1:] if host.name in addresses]
    if first.name not in addresses:
        return
    far = [addresses[host.name] for host in others if not ip_address(addresses[host.name]).is_loopback]
    command = rank_command("hsvit_ds.hosts.probe")
    answers = on_all([first], command, json.dumps({"towards": (far or [addresses[first.name]])[0]}))
    routes = {first.name: _way(answers[first.name])}
    result.master, result.port = routes[first.name].get("address", ""), routes[first.name].get("port", 0)
    if result.master:
        answers = on_all(others, command, json.dumps({"towards": result.master}))
        routes |= {host: _way(answer) for host, answer in answers.items()}
    result.cells += checks.ways(routes)
    names = {way.get("interface", "") for way in routes.values()}
    result.interface = names.pop() if len(names) == 1 else ""


def _write_environment(result: Examination, cores: int) -> None:
    """Give every rank the interface and its threads; other lines stay. cores: of a rank, 0 where ranks share them."""
    ours = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(cores, 1))}
    if result.interface:
        ours |= {name: result.interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    home, here = Path.home() / ENVIRONMENT, Path.cwd() / ENVIRONMENT
    kept = [line for line in _valid(here, "deleted", result) if line.partition("=")[0] not in ours]
    try:
        here.write_text(
            "".join(f"{line}\n" for line in [*kept, *(f"{name}={value}" for name, value in ours.items())]), "utf-8"
        )
    except OSError as error:
        raise RefusedError(f"{here}: cannot be written ({error.strerror}); start from a folder of your own") from error
    pins = f", which pins the interface {result.interface}" if result.interface else ""
    result.wrote = f"wrote {here}, variables for every rank{pins}: {', '.join(f'{k}={v}' for k, v in ours.items())}"
    if home != here:
        _valid(home, "delete it", result)


def _valid(path: Path, fate: str, result: Examination) -> list[str]:
    """The lines that the launcher can read; a warning for each other one, whose text may be a password."""
    lines = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], 1):
        if re.fullmatch(r"[A-Za-z_]\w*=.*", line):
            lines.append(line)
        else:
            result.warnings.append(
                f"{path}, line {number}: not NAME=VALUE, which makes DeepSpeed's launcher crash: {fate}"
            )
    return lines


def variables() -> tuple[dict[str, str], list[str]]:
    """(secrets, other NAME=VALUE lines) that the launcher would give to the ranks on their command lines."""
    paths = (Path.home() / ENVIRONMENT, Path(ENVIRONMENT))
    hidden, others = in_lines(line for path in paths if path.exists() for line in read_text(path).splitlines())
    return in_environment(os.environ) | hidden, others


def _all_reduce(result: Examination, hosts: list[Host]) -> Cell:
    """What `hsvit_ds.hosts.bandwidth` measures over all ranks, started by the launcher that starts the run."""
    with tempfile.TemporaryDirectory() as folder:
        hostfile, environ, log = (Path(folder) / name for name in ("hostfile", "variables", "log"))
        write_hostfile(hosts, hostfile)
        secrets, others = variables()
        environ.write_text("".join(f"{line}\n" for line in others), "utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in secrets}
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"]
        command += ["--master_addr", result.master, "--master_port", str(result.port), "--no_ssh_check"]
        with log.open("w", encoding="utf-8") as out:
            launcher = subprocess.Popen(
                [*command, "--module", "hsvit_ds.hosts.bandwidth"],
                env=deepspeed_environment(environment, environ),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # on Ctrl-C it would end every DeepSpeed job of this user on all hosts
            )
        try:
            code = launcher.wait(bandwidth.LIMIT + 60)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)  # its ranks end by themselves
                launcher.wait()
            result.log = log.read_text(errors="replace")
    measured = re.search(r'\{"backend".*\}', result.log)
    if code == 0 and measured:
        m = json.loads(measured[0])
        value = f"64 MiB at {m['bandwidth'] / 1e6:,.0f} MB/s, 4 KiB in {m['latency'] * 1e3:,.2f} ms"
        return Cell(ALL, "all-reduce", f"{value}, {counted(m['ranks'], 'rank')} over {m['backend']}")
    lines = [line.strip() for line in result.log.splitlines() if line.strip()]
    told = [line.replace("hsvit: error: ", "").partition("; ")[0] for line in lines if "hsvit: error:" in line]
    reason = (told + lines[-1:] + [f"exit code {code}"])[0][:300]
    where = result.interface or "their network"
    remedy = f"open all TCP ports above 1023 between the hosts ({where}); --debug prints what the ranks said"
    return Cell(ALL, "all-reduce", reason, remedy)
