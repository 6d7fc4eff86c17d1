"""`python -m tests.workers.interrupted RANK PHASE ACTION ARGUMENTS…`: a training run to which something happens once.

When rank RANK begins a phase whose name starts with PHASE (see `Watch.doing`), it is sent the signal ACTION, two in
"SIGINT+SIGINT", or ACTION is "hang" (it sleeps), "full" (it asks for too much memory), or "nan" (its weights become
non-finite).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from hsvit_ds.run.survival import Watch
from hsvit_ds.run.trainer import Trainer
from hsvit_ds.train import main

rank, phase, action = sys.argv[1:4]
doing, build = Watch.doing, Trainer.__init__
trainers: list[Trainer] = []
happened: list[str] = []


def note(self: Watch, what: str, step: int | None = None) -> None:
    doing(self, what, step)
    if os.environ["RANK"] == rank and what.startswith(phase) and not happened:
        happened.append(what)
        happen()


def happen() -> None:
    if action == "hang":
        time.sleep(1000)
    elif action == "full":
        torch.empty(2**60)
    elif action == "nan":
        with torch.no_grad():
            for master in trainers[0].engine.shards.masters:
                master.fill_(float("nan"))
            trainers[0].engine.shards.publish()
    else:
        for name in action.split("+"):
            os.kill(os.getpid(), getattr(signal, name))


def keep(self: Trainer, *args: Any) -> None:
    trainers.append(self)
    build(self, *args)


if __name__ == "__main__":
    Watch.doing = note  # type: ignore[method-assign]
    Trainer.__init__ = keep  # type: ignore[method-assign]
    main(sys.argv[4:])
