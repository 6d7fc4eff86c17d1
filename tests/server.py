"""`python -m tests.server SOCKET`: forks ranks that have everything imported, which takes each rank of its own seconds.

A client connects once for each rank and sends what `python -m` would be given, with the file for its output. It is told
the rank's process id, and its exit code when it has ended. The server has no process group, no CUDA context and no
OpenMP pool that a fork could not take along. It ends with its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
from typing import Any

from hsvit_ds.engine import engine

SIZE = 1 << 20  # of a request: a rank's whole environment is in it


def load() -> None:
    """What ranks import, those of timm's models and those that draw their curves too."""
    for name in ("deepspeed", "timm", "scipy.special", "matplotlib.figure", "torch._dynamo", "hsvit_ds.run.trainer"):
        importlib.import_module(name)
    engine.import_muon()


def forked(listener: socket.socket) -> dict[str, Any]:
    """Serve until standard input ends; returns in every rank, with its request."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([sys.stdin, listener, *running], [], [])
        for handle in ready:
            if handle is sys.stdin:
                raise SystemExit
            if handle is listener:
                client, _ = listener.accept()
                message, (output, *_), _, _ = socket.recv_fds(client, SIZE, 1)
                pid = os.fork()
                if not pid:
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    for file in (listener, client, *(other for _, other in running.values())):
                        file.close()
                    os.close(output)
                    return json.loads(message)  # type: ignore[no-any-return]
                os.close(output)
                client.sendall(f"{pid}\n".encode())
                running[os.pidfd_open(pid)] = (pid, client)
            else:
                pid, client = running.pop(handle)
                os.close(handle)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                client.sendall(f"{code}\n".encode())
                client.close()


if __name__ == "__main__":
    load()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{sys.argv[1]}.partial")
        door.listen(64)
        os.rename(f"{sys.argv[1]}.partial", sys.argv[1])  # whoever sees it can connect
        request = forked(door)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
