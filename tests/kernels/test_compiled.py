"""Every kernel that can be launched compiles, without a GPU; those of training within a chip's limits, as committed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsvit_ds.data.splits import facts
from hsvit_ds.models import hsvit
from hsvit_ds.run import recipe as recipes
from hsvit_kernels import configurations
from hsvit_kernels.attention_cuda import LARGE, Entry, machine_code
from hsvit_kernels.findings import place_name
from tests.ranks import RECIPES, ROOT
from tools.calls import attention_shapes
from tools.machine_code import read

pytestmark = pytest.mark.heavy

RESULTS, BOUNDS = ROOT / "kernels/results/compiled.csv", ROOT / "kernels/results/bounds.csv"
SHARED_LIMIT = {"80": 166912, "90": 232448, "100": 232448}  # bytes a program may use, CUDA programming guide
TIMED = {"90": "nvidia-h200"}
"""By compute capability, where the fastest launches of a GPU stand: attention's kernels are others since then."""


def compiled(*arguments: str, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    """tools.compiled, or Python code, with a changed copy of the kernels if one is given."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*([package] if package else []), ROOT]))
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_launch_compiles_for_every_class_dtype_and_flag() -> None:
    found = compiled("-m", "tools.compiled", "--check")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    last = found.stdout.splitlines()[-1]
    assert last.endswith(" compiled, 0 failed")
    assert int(last.split()[0]) > 500


@pytest.mark.slow
@pytest.mark.marathon
def test_every_launch_becomes_machine_code_and_every_shape_compiles() -> None:
    found = compiled("-m", "tools.compiled", "--whole")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.marathon
def test_training_compiles_for_sm_80_90_and_100_as_committed() -> None:
    found = compiled("-m", "tools.compiled", "--print")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    rows = list(csv.DictReader(io.StringIO(found.stdout)))
    assert {row["for"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        assert int(row["shared"]) <= SHARED_LIMIT[row["for"].removeprefix("sm_")], row
        assert row["stack"] == row["spills"] == "0", row
        if not row["kernel"].endswith((".fold", ".weights", "weight_gradients", "add_splits", "dropout_mask")):
            assert int(row["tensor core"]) > 0, row
    assert found.stdout == RESULTS.read_text(), "python -m tools.compiled writes the new figures; look at them first"


@pytest.mark.parametrize("capability", TIMED)
def test_what_a_gpu_found_fastest_is_in_the_table(capability: str) -> None:
    results = json.loads((ROOT / "kernels/results" / TIMED[capability] / "results.json").read_text())
    tuned = results["parts"]["tuning"]["every place"]["figures"]["tuned"]
    assert tuned.keys() == {place_name(place) for place in configurations.TABLE}
    for place, options in configurations.TABLE.items():
        if not place[0].startswith("attention"):
            assert options.get(capability, options["any"]) == tuned[place_name(place)]["times"][0][1]


@pytest.mark.slow
@pytest.mark.marathon
def test_what_bounds_the_time_of_attention_is_as_committed() -> None:
    found = compiled("-m", "tools.bounds", "--print")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    rows = {
        tuple(row[name] for name in ("problem", "kernel", "by")): row
        for row in csv.DictReader(found.stdout.splitlines())
    }
    target, unit = "B512 G16 T33 D64 L8", 2 * 512 * 16 * 33 * 64 * 8 / 1e6
    forward, backward = (rows[target, kernel, "CUDA C++"] for kernel in ("forward", "backward"))
    assert int(forward["an image and group"]) <= 32_000
    assert int(backward["MB"]) <= 4.5 * unit
    assert all(float(value) <= 1.2 for name, value in backward.items() if name.endswith(", ms"))
    assert found.stdout == BOUNDS.read_text(), "python -m tools.bounds writes the new figures; look at them first"


@pytest.mark.slow
def test_kernels_in_cuda_leave_nothing_to_the_stack() -> None:
    for capability in ("80", "90", "100"):
        for entry in (
            Entry("forward", "run<51, true, 64, 1>"),
            Entry("forward", "run<0, false, 1, 512>"),
            Entry("backward", "run<51>"),
            Entry("backward", "run<0>"),
        ):
            if entry.namespace == "forward" or capability in LARGE:
                code = read(machine_code(entry, capability))
                assert code.stack == code.figures()["spills"] == 0, (entry, capability)


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the kernels with one change."""
    shutil.copytree(ROOT / "kernels/hsvit_kernels", folder / "hsvit_kernels")
    path = folder / "hsvit_kernels" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return folder


FIRST = """
from tools import compiled
call = compiled.Call("grouped_attention", "", (32, 64, 8), "bf16", "fp32", ("training",))
for launch in compiled.launched(compiled.NVIDIA[1], [call]):
    print(compiled.attempt((launch, compiled.NVIDIA[1], False)))
"""


def test_branches_that_give_one_name_two_shapes_are_found(tmp_path: Path) -> None:
    """As once in weight_gradients, where the interpreter saw nothing and no GPU could compile it."""
    old = "        first_tokens(program - of_layers,"
    new = "        total = tl.zeros((BLOCK,), tl.float32)\n" + old
    package = changed(tmp_path, "attention_weight_kernels.py", old, new)
    path = package / "hsvit_kernels/attention_weight_kernels.py"
    head = "        layer_weights(\n            program, products"
    text = path.read_text()
    assert head in text
    path.write_text(text.replace(head, "        total = tl.zeros((DP,), tl.float32)\n" + head))
    found = compiled("-c", FIRST, package=package)
    assert found.returncode == 0, found.stderr
    failed = [line for line in found.stdout.splitlines() if not line.startswith("{")]
    assert len(failed) == 2  # behind Triton's backward, and behind that in CUDA C++
    for line in failed:
        assert line.startswith("attention_weight_kernels.weight_gradients")
        assert "Mismatched type for total" in line


def test_a_kernel_that_nothing_launches_is_an_error(tmp_path: Path) -> None:
    new = "@triton.jit\ndef forgotten(x):\n    tl.store(x, 0)\n\n\n@triton.jit(do_not_specialize"
    package = changed(tmp_path, "linear_kernels.py", "@triton.jit(do_not_specialize", new)
    found = compiled("-m", "tools.compiled", "--check", package=package)
    assert found.returncode == 1
    assert "kernels that no call of tools/calls.py launches: linear_kernels.forgotten" in found.stderr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_trains_is_compiled(path: Path) -> None:
    """So that its launches are compiled to machine code above."""
    recipe = recipes.read(path, [])
    if isinstance(recipe.model, hsvit.Config):
        c = recipe.model.resolved(facts(recipe.data).image_size)
        tokens = c.kernels[-1] // c.groups + 1
        if (c.embedding <= 64 and tokens <= 65) or (c.embedding <= 128 and tokens <= 33):
            assert (tokens - 1, c.embedding, c.heads) in {sizes for _, sizes in attention_shapes()}
