"""A command imports what it uses when it uses it. How long they take: `python -m tools.benchmark start`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .ranks import ROOT, environment

pytestmark = pytest.mark.heavy

COMPILER = {"torch._dynamo", "torch._inductor"}
LIBRARIES = {"sklearn", "torchvision", "timm", "scipy", "mlflow", "deepspeed", "matplotlib", "webdataset"}


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"torch", "numpy", "pydantic", *LIBRARIES}),
        (["recipe", "recipes/digits/hsvit.toml"], COMPILER | LIBRARIES),
        (["recipe", "recipes/digits/scala.toml"], COMPILER | LIBRARIES),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_loads_only_what_it_uses(arguments: list[str], absent: set[str]) -> None:
    script = f"""
import sys
from hsvit_ds.cli import main
sys.argv = ["hsvit", *{arguments!r}]
try:
    main()
finally:
    loaded = sorted({absent!r} & set(sys.modules))
    assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_rank_does_without_the_compiler_until_the_optimizer_is_made() -> None:
    """PyTorch's optimizers load a part of it; DeepSpeed's Muon would load the rest."""
    script = """
import sys, torch
from hsvit_ds.data import digits
from hsvit_ds.run import trainer
from hsvit_ds.engine import engine
digits.split("train")
import deepspeed
engine.import_muon()
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
loaded = {"torch._dynamo", "torch._inductor", "sklearn", "timm", "torchvision"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
