"""Imports run downward only, and CONTRIBUTING.md names every room and file."""

from __future__ import annotations

import ast
import re
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .ranks import ROOT

PACKAGES = {"hsvit_ds": "hsvit_ds", "hsvit_kernels": "kernels/hsvit_kernels"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package goes by its folder's."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (root / folder).rglob("*.py"):
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the packages that one names in an import anywhere: in a function, or under TYPE_CHECKING."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return {module for module in found if module.partition(".")[0] in PACKAGES}


def table() -> tuple[dict[str, int], dict[str, set[str]]]:
    """CONTRIBUTING.md's floor of every room, and the files that it names there."""
    floors, files = {}, {}
    for row in re.findall(r"^\| (\d) \| `(.+?)` \|.*?\| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M):
        floor, room, names = row
        dotted = room.removeprefix("kernels/").removesuffix("/").removesuffix(".py").replace("/", ".")
        dotted = dotted if dotted.partition(".")[0] in PACKAGES else f"hsvit_ds.{dotted}"
        floors[dotted] = int(floor)
        files[dotted] = set(re.findall(r"`(\w+)`", names))
    return floors, files


FLOORS, FILES = table()


def room(module: str) -> str:
    """The innermost room of the table that a module is in."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return module


def faults(root: Path) -> list[str]:
    known, found, graph = modules(root), [], {}
    for name, path in known.items():
        graph[name] = imports(name, path, known) - {"hsvit_ds"}  # whose __init__ is the version
        for other in sorted(graph[name]):
            above, below = room(name), room(other)
            if above != below and FLOORS[above] <= FLOORS[below]:
                found.append(f"{name} (floor {FLOORS[above]}) imports {other} (floor {FLOORS[below]})")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circle: {' <- '.join(error.args[1])}")
    return found


def test_every_import_runs_downward() -> None:
    assert len(modules(ROOT)) > 80
    assert faults(ROOT) == []


def test_every_room_and_file_is_in_the_table() -> None:
    known = modules(ROOT)
    for name, path in known.items():
        is_room = path.name == "__init__.py"
        if name == "hsvit_ds":
            continue
        assert not is_room or name in FLOORS, f"{path.parent} is a room that CONTRIBUTING.md does not have"
        inside = name.rpartition(".")[0]
        if not is_room and inside != "hsvit_kernels" and name not in FLOORS:
            assert name.rpartition(".")[2] in FILES[inside], f"CONTRIBUTING.md does not name {path}"
    for folder, names in FILES.items():
        missing = [file for file in names if f"{folder}.{file}" not in known and not folder.endswith(file)]
        assert not missing, f"CONTRIBUTING.md names {missing} in {folder}"


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("hsvit_ds/models/vit.py", "from ..run import recipe", "imports hsvit_ds.run.recipe"),
        (
            "hsvit_ds/models/vit.py",
            "def late():\n    from ..engine.engine import Engine",
            "imports hsvit_ds.engine.engine",
        ),
        ("hsvit_ds/data/order.py", "if TYPE_CHECKING:\n    import hsvit_ds.models.vit", "imports hsvit_ds.models.vit"),
        ("hsvit_ds/grid/grid.py", "import hsvit_ds.interop as i", "imports hsvit_ds.interop"),
        ("hsvit_ds/hosts/cluster.py", "from hsvit_ds.results import saved", "imports hsvit_ds.results.saved"),
        ("hsvit_ds/models/slimmable.py", "from . import batchnorm", "circle: "),
        ("kernels/hsvit_kernels/random.py", "from . import grouped_attention", "circle: "),
        ("kernels/hsvit_kernels/random.py", "from hsvit_ds.errors import shown", "imports hsvit_ds.errors"),
        ("hsvit_ds/grid/grid.py", "from hsvit_ds.cli import *", "imports hsvit_ds.cli"),
    ],
)
def test_an_import_that_does_not_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert faults(tmp_path) == []
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    assert any(fault in found for found in faults(tmp_path))
