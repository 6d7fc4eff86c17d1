"""The wheel installs, and the kernels need nothing but torch and triton."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from .ranks import ROOT, environment

pytestmark = pytest.mark.heavy

UV = Path(sys.executable).parent / "uv"


def run(*command: object, cwd: Path = ROOT, **variables: Any) -> str:
    env = environment(**{"PYTHONPATH": ""} | variables)
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--wheel", "-o", folder)
    (found,) = folder.glob("hsvit_ds-*.whl")
    return found


def test_the_wheel_is_the_whole_package_and_its_commands_work(wheel: Path, tmp_path: Path) -> None:
    files = run(sys.executable, "-m", "zipfile", "-l", wheel)
    for path in [*(ROOT / "hsvit_ds").rglob("*.py"), *(ROOT / "kernels/hsvit_kernels").rglob("*.py")]:
        assert str(path.relative_to(ROOT)).removeprefix("kernels/") in files
    assert "hsvit_ds/py.typed" in files
    assert "hsvit_kernels/configurations.json" in files
    assert "tests/" not in files
    run(UV, "pip", "install", "--target", tmp_path, "--no-deps", wheel)  # before what is installed for the tests
    here = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}
    script = "import hsvit_ds.run.trainer, hsvit_ds.results.saved, hsvit_ds.hosts.launch; print(hsvit_ds.__file__)"
    assert str(tmp_path) in run(sys.executable, "-c", script, **here)
    assert "key=value" in run(sys.executable, "-m", "hsvit_ds.train", "--help", **here)
    assert "[model]" in run(sys.executable, "bin/hsvit", "recipe", ROOT / "recipes/digits/scala.toml", **here)


@pytest.mark.slow
def test_the_wheel_s_kernels_need_only_torch_and_triton(wheel: Path, tmp_path: Path) -> None:
    # torch's own requirements and nothing of ours, at the lock's versions
    run(UV, "venv", "--python", sys.executable, tmp_path / "clean")
    python = tmp_path / "clean/bin/python"
    versions = re.findall(r"^(torch|triton|numpy)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    run(UV, "pip", "install", "--python", python, *(f"{name}=={version}" for name, version in versions))
    run(UV, "pip", "install", "--python", python, "--no-deps", wheel)
    script = """
import importlib.util, torch, hsvit_kernels
for absent in ("deepspeed", "mlflow", "webdataset", "timm", "pydantic", "einops", "scipy"):
    assert importlib.util.find_spec(absent) is None, absent
shapes = ((2, 8), (2, 4, 8), (2, 1, 8), (2, 1, 8), (2, 1, 24, 8), (2, 1, 24), (2, 1, 8, 8), (2, 1, 8))
weights = [torch.randn(shape) for shape in shapes]
print(tuple(hsvit_kernels.grouped_attention(torch.randn(5, 6, 8), *weights, heads=2).shape), hsvit_kernels.__file__)
"""
    printed = run(python, "-c", script, cwd=tmp_path)
    assert printed.startswith("(5, 2, 8)")
    assert "clean" in printed


def test_the_lock_holds_every_requirement_with_hashes_and_no_url() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    pinned = re.findall(r"^([a-z0-9.-]+)==\S+(?: ;[^\\]*)? \\\n    --hash=sha256:", lock, re.M)
    assert len(pinned) == len(re.findall(r"^[a-z0-9.-]+==", lock, re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert {re.split(r"[=<>]", r)[0] for r in wanted} <= set(pinned)


def test_versions_agree() -> None:
    import hsvit_ds
    import hsvit_kernels

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert hsvit_ds.__version__ == hsvit_kernels.__version__ == project["version"]
