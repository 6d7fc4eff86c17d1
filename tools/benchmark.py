"""Measures what the documents quote: `python -m tools.benchmark start`, and so on.

Every figure is a median of several runs beside a named alternative in the same run; machines are noisy.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from pathlib import Path

WHAT = ("start", "step", "scala", "families", "hybrid", "memory", "data", "index", "growth", "grid", "long", "compare")


def main() -> None:
    parser = argparse.ArgumentParser("tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("folder", type=Path, nargs="?", help="data: of shards NAME-SPLIT-0000.tar")
    parser.add_argument("--repeats", type=int, default=7, help="all but memory and long: runs of each, warmed up")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="step, scala, families, hybrid: PyTorch's, on a CPU"
    )
    parser.add_argument("--size", type=int, default=224, help="data: side of the crops, pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="data: worker processes of a node")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file too; data: folder of results")
    args = parser.parse_args()
    if args.what == "data" and args.folder is None:
        parser.error("data needs FOLDER")
    run = importlib.import_module(f"tools.benchmarks.{'steps' if args.what == 'step' else args.what}").run
    run(**{name: getattr(args, name) for name in inspect.signature(run).parameters})


if __name__ == "__main__":
    main()
