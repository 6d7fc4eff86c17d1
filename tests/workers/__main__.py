"""`python -m tests.workers NAME FOLDER`: one rank of a multi-rank test."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

name, folder = sys.argv[1], Path(sys.argv[2])
worker = importlib.import_module(f"tests.workers.{name}")
result = worker.main(json.loads((folder / "arguments.json").read_text()), folder)
torch.save(result, folder / f"rank{os.environ['RANK']}.pt")
if dist.is_initialized():  # leave together: gloo aborts where one rank exits before the others
    dist.barrier()
    dist.destroy_process_group()
