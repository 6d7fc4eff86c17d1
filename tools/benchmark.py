"""Measures what the documents quote: `python -m tools.benchmark start`, and so on.

Every figure is a median of several runs beside a named alternative in the same run; machines are noisy.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

WHAT = ("start", "step", "scala", "hybrid", "memory", "data", "index", "growth", "grid", "long", "compare")


def main() -> None:
    parser = argparse.ArgumentParser("tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("folder", type=Path, nargs="?", help="data: of shards NAME-SPLIT-0000.tar")
    parser.add_argument("--repeats", type=int, default=7, help="all but memory and long: runs of each, warmed up")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="step, scala, hybrid: PyTorch's, on a CPU"
    )
    parser.add_argument("--size", type=int, default=224, help="data: side of the crops, pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="data: worker processes of a node")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file too; data: folder of results")
    args = parser.parse_args()
    if args.what == "start":
        from tools.benchmarks import start

        start.run(args.repeats, args.out)
    elif args.what == "scala":
        from tools.benchmarks import scala

        scala.run(args.repeats, args.threads, args.out)
    elif args.what == "hybrid":
        from tools.benchmarks import hybrid

        hybrid.run(args.repeats, args.threads, args.out)
    elif args.what == "memory":
        from tools.benchmarks import memory

        memory.run(args.out)
    elif args.what == "index":
        from tools.benchmarks import index

        index.run(args.repeats, args.out)
    elif args.what == "growth":
        from tools.benchmarks import growth

        growth.run(args.repeats, args.out)
    elif args.what == "grid":
        from tools.benchmarks import grid

        grid.run(args.repeats, args.out)
    elif args.what == "long":
        from tools.benchmarks import long

        long.run(args.out)
    elif args.what == "compare":
        from tools.benchmarks import compare

        compare.run(args.repeats, args.out)
    elif args.what == "data":
        if args.folder is None:
            parser.error("data needs FOLDER")
        from tools.benchmarks import data

        data.run(args.folder, args.size, args.workers, args.repeats, args.out)
    else:
        from tools.benchmarks import steps

        steps.run(args.repeats, args.threads, args.out)


if __name__ == "__main__":
    main()
