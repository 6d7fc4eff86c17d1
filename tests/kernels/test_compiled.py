"""Every entry of the kernels' table compiles for three chips without a GPU, within their limits, and as committed."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys

from tests.ranks import ROOT

RESULTS = ROOT / "kernels/results/compiled.csv"
SHARED_LIMIT = {"80": 166912, "90": 232448, "100": 232448}  # bytes a program may use, CUDA programming guide
# T = 65 and 64 < D < 128 take a few more registers than there are: bytes of stack that they may use.
STACK = {"64x64x0": 152, "64x64x1": 72, "16x128x0": 16, "32x128x0": 16}


def test_the_table_compiles_for_sm_80_90_and_100_as_committed() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compiled", "--print"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert {row["sm"] for row in rows} == {"80", "90", "100"}
    for row in rows:
        assert int(row["stack"]) <= STACK.get(row["shape"], 0), row
        assert row["spills"] == "0" or row["shape"] in STACK, row
        assert int(row["shared"]) <= SHARED_LIMIT[row["sm"]], row
        assert int(row["tensor core"]) > 0, row
    assert printed == RESULTS.read_text(), "python -m tools.compiled writes the new figures; look at them first"
