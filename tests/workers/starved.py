"""`python -m tests.workers.starved FOLDER ARGUMENTS…`: a training run whose images stop coming after its third step.

It is then asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from hsvit_ds.data import loader
from hsvit_ds.run import trainer
from hsvit_ds.train import main

STEPS = 3
handed: list[Any] = []
hand_over = loader.Loader._hand_over


def starve(self: loader.Loader, answer: Any) -> bool:
    handed.append(answer)
    if len(handed) > STEPS:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(1000)
    return hand_over(self, answer)


if __name__ == "__main__":
    trainer.PATIENCE = 3
    loader.Loader._hand_over = starve  # type: ignore[method-assign]
    main(sys.argv[2:])
