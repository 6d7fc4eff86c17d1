"""Measures everything on one GPU: `make gpu`, which is `python -m tools.gpu all`.

Six parts of at most eight minutes each, in steps that are processes of their own. What a step has found is kept in
FOLDER/results.json; a step that is done is skipped, one that was cut off goes on, one that failed is named and tried
again by the next call, and the others go on. Correctness, tuning, benchmarks and scala need a checkout, torch, triton,
numpy, timm and pytest only; `wheels` says how to bring the rest to a machine without a network.

`report` writes what a folder holds into kernels/results/, docs/performance.md and the recipes' tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from .steps import PARTS

    parser = argparse.ArgumentParser(
        "tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=["all", *PARTS, "report", "wheels", "step"], help="parts, in order")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results (gpu-results)")
    parser.add_argument("--data", type=Path, help="CIFAR-10: a folder of shards, or an archive of one")
    parser.add_argument("--limit", type=float, default=480, help="seconds that a part may take (480)")
    parser.add_argument("--only", help="the one step of this name")
    parser.add_argument("--toy", action="store_true", help="a rehearsal without a GPU: tiny, interpreted, not timed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    # The checkout's own packages, here and in every process from here on: nothing of it has to be installed.
    own = [str(ROOT), str(ROOT / "kernels")]
    sys.path[:0] = own
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "--toy" in (sys.argv if argv is None else argv):  # read when the kernels are defined
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    args = parse(argv)
    from . import report, steps
    from .ledger import Ledger, machine

    if args.what == ["wheels"]:
        print(steps.wheels())
        return 0
    if args.what == ["report"]:
        print("\n".join(report.write(args.out)))
        return 0
    here = machine(args.toy)
    if args.what == ["step"]:
        steps.run_here(args, here)
        return 0
    ledger = Ledger(args.out, here)
    parts = list(steps.PARTS) if "all" in args.what else args.what
    return max(steps.run_part(part, args, ledger) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
