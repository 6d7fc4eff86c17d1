"""`python -m tests.workers.recorded FILE ARGUMENTS…`: a training run that notes which images each step was given.

A line is the step, then a hash of each image of this rank, as the worker handed it over.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

from hsvit_ds.data.reader import Reader
from hsvit_ds.train import main

read = Reader._batch


def note(self: Reader, *args: Any) -> Any:
    batch = read(self, *args)
    hashes = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in batch.images]
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "a") as file:
        file.write(" ".join([str(batch.step), *hashes]) + "\n")
    return batch


if __name__ == "__main__":
    Reader._batch = note  # type: ignore[method-assign]
    main(sys.argv[2:])
