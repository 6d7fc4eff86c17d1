"""An epoch with log lines, checkpoints and an evaluation, then a save that fails on rank 1: what comes to a rank."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hsvit_ds.engine import checkpoint
from hsvit_ds.engine.checkpoint import Position

from .common import trainer

received: dict[str, int] = {}


def counted(name: str, boxes: int) -> Any:
    """A collective of `dist` that also counts what is in its argument number `boxes` afterwards."""
    original = getattr(dist, name)

    def call(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        received[name] = received.get(name, 0) + sum(len(pickle.dumps(value)) for value in args[boxes] or ())
        return result

    return call


def full_disk(path: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device")


def main(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """arguments: {"keys": overrides}."""
    run = trainer(folder, arguments["keys"])
    gathered = run.grid.gather("the same"), run.grid.gather("x" * run.grid.rank)
    for name, boxes in (("all_gather_object", 0), ("broadcast_object_list", 0)):
        setattr(dist, name, counted(name, boxes))
    from_writers = run.grid.gather_of_writers

    def of_writers(value: Any) -> list[Any]:
        found = from_writers(value)
        received["of writers"] = received.get("of writers", 0) + len(pickle.dumps(found))
        return found

    run.grid.gather_of_writers = of_writers  # type: ignore[method-assign]
    run._train_epoch(0, 0)
    run._end_epoch(0)
    assert run.checkpoints.wait() is None
    before = dict(received)
    if run.grid.rank == 1:
        checkpoint.write_synced = full_disk
    run.checkpoints.save(Position(1, 0, 99))
    failure = run.checkpoints.wait()
    groups = [sorted(members) for members in dist.distributed_c10d._world.pg_group_ranks.values()]
    groups = [ranks for ranks in groups if run.grid.rank in ranks]
    return {"received": before, "gathered": gathered, "failure": failure, "groups": groups}
