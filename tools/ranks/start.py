"""Ranks as forks of this process, which has everything imported."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hsvit_ds.run.processes import find_port

T = TypeVar("T")


def forked(worlds: list[int], function: Callable[[], T]) -> list[T]:
    """What a function returns on every rank of some worlds, which run at the same time; ranks by world.

    Raises:
        RuntimeError: a rank failed, whose stack trace is on standard error.
    """
    with tempfile.TemporaryDirectory() as name:
        ranks: list[tuple[int, Path]] = []
        for world in worlds:
            port = str(find_port())
            for rank in range(world):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                place |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                ranks.append((_fork(function, place, Path(name) / f"{len(ranks)}"), Path(name) / f"{len(ranks)}"))
        codes = [os.waitpid(child, 0)[1] for child, _ in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        return [pickle.loads(path.read_bytes()) for _, path in ranks]


@contextmanager
def awake() -> Iterator[None]:
    """Keep all cores busy with what gives way to anything else: a virtual machine's core that sleeps takes milliseconds
    to wake, many times what a message does."""
    here, loops = os.getpid(), []
    try:
        for _ in os.sched_getaffinity(0):
            if not (child := os.fork()):
                _loop(here)
            loops.append(child)
        yield
    finally:
        for child in loops:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _loop(parent: int) -> NoReturn:
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while os.getppid() == parent:  # one that is killed ends no loop
            for _ in range(1_000_000):
                pass
    finally:
        os._exit(0)


def pretend(rank: int, ranks: int) -> None:
    """Make this process one of so many ranks whose messages take no time, and bring nothing."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def _fork(function: Callable[[], T], place: dict[str, str], result: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(place)
        torch.set_num_threads(1)
        result.write_bytes(pickle.dumps(function()))
        if dist.is_initialized():
            dist.barrier()  # none leaves while another still sends
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # without gloo's destructors
