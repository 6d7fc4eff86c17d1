"""Measures what the README and the notes quote: `python -m tools.benchmark step|scala|kernels`.

Every figure is a median of several runs beside a named alternative in the same run; machines are noisy.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser("tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=["step", "scala", "kernels"])
    parser.add_argument("--repeats", type=int, default=7, help="step, scala: runs of each, after two to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="step, scala: PyTorch's, on a CPU")
    parser.add_argument(
        "--out", type=Path, help="step, scala: write the rows to this CSV file too; kernels: folder of results"
    )
    args = parser.parse_args()
    if args.what == "kernels":  # needs torch, triton, numpy and matplotlib only, and `step` the whole project
        from tools import kernel_benchmarks

        kernel_benchmarks.run(args.out)
    elif args.what == "scala":
        from tools import scala_benchmarks

        scala_benchmarks.run(args.repeats, args.threads, args.out)
    else:
        from tools import step_benchmarks

        step_benchmarks.run(args.repeats, args.threads, args.out)


if __name__ == "__main__":
    main()
