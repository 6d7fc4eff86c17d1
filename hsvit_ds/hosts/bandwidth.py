"""The network between all ranks, measured; rank 0 prints it as JSON: `deepspeed --module hsvit_ds.hosts.bandwidth`."""

from __future__ import annotations

import json
import signal
import time
from statistics import median

LIMIT = 300
"""Seconds after which a rank that hangs ends itself: nobody else can end it without a link."""
_TIMEOUT = 120  # s that ranks may wait for others, which may still be reading torch from a shared disk
_LARGE, _SMALL = 64 * 2**20, 4 * 2**10
_REPEATS = 5


def main() -> None:
    signal.alarm(LIMIT)
    import torch

    from ..errors import RefusedError, shown
    from ..grid.grid import Config, Grid

    def seconds(size: int) -> float:
        """Of the sum of `size` bytes over all ranks: the median after a warm-up. Checks the sum."""
        x, taken = torch.empty(size // 4, device=grid.device), []
        for _ in range(1 + _REPEATS):
            x.fill_(grid.rank + 1)
            grid.barrier()
            started = time.perf_counter()
            grid.sum_over_replicas(x)
            total = float(x[-1])  # a GPU has then finished
            taken.append(time.perf_counter() - started)
            expected = grid.size * (grid.size + 1) / 2
            if not bool((x == expected).all()):
                raise RefusedError(
                    f"rank {grid.rank}: the sum of 1 to {grid.size} over the ranks came out as {total:g}"
                )
        return median(taken[1:])

    with shown(1, debug=False):
        grid = Grid(Config(timeout=_TIMEOUT), submodules=1)
        large, small = seconds(_LARGE), seconds(_SMALL)
        if grid.is_main:
            about = {"backend": grid.backend, "ranks": grid.size}
            print(json.dumps(about | {"bandwidth": _LARGE / large, "latency": small}), flush=True)
        grid.close()


if __name__ == "__main__":
    main()
