"""Real hosts on this machine: each a network, UTS, PID and mount namespace with a name, an address and its own sshd.

A switch (a bridge in a namespace of its own) joins them; the control host is where launchers are started. Everything
belongs to processes whose ids are kept here: when they are killed the kernel takes namespaces, links and addresses.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..ranks import ROOT, environment

FRAMES = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"]
DIGITS = "recipes/digits/hsvit.toml"
TOOLS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "ethtool": "ethtool",
    "nsenter": "util-linux",
}


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid():
        return "namespaces need root"
    lacking = sorted({package for tool, package in TOOLS.items() if _which(tool) is None})
    return f"packages are missing: {' '.join(lacking)}" if lacking else ""


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def until(happened: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true value of `happened`."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return value


class Host:
    """A host that is on, or off."""

    def __init__(self, cluster: Cluster, name: str, number: int, serves: bool) -> None:
        self.cluster, self.name, self.serves = cluster, name, serves
        self.address, self.port = f"10.77.0.{number}", f"port{number}"
        self.mac = f"02:00:00:00:00:{number:02x}"  # the same after a restart: the others remember it
        self._holder: subprocess.Popen[bytes] | None = None
        self._wire: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.start()

    def start(self) -> None:
        """Switch on; ssh answers afterwards."""
        folder = self.cluster.folder
        script = (
            f"set -e; hostname {self.name}; mount --bind {folder}/hosts /etc/hosts; "
            f"mount --bind {folder}/ssh_config /etc/ssh/ssh_config; ip link set lo up; "
        )
        script += "mount -t tmpfs tmpfs /run; mkdir /run/sshd; " if self.serves else ""
        script += f"exec {_which('sshd')} -D -e -f {folder}/sshd_config" if self.serves else "exec sleep infinity"
        log = (folder / f"{self.name}.log").open("ab")
        # The control host shares this machine's process ids, so that a signal reaches a launcher directly.
        own = ["--pid", "--fork", "--kill-child", "--mount-proc"] if self.serves else []
        command = ["unshare", "--net", "--uts", "--mount", *own, "sh", "-c", script]
        self._holder = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = until(self._first_process, f"{self.name} starts", 10) if self.serves else self._holder.pid
        until(lambda: _namespace(self.pid, "net") != _namespace(os.getpid(), "net"), "a network", 10)
        switch = ["nsenter", f"--net=/proc/{self.cluster.switch.pid}/ns/net", "ip", "link"]
        card = ["name", "eth0", "address", self.mac, "netns", str(self.pid)]
        _run([*switch, "add", self.port, "type", "veth", "peer", *card])
        _run([*switch, "set", self.port, "master", "switch", "up"])
        inside = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip"]
        _run([*inside, "address", "add", f"{self.address}/24", "dev", "eth0"])
        _run([*inside, "link", "set", "eth0", "up"])
        if self.serves:
            until(self.answers, f"ssh to {self.name}", 20)

    def answers(self) -> bool:
        """Whether the control host reaches it by ssh."""
        return self.cluster.run(["ssh", "-o", "ConnectTimeout=1", self.name, "true"]).returncode == 0

    def _first_process(self) -> int:
        assert self._holder is not None
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    @property
    def is_on(self) -> bool:
        return self._holder is not None

    def is_idle(self) -> bool:
        """Whether it answers, and nothing of a run is left on it."""
        return not self.processes("hsvit_ds") and self.answers()

    def switch_off(self) -> None:
        """As when the power fails: nothing is said to the other hosts."""
        if self._holder is not None:
            self.shorten()
            self.unplug()
            self._holder.kill()
            self._holder.wait()
            self._holder = None
            # Connections that nobody ends may keep the namespace, and with it the card, for a while.
            switch = ["nsenter", f"--net=/proc/{self.cluster.switch.pid}/ns/net"]
            subprocess.run([*switch, "ip", "link", "delete", self.port], capture_output=True, check=False)

    def unplug(self) -> None:
        """The link is down; the host goes on."""
        self.cluster.in_switch(["ip", "link", "set", self.port, "down"])

    def plug(self) -> None:
        self.cluster.in_switch(["ip", "link", "set", self.port, "up"])

    def lengthen(self, delay: float, loss: float, rate: float = 1e9) -> None:
        """Its cable takes `delay` seconds a way, loses a share `loss` of the frames and carries `rate` bytes a second;
        until `shorten`."""
        far, near = f"far{self.port[4:]}", f"near{self.port[4:]}"
        self.cluster.in_switch(["ip", "link", "add", far, "type", "veth", "peer", "name", near])
        for card in (far, near):
            self.cluster.in_switch(["ip", "link", "set", card, "up"])
        # The wire carries frames of a cable's size, with their checksums: not what virtual cards hand each other.
        for place in (self.pid, *(h.pid for h in self.cluster.everyone if h is not self)):
            _run(["nsenter", f"--net=/proc/{place}/ns/net", "ethtool", "-K", "eth0", *FRAMES])
        self.cluster.in_switch(["ip", "link", "set", self.port, "nomaster"])
        self.cluster.in_switch(["ip", "link", "set", far, "master", "switch"])
        switch = ["nsenter", f"--net=/proc/{self.cluster.switch.pid}/ns/net"]
        wire = [
            sys.executable,
            str(Path(__file__).with_name("wire.py")),
            near,
            self.port,
            str(delay),
            str(loss),
            str(rate),
        ]
        self._wire = subprocess.Popen([*switch, *wire])

    def shorten(self) -> None:
        if self._wire is not None:
            self._wire.kill()
            self._wire.wait()
            self._wire = None
            self.cluster.in_switch(["ip", "link", "delete", f"far{self.port[4:]}"])
            self.cluster.in_switch(["ip", "link", "set", self.port, "master", "switch"])

    def command(self, command: list[str], folder: Path = ROOT) -> list[str]:
        """What runs `command` in this host."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount"]
        return [*enter, *(["--pid"] if self.serves else []), "--", "env", "-C", str(folder), *command]

    def processes(self, part: str) -> list[int]:
        """Processes of this host whose command line holds `part`, by this machine's ids."""
        found, mine = [], _namespace(self.pid, "pid")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if part in line and _namespace(int(folder.name), "pid") == mine:
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
        return sorted(found)


class Cluster:
    """Hosts `names` that take ranks, and a control host.

    Args:
        folder: keys, configurations and logs; must stay.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._write_files(names)
        self.switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        until(lambda: _namespace(self.switch.pid, "net") != _namespace(os.getpid(), "net"), "a switch", 10)
        self.in_switch(["ip", "link", "add", "switch", "type", "bridge"])
        self.in_switch(["ip", "link", "set", "switch", "up"])
        self._started: list[subprocess.Popen[str]] = []
        self.control = Host(self, "control", 254, serves=False)
        self.hosts = {name: Host(self, name, number, serves=True) for number, name in enumerate(names, 1)}

    def _write_files(self, names: list[str]) -> None:
        f = self.folder
        for key in ("host_key", "user_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(f / key)])
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)} | {"control": "10.77.0.254"}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (f / "hosts").write_text("\n".join(lines) + "\n")
        (f / "sshd_config").write_text(
            f"HostKey {f}/host_key\nAuthorizedKeysFile {f}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\nUseDNS no\n"
        )
        (f / "ssh_config").write_text(
            f"Host *\n  IdentityFile {f}/user_key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  LogLevel ERROR\n"
        )

    @property
    def everyone(self) -> list[Host]:
        return [self.control, *(host for host in self.hosts.values() if host.is_on)]

    def in_switch(self, command: list[str]) -> None:
        _run(["nsenter", f"--net=/proc/{self.switch.pid}/ns/net", *command])

    def start(
        self, command: list[str], folder: Path, host: Host | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        """Start a command, by default on the control host; standard output and error go to `folder`/output-N."""
        log = (folder / f"output-{len(self._started)}").open("w+")
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        process = subprocess.Popen(
            (host or self.control).command(command, folder),
            env=environment(**environ) | {"PATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        process.log = Path(log.name)  # type: ignore[attr-defined]
        self._started.append(process)
        return process

    def run(self, command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on the control host to its end."""
        return subprocess.run(
            self.control.command(command),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def left(self, part: str) -> dict[str, list[int]]:
        """Processes whose command line holds `part`, by host."""
        found = {name: host.processes(part) for name, host in self.hosts.items() if host.is_on}
        return {name: pids for name, pids in found.items() if pids}

    def restore(self) -> None:
        """End what was started; every host on and plugged in again."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._started.clear()
        for name, host in self.hosts.items():
            for pid in host.processes("hsvit_ds") if host.is_on else []:
                os.kill(pid, signal.SIGKILL)
            if not host.is_on:
                host.start()
            host.shorten()
            host.plug()
            until(host.is_idle, f"{name} is idle", 20)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for host in [self.control, *self.hosts.values()]:
            host.switch_off()
        self.switch.kill()
        self.switch.wait()


def deepspeed(cluster: Cluster, folder: Path, slots: dict[str, int], command: list[str]) -> subprocess.Popen[str]:
    """Start `deepspeed --hostfile` with a command on the control host."""
    return cluster.start(["deepspeed", "--hostfile", settle(folder, slots), *command], folder)


def launch(
    cluster: Cluster, folder: Path, slots: dict[str, int], overrides: list[str], *options: str, recipe: str = DIGITS
) -> subprocess.Popen[str]:
    """Start `hsvit launch` on the control host; its runs lie in `folder`/runs."""
    command = ["hsvit", "launch", str(ROOT / recipe), "--hostfile", settle(folder, slots), *options]
    return cluster.start([*command, *overrides, f"run.root={folder}/runs"], folder)


def settle(folder: Path, slots: dict[str, int]) -> str:
    """Write the hostfile, and what ranks need to know of the network, into a folder; the hostfile's path."""
    (folder / "hostfile").write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\n")
    return str(folder / "hostfile")


def finish(process: subprocess.Popen[str], code: int = 0, seconds: float = 400) -> str:
    """Wait for a started command; its output."""
    process.wait(timeout=seconds)
    assert process.returncode == code, f"exit code {process.returncode}\n{output(process)[-8000:]}"
    return output(process)


def output(process: subprocess.Popen[str]) -> str:
    """What a started command has written so far."""
    text: str = process.log.read_text()  # type: ignore[attr-defined]
    return text


def _namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
