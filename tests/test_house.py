"""Imports run downward only, and CONTRIBUTING.md names every room and file."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from .ranks import ROOT

PACKAGES = {"hsvit_ds": "hsvit_ds", "hsvit_kernels": "kernels/hsvit_kernels"}


def modules() -> dict[str, str]:
    """The text of every module of the packages, by its dotted name; a package's `__init__` has that of its folder."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


MODULES = modules()
PACKAGES_OF = {name.rpartition(".")[0] for name in MODULES}


@cache
def imports(name: str, text: str) -> frozenset[str]:
    """The modules of the packages that one names in an import anywhere: in a function, or under TYPE_CHECKING."""
    package = name if name in PACKAGES_OF else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return frozenset(module for module in found if module.partition(".")[0] in PACKAGES)


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
    inner = module
    while inner not in FLOORS:
        assert inner, f"CONTRIBUTING.md has no room for {module}"
        inner = inner.rpartition(".")[0]
    return inner


def faults(texts: dict[str, str]) -> list[str]:
    found, graph = [], {}
    for name, text in texts.items():
        if name == "hsvit_ds":  # hands on the names that users import
            continue
        graph[name] = imports(name, text) - {"hsvit_ds"}  # whose __init__ is the version
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
    assert len(MODULES) > 80
    assert faults(MODULES) == []


def test_every_room_and_file_is_in_the_table() -> None:
    for name in MODULES.keys() - {"hsvit_ds"}:
        inside, _, file = name.rpartition(".")
        if name in PACKAGES_OF:
            assert name in FLOORS, f"{name} is a room that CONTRIBUTING.md does not have"
        elif inside != "hsvit_kernels" and name not in FLOORS:
            assert file in FILES[inside], f"CONTRIBUTING.md does not name {name}"
    for folder, names in FILES.items():
        missing = [file for file in names if f"{folder}.{file}" not in MODULES and not folder.endswith(file)]
        assert not missing, f"CONTRIBUTING.md names {missing} in {folder}"


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("hsvit_ds.models.vit", "from ..run import recipe", "imports hsvit_ds.run.recipe"),
        ("hsvit_ds.models.vit", "def late():\n    from ..engine.ema import EMA", "imports hsvit_ds.engine.ema"),
        ("hsvit_ds.data.order", "if TYPE_CHECKING:\n    import hsvit_ds.models.vit", "imports hsvit_ds.models.vit"),
        ("hsvit_ds.grid.grid", "import hsvit_ds.registry as r", "imports hsvit_ds.registry"),
        ("hsvit_ds.grid.grid", "from hsvit_ds.cli import *", "imports hsvit_ds.cli"),
        ("hsvit_ds.hosts.cluster", "from hsvit_ds.results import saved", "imports hsvit_ds.results.saved"),
        ("hsvit_ds.models.slimmable", "from . import batchnorm", "circle: "),
        ("hsvit_kernels.random", "from . import grouped_attention", "circle: "),
        ("hsvit_kernels.random", "from hsvit_ds.errors import shown", "imports hsvit_ds.errors"),
    ],
)
def test_an_import_that_does_not_is_found(module: str, line: str, fault: str) -> None:
    planted = MODULES | {module: f"{MODULES[module]}\n{line}\n"}
    assert any(fault in found for found in faults(planted))
