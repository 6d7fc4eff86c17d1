"""Where the ranks of a run meet, before they have any group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from ..errors import RefusedError, first_line


def join(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """Make the process group of all ranks, unless there is one.

    Raises:
        RefusedError: the address cannot be listened on, or not be reached.
    """
    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:  # no launcher: one process, and no port that could be taken
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = _store(host, port, rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise RefusedError(
            f"the ranks cannot meet at {host}:{port} ({first_line(error)}); is the port in use, or the address not one "
            "of rank 0's host? Give the launcher another --master_port or --master_addr"
        ) from error


def _store(host: str, port: int, rank: int, size: int, timeout: timedelta) -> dist.Store | None:
    """What the ranks find each other by; None under torchrun, whose agent has it.

    Whoever reaches it can write to it, and PyTorch's own listens on every interface of rank 0's host.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    listening = None
    if rank == 0:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family).detach()  # the store closes it
    return dist.TCPStore(host, port, size, rank == 0, timeout, master_listen_fd=listening)
