"""Emulated ranks on hosts of this machine, in network namespaces, whose cables are slow and long.

`python -m tools.ranks.cables FOLDER`: one rank of them.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsvit_ds.run.links import Between, Host, Inside, Links
from tests.cluster import hosts

from . import methods
from .loopback import Ring, Seconds, link_seconds, one_by_one, ring
from .points import PIPELINE, STAGES, SUBMODULE, Case, Row
from .watch import Watch, parts

if TYPE_CHECKING:
    from .measure import Bench

HOSTS = (2, 4)
RATES = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6}
LATENCY = 1e-3
"""Of a message from host to host, s."""
FRAME = 9000
"""Bytes: with fewer of them the program that is the cable keeps up with a Gbit/s."""
MICRO_BATCHES = (1, 4)
missing = hosts.missing


@contextmanager
def cluster(folder: Path, count: int, rate: float) -> Iterator[hosts.Cluster]:
    """Hosts whose cables take half of `LATENCY` each and carry `rate` bytes a second."""
    made = hosts.Cluster(folder, [f"host{number}" for number in range(count)])
    try:
        for host in made.hosts.values():
            host.lengthen(LATENCY / 2, 0.0, rate)
            number = host.port.removeprefix("port")
            for card in (host.port, f"far{number}", f"near{number}"):
                made.in_switch(["ip", "link", "set", card, "mtu", str(FRAME)])
            hosts.finish(made.start(["ip", "link", "set", "eth0", "mtu", str(FRAME)], folder, host))
        yield made
    finally:
        made.close()


def on_hosts(made: hosts.Cluster, folder: Path, functions: Sequence[Callable[[Watch], Any]]) -> list[list[Any]]:
    """What each of some functions returns on a rank of every host, ranks by function."""
    (folder / "functions").write_bytes(pickle.dumps(functions))
    address = next(iter(made.hosts.values())).address
    place = {"WORLD_SIZE": str(len(made.hosts)), "MASTER_ADDR": address, "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    started = [
        made.start(
            [sys.executable, "-m", "tools.ranks.cables", str(folder)],
            folder,
            host,
            **place,
            RANK=str(rank),
            GLOO_SOCKET_IFNAME="eth0",
            PYTHONPATH=f"{hosts.ROOT}:{hosts.ROOT / 'kernels'}",
        )
        for rank, host in enumerate(made.hosts.values())
    ]
    for process in started:
        hosts.finish(process)
    found = [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(len(started))]
    return [list(ranks) for ranks in zip(*found, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    watch = Watch()
    found = [function(watch) for function in pickle.loads((folder / "functions").read_bytes())]
    (folder / f"rank{os.environ['RANK']}").write_bytes(pickle.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # without gloo's destructors


def cases(variant: str, ranks: int, images: int) -> list[Case]:
    found = [Case(variant=variant, method=method, ranks=ranks, batch=images) for method in (SUBMODULE, *STAGES)]
    return found + [
        Case(variant=variant, method=PIPELINE, ranks=ranks, batch=images, micro_batches=m) for m in MICRO_BATCHES
    ]


def links_of(found: Seconds, case: Case) -> Links:
    """Of hosts of one rank."""
    of = Ring(*one_by_one(found), 0.0, 1.0) if case.method == PIPELINE else ring(found, case.ranks)
    between = Between(bandwidth=of.bandwidth, latency=of.latency)
    return Links(inside=Inside(bandwidth=of.bandwidth), between=between, host=Host(call=of.call, together=of.together))


def rows(bench: Bench, variant: str, images: int) -> Iterator[Row]:
    """Of a variant, predicted by the links that the hosts measure."""
    for named, rate in RATES.items():
        for count in HOSTS:
            with tempfile.TemporaryDirectory() as name, cluster(Path(name), count, rate) as made:
                found = on_hosts(made, Path(name), [link_seconds])[0][0]
                asked = [bench.asked(case, "emulated", links_of(found, case)) for case in cases(variant, count, images)]
                functions = [partial(methods.watched, one.make, steps=bench.steps) for one in asked]
                for one, steps in zip(asked, on_hosts(made, Path(name), functions), strict=True):
                    yield one.row(f"{named}, 1 ms", parts(steps, methods.WARM))


if __name__ == "__main__":
    main()
