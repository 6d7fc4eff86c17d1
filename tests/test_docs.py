"""What the documents say of the program is so: links, commands, options, keys, files, and what commands print.

A fenced block whose first line is ```` ```console quick ```` is run, and what stands below its commands is compared;
so is ```` ```console slow ```` by `make test-slow`, where numbers may differ by 2 %. A line … stands for any lines, …
in a line for any text. A page's blocks are run in order, in one folder.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from hsvit_ds.cli import app
from hsvit_ds.commands.keys import tables
from hsvit_ds.errors import RefusedError
from hsvit_ds.run import recipe as recipes
from tools import docs

from .ranks import ROOT, STUDIES, environment

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ("docs", "hsvit_ds", "kernels", "recipes", "tests", "tools")
KEYS = {key.path for _, keys in tables() for key in keys}
OPEN = tuple(f"{key.path}." for _, keys in tables() for key in keys if key.default == "`{}`")
"""What takes keys of a person's own."""
TABLE = f"(?:{'|'.join(sorted({key.partition('.')[0] for key in KEYS}))})"
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.M)


class Block(NamedTuple):
    language: str
    """What stands behind the three back-ticks."""
    text: str

    @property
    def mark(self) -> str:
        return self.language.removeprefix("console").strip()


def blocks(text: str) -> list[Block]:
    return [Block(found[2].strip(), found[3]) for found in FENCE.finditer(text)]


def inline(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """Every line that a person would type: of blocks without a language, after a $, and in back-ticks."""
    for block in blocks(text):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language in ("", "bash", "sh"):
            yield from lines
        elif block.language == "console":  # those with a mark are run
            yield from (line.removeprefix("$ ") for line in lines if line.startswith("$ "))
    yield from inline(text)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command: without variables before it, from `hsvit`, `make`, `python`, … on."""
    for line in shell_lines(text):
        try:
            words = shlex.split(re.sub(r"\s#.*", "", line))
        except ValueError:  # output, not a command
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] in ("hsvit", "make", "python", "python3", "deepspeed", "torchrun", "pytest"):
            yield words


# What may be wrong


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def links(text: str) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    found = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def wrong_links(text: str, page: Path) -> Iterator[str]:
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


def wrong_hsvit(text: str, _page: Path) -> Iterator[str]:
    for command in commands(text):
        node, words = typer.main.get_command(app), command[1:]
        if command[0] != "hsvit":
            continue
        while words and hasattr(node, "commands"):
            name = words.pop(0)
            if not re.fullmatch(r"[a-z-]+", name):  # hsvit … and hsvit --help
                break
            if name not in node.commands:
                yield f"{shlex.join(command)}: no command {name}"
                break
            node = node.commands[name]
        else:
            known = {"--help", *(option for param in node.params for option in [*param.opts, *param.secondary_opts])}
            unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
            yield from (f"{shlex.join(command)}: no option {word}" for word in unknown if word not in known)


def wrong_make(text: str, _page: Path) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for command in commands(text):
        if command[0] == "make":
            for word in command[1:]:
                variable, sign, _ = word.partition("=")
                there = f"$({variable})" in makefile or f"$(if $({variable})" in makefile if sign else word in targets
                if not there and word != "…":
                    yield f"{shlex.join(command)}: no {'variable' if sign else 'target'} {variable}"


def wrong_modules(text: str, _page: Path) -> Iterator[str]:
    for command in commands(text):
        flag = next((word for word in command if word in ("-m", "--module")), "")
        if flag and command[0] != "pytest":
            module = command[command.index(flag) + 1]
            spec = importlib.util.find_spec(module) if re.fullmatch(r"[\w.]+", module) else None
            if spec is None or spec.origin is None:
                yield f"{shlex.join(command)}: no module {module}"
            elif module.startswith(("tools", "hsvit_ds")):
                source = Path(spec.origin)
                said = (source.with_name("__main__.py") if source.stem == "__init__" else source).read_text()
                words = [w for w in command[command.index(module) + 1 :] if w.startswith("--")]
                yield from (f"{shlex.join(command)}: no option {w}" for w in words if f'"{w}"' not in said)


def wrong_keys(text: str, _page: Path) -> Iterator[str]:
    """Keys that no recipe has, and recipes with overrides that they would not take. VALUE and … stand for any."""
    code = "\n".join([*shell_lines(text)])
    named = re.findall(rf"(?<![\w./:])({TABLE}(?:\.[a-z_]+)+)(?==)", code)
    named += [found[1] for word in inline(text) if (found := re.fullmatch(rf"({TABLE}(?:\.[a-z_]+)+)(?: = .*)?", word))]
    for key in named:
        is_file = key.endswith((".py", ".md", ".safetensors", ".onnx"))
        if not is_file and not key.startswith(OPEN) and not any(f"{known}.".startswith(f"{key}.") for known in KEYS):
            yield f"{key}: no such key"
    for command in commands(text):
        files = [word for word in command if re.fullmatch(r"recipes/[\w/]+\.toml", word)]
        if files and (ROOT / files[0]).exists() and (ROOT / files[0]) not in STUDIES:
            overrides = [w for w in command[command.index(files[0]) + 1 :] if re.match(rf"{TABLE}[.=\w]*[={{]", w)]
            try:
                recipes.read(ROOT / files[0], [w for w in overrides if not re.search(r"=([A-Z]+|\W*…)$|\$", w)])
            except RefusedError as error:
                yield f"{shlex.join(command)}: {error}"


def wrong_files(text: str, page: Path) -> Iterator[str]:
    words = [*inline(text), *re.findall(r"recipes/[\w/]+\.toml", text)]
    words += [word for command in commands(text) for word in command if word.startswith(FOLDERS)]
    tomls = {"recipe.toml", *(path.name for path in ROOT.glob("recipes/**/*.toml")), "pyproject.toml"}
    for word in dict.fromkeys(words):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*", word):
            if not any([*place.glob(word.rstrip("/"))] for place in (ROOT, page.parent)):
                yield f"{word}: no such file"
        elif re.fullmatch(r"\w+\.toml", word) and word not in tomls:
            yield f"{word}: no such recipe"


def wrong_names(text: str, _page: Path) -> Iterator[str]:
    """Names of Python that are not there: in back-ticks, and imported in a block of Python."""
    names = [word for word in inline(text) if re.fullmatch(r"hsvit_(ds|kernels)(\.\w+)+", word)]
    for block in blocks(text):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}.{name.name}" for name in node.names]
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            yield f"{name}: {error}"


CHECKS: list[Callable[[str, Path], Iterator[str]]] = [
    wrong_links, wrong_hsvit, wrong_make, wrong_modules, wrong_keys, wrong_files, wrong_names,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS)
def test_what_a_page_names_is_there(check: Callable[[str, Path], Iterator[str]], name: str) -> None:
    assert list(check((ROOT / name).read_text(), ROOT / name)) == []


@pytest.mark.parametrize(
    ("check", "line", "fault"),
    [
        (wrong_links, "[x](docs/nowhere.md)", "no such file"),
        (wrong_links, '<img src="docs/nowhere.svg">', "no such file"),
        (wrong_links, "[x](docs/data.md#no-such-question)", "no such heading"),
        (wrong_links, "[x](#two-comands)", "no such heading"),
        (wrong_hsvit, "`hsvit trian`", "no command trian"),
        (wrong_hsvit, "`hsvit shards mkae SOURCE`", "no command mkae"),
        (wrong_hsvit, "```\nhsvit export RUN --widht 0.5   # comment\n```", "no option --widht"),
        (wrong_hsvit, "```\nhsvit launch x.toml \\\n  --hostfiles=hostfile\n```", "no option --hostfiles"),
        (wrong_make, "`make trian`", "no target trian"),
        (wrong_make, "`make train RECIPES=x`", "no variable RECIPES"),
        (wrong_modules, "`python -m tools.bench step`", "no module tools.bench"),
        (wrong_modules, "`python -m tools.benchmark step --repeat 5`", "no option --repeat"),
        (wrong_modules, "`deepspeed --module hsvit_ds.trian x`", "no module hsvit_ds.trian"),
        (wrong_keys, "`data.roots=FOLDER`", "data.roots: no such key"),
        (wrong_keys, "`model.widths.smalest`", "model.widths.smalest: no such key"),
        (wrong_keys, "```\npython -m hsvit_ds.train recipes/digits/scala.toml model.submodules=2\n```", "unknown key"),
        (wrong_keys, "`hsvit recipe recipes/digits/hsvit.toml run.epochs=many`", "run.epochs"),
        (wrong_keys, "`hsvit recipe recipes/digits/hsvit.toml 'model={kind=\"timn\"}'`", "must be one of"),
        (wrong_files, "`recipes/digits/hsvti.toml`", "no such file"),
        (wrong_files, "`tests/nowhere/test_grid.py`", "no such file"),
        (wrong_files, "`slow.toml`", "no such recipe"),
        (wrong_names, "`hsvit_ds.models.vti`", "hsvit_ds.models.vti"),
        (wrong_names, "```python\nfrom hsvit_ds.models.hsvit import HSVIT\n```", "HSVIT"),
    ],
)
def test_what_is_not_there_is_found(check: Callable[[str, Path], Iterator[str]], line: str, fault: str) -> None:
    (found,) = check(line, ROOT / "README.md")
    assert fault in found


# How pages are made


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop()
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text())]
        new += [t for t in targets if t.suffix == ".md" and t.is_file() and t not in reached]
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/")])
def test_a_page_opens_with_what_its_reader_can_do(name: str) -> None:
    title, opening = (ROOT / name).read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert re.match(r"[A-Z]", opening), "a sentence, no heading, table or code"
    assert re.search(r"\byou\b", opening, re.I), "says what its reader can do after it"
    assert len(re.findall(r"\.(?=\s|$)", opening)) <= 2, "one or two sentences"


def test_the_readme_has_the_tests_of_ci() -> None:
    tests = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.M)
    shown = re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())
    assert tests
    assert set(tests) <= set(shown)


@pytest.mark.parametrize("path", [path for path, _ in docs.written()], ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Path) -> None:
    assert path.read_text("utf-8") == dict(docs.written())[path], "python -m tools.docs"


def test_every_key_of_a_recipe_has_a_meaning() -> None:
    assert len(KEYS) > 120
    assert not [key.path for _, keys in tables() for key in keys if not key.meaning]
    assert recipes.flat(recipes.read(ROOT / "recipes/digits/hsvit.toml")).keys() <= KEYS


# What commands print


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a block."""
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def printed(said: str, shown: str, tolerance: float) -> bool:
    """Whether a command said what is shown."""
    said, shown = (re.sub(r" +", " ", text) for text in (said, shown))
    number = r"(\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+)"
    pattern = ""
    for line in shown.splitlines():
        if line == "…":
            pattern += r"(?:.*\n)*?"
        else:
            literal = re.escape(line).replace("…", ".*")
            pattern += (
                re.sub(r"\d[\d,]*\\\.\d+|\d{1,3}(?:,\d{3})+", lambda _: number, literal) if tolerance else literal
            ) + r"\n"
    found = re.fullmatch(pattern, said)
    if not found or not tolerance:
        return bool(found)
    wanted = re.findall(number, shown)
    pairs = zip(found.groups(), wanted, strict=True)
    return all(math.isclose(*(float(n.replace(",", "")) for n in pair), rel_tol=tolerance) for pair in pairs)


@cache
def folder_for(page: str, parent: Path) -> Path:
    """Where a page's commands are run: links to the checkout's files, and an environment that `make` takes for made."""
    folder = parent / page.replace("/", "-")
    (folder / ".venv").mkdir(parents=True)
    examples = ("hostfile.example", "links.example.toml")
    for name in (*FOLDERS, "Makefile", "README.md", "pyproject.toml", "requirements.lock", *examples):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv/.locked").touch()
    return folder


def run_blocks(page: str, mark: str, tmp: Path, tolerance: float) -> None:
    folder = folder_for(page, tmp)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # An environment that is not taken for made shall not be made over this one.
    variables: dict[str, Any] = {"PATH": path, "PYTHONPATH": python, "MAKEFLAGS": "UV=false", "COLUMNS": "120"}
    for block in blocks((ROOT / page).read_text()):
        if block.mark == mark:
            for command, shown in sessions(block):
                done = subprocess.run(
                    command, shell=True, cwd=folder, env=environment(**variables), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
                assert printed(done.stdout, shown, tolerance), f"$ {command}\n{done.stdout}\nis not\n{shown}"


def pages_with(mark: str) -> list[str]:
    return [name for name in NAMES if any(block.mark == mark for block in blocks((ROOT / name).read_text()))]


@pytest.mark.heavy
@pytest.mark.parametrize("page", pages_with("quick"))
def test_quick_commands_print_what_a_page_shows(page: str, tmp_path: Path) -> None:
    run_blocks(page, "quick", tmp_path, tolerance=0.0)


@pytest.mark.heavy
def test_the_python_of_a_page_runs(tmp_path: Path) -> None:
    """That of docs/python.md, block after block."""
    texts = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    assert len(texts) > 5
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(texts)], cwd=tmp_path, env=environment(PYTHONPATH=path),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.marathon) if p == "README.md" else p for p in pages_with("slow")]
)
def test_slow_commands_print_what_a_page_shows(page: str, tmp_path: Path) -> None:
    run_blocks(page, "slow", tmp_path, tolerance=0.02)


def test_what_is_printed_is_told_from_what_is_not() -> None:
    assert printed("a\nb 1.50\nc\n", "a\n…\nc\n", 0.0)
    assert printed("top1  99.44\n", "top1 99.16\n", 0.02)
    assert not printed("top1 99.44\n", "top1 99.16\n", 0.0)
    assert not printed("top1 89.00\n", "top1 99.16\n", 0.02)
    assert printed("829,640 bytes\n", "829,584 bytes\n", 0.02)
    assert not printed("729,640 bytes\n", "829,584 bytes\n", 0.02)
    assert not printed("a\nb\n", "a\n", 0.0)
    assert not printed("", "a\n…\n", 0.0)
    assert {block.mark for name in NAMES for block in blocks((ROOT / name).read_text())} >= {"quick", "slow"}
