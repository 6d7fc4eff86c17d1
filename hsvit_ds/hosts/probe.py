"""What a host says of itself: run there over ssh, it reads a request and prints one line of JSON.

Nothing is imported that takes time, or that another version there could lack.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import first_line

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "timm", "torchvision", "webdataset", "mlflow", "hsvit-ds")
UNREADABLE = "unreadable"
"""How the identity of a file begins that this user may not read."""
_SMALL = 64 * 2**20
"""Bytes up to which a file is told apart by its contents, above by its size."""


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Everything but the way to the other hosts.

    Args:
        request: files: patterns of paths to identify. root: folder of all runs. shared: a folder that was made there
            for the hosts to meet in, "" for none. mlflow: URI of a server, "" for none.
    """
    gpus, gpu_error = _gpus()
    return {
        "time": time.time(),
        # Where sshd was reached: an address of this host that no name service was asked for.
        "address": os.environ.get("SSH_CONNECTION", "127.0.0.1 0 127.0.0.1 0").split()[2],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "gpu_error": gpu_error,
        "free": _free(Path(request["root"])),
        "shared_memory": _free(Path("/dev/shm")),
        "files": {pattern: identities(pattern) for pattern in request["files"]},
        "met": _meet(Path(request["shared"])) if request["shared"] else {},
        "mlflow_error": _mlflow_error(request["mlflow"]) if request["mlflow"] else "",
    }


def route(towards: str) -> dict[str, Any]:
    """The way to the host of address `towards`: this one's address and interface there; and a free TCP port here."""
    import psutil

    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((towards, 9))  # of UDP: nothing is sent
            address = way.getsockname()[0]
    except OSError as error:
        return {"error": f"no way to {towards} ({error.strerror})"}
    cards = psutil.net_if_addrs().items()
    names = [name for name, entries in cards if any(e.address.partition("%")[0] == address for e in entries)]
    with socket.socket(family) as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    return {"address": address, "interface": names[0], "port": port, "named": _named()}


def identities(pattern: str) -> dict[str, str]:
    """{path: what tells it from another one} of all that match: its hash, the size of a large file, "folder", or
    `UNREADABLE` and why."""
    return {path: _identity(Path(path)) for path in sorted(glob.glob(pattern))}


def _identity(path: Path) -> str:
    try:
        if path.is_dir():
            return "folder"
        size = path.stat().st_size
        return f"{size} bytes" if size > _SMALL else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _code() -> str:
    """A hash over the source files of both packages, which are found but not imported."""
    digest = hashlib.sha256()
    for package in ("hsvit_ds", "hsvit_kernels"):
        found = find_spec(package)
        if found is None or found.origin is None:
            return f"{package} is missing"
        folder = Path(found.origin).parent
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".json")):
            digest.update(f"{package}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _gpus() -> tuple[list[str], str]:
    """(name, memory and driver of each GPU, what nvidia-smi complains of); nothing where it is not installed."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not end"
    lines = done.stdout.splitlines()
    return (lines, "") if done.returncode == 0 else ([], lines[0] if lines else f"exit code {done.returncode}")


def _free(folder: Path) -> int:
    """Bytes of the file system that a folder is on, or will be made on."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def _meet(folder: Path) -> dict[str, str]:
    """Leave a file in a folder that another machine has made: {"wrote": its name} or {"error": why not}."""
    name = str(uuid.uuid4())
    try:
        (folder / name).touch()
    except OSError as error:
        return {"error": str(error.strerror)}
    return {"wrote": name}


def _mlflow_error(uri: str) -> str:
    """Why the server does not answer; "" where it does."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 403) else f"HTTP {error.code}"  # asks for the password, which stays here
    except (OSError, ValueError) as error:
        return first_line(error)


def _named() -> str:
    """The address that this host's own name leads to; "" where it leads nowhere."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def main() -> None:
    request = json.load(sys.stdin)
    print(json.dumps(route(request["towards"]) if "towards" in request else facts(request)))


if __name__ == "__main__":
    main()
