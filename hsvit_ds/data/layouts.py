"""Where the shards of each split lie: found in a folder by their names, or named by a pattern, as in `data.shards`.

Found are `NAME-SPLIT-0000.tar`, `SPLIT-0000.tar`, and in a folder for each split `SPLIT/0000.tar` or
`SPLIT/NAME-0000.tar`. A pattern is a list as webdataset takes it, with braces and `::`; of files it may have globs too.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from glob import glob, has_magic
from itertools import chain, takewhile
from pathlib import Path
from string import digits
from types import MappingProxyType
from typing import Any

from ..errors import RefusedError

NAMES = "NAME-SPLIT-0000.tar, SPLIT-0000.tar or SPLIT/0000.tar"
PLAIN = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*\.tar", re.ASCII)
"""A tar's name, with the folders that it is in, which can be a part of a path, a URL and a shell's command."""
SPLIT = re.compile(r"\w+", re.ASCII)
_LAYOUTS = [
    re.compile(layout)
    for layout in (
        r"[^/]+-(?P<split>[A-Za-z_]+)-\d+\.tar",
        r"(?P<split>[A-Za-z_]+)-\d+\.tar",
        r"(?P<split>[A-Za-z_]+)/(?:.+-)?\d+\.tar",
    )
]
_OTHER_SET = re.compile(r"[^/]+/.+-([A-Za-z_]+)-\[0-9\]\*\.tar")
_PARTS = re.compile(r"(.*)/([^/\s]+\.tar)(?![\w.])(.*)", re.DOTALL)
_LOGIN = re.compile(r"://[^/\s]*@")
NONE: Mapping[str, Any] = MappingProxyType({})
"""No split is named."""


def is_url(place: str) -> bool:
    return "://" in place or is_command(place)


def is_command(place: str) -> bool:
    """Whether it is run by a shell."""
    return place.startswith("pipe:")


def check_place(key: str, place: str) -> None:
    """
    Raises:
        ValueError: it holds what must not be saved with a run, shown and tracked.
    """
    if _LOGIN.search(place):
        raise ValueError(
            f"{key} holds a user name or password, which would be saved with the run: put them into ~/.netrc and set "
            '"pipe:curl -sSfn https://…"'
        )
    if is_url(place) and not is_command(place) and "?" in place:
        raise ValueError(
            f"{key} holds a query (?…), which may be a key and would be saved with the run: put it into the "
            """environment and set 'pipe:curl -sSf "https://…?$KEY"'"""
        )


def check(root: str, patterns: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: `data.root` or `data.shards` cannot be, or must not.
    """
    check_place("root", root)
    for split, pattern in patterns.items():
        if not SPLIT.fullmatch(split):
            raise ValueError(f"shards.{split!r}: a split's name must be letters, digits and _")
        urls(f"shards.{split}", pattern, root)


@cache
def expand(pattern: str) -> tuple[str, ...]:
    """The paths, globs or URLs of a pattern, as webdataset's `expand_urls` gives them, but that `${…}` stays for the
    shell of a `pipe:`: what it stands for may be secret, and a shard's name is in every message.

    Raises:
        ValueError: braces that do not fit each other, or an empty part.
    """
    try:
        from braceexpand import braceexpand  # here, as models are loaded without it

        found = tuple(chain.from_iterable(braceexpand(part) for part in pattern.split("::")))
    except ValueError:
        raise ValueError("braces that do not fit each other") from None
    if not all(found):
        raise ValueError("an empty name")
    return found


def urls(key: str, pattern: str, root: str) -> tuple[str, ...]:
    """The URLs of a pattern; those that are relative lie at the URL `root`. () where it names files.

    Raises:
        ValueError: no such pattern, both URLs and files, or what must not be saved with a run.
    """
    for part in pattern.split("::"):
        check_place(key, part)  # first of all, as the other messages repeat the pattern
    try:
        entries = expand(pattern)
        for entry in entries:
            check_place(key, entry)
        are_urls = [is_url(entry) for entry in entries]
        if not is_url(root):
            if any(are_urls) and not all(are_urls):
                raise ValueError(f'both URLs and files ("{entries[are_urls.index(False)]}")')
            if not any(are_urls):
                if above := [entry for entry in entries if ".." in entry.split("/")]:
                    raise ValueError(f'"{above[0]}" leads up (..); write the whole path')
                return ()
        for entry, whole in zip(entries, are_urls, strict=True):
            # Behind pipe: it becomes a part of a shell's command.
            if not whole and not PLAIN.fullmatch(entry):
                raise ValueError(f"{entry!a} is not the plain name of a tar (letters, digits, _, ., - and /)")
            if whole and not _PARTS.fullmatch(entry):
                raise ValueError(f"{entry!a} has no FOLDER/NAME.tar in it")
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f'{key} = "{pattern}": {error}') from None
    return tuple(entry if whole else f"{root}/{entry}" for entry, whole in zip(entries, are_urls, strict=True))


def parts(url: str) -> tuple[str, str, str]:
    """(folder, NAME.tar, what follows, as the end of a command) of a shard's URL."""
    match = _PARTS.fullmatch(url)
    assert match is not None
    return match[1], match[2], match[3]


def leads_elsewhere(pattern: str) -> bool:
    """Whether it names what is not relative to data.root."""
    return any(is_url(entry) or os.path.isabs(entry) for entry in expand(pattern))


def folders(root: str, patterns: Mapping[str, str]) -> list[str]:
    """The folders of named files, as far as a glob does not choose them."""
    found = []
    for entry in chain.from_iterable(map(expand, patterns.values())):
        above = Path(entry).parent.parts
        found.append(os.path.join(root, *takewhile(lambda part: not has_magic(part), above)))
    return list(dict.fromkeys(found))


def split_shards(folder: Path, patterns: Mapping[str, str] = NONE) -> dict[str, list[str]]:
    """{split: its shards}: in the order of their names, or of `patterns`, {split: pattern}. Relative to the folder, or
    whole where a shard lies elsewhere.

    A split that is named is what its pattern says; others are found. Shards that are all named as another split's are
    none of their own.

    Raises:
        RefusedError: shards of two kinds for one split, some that are missing, or in two splits.
    """
    named = {split: _named(folder, split, pattern) for split, pattern in patterns.items()}
    taken = set(chain.from_iterable(named.values()))
    found: dict[str, list[str]] = {}
    for split, kinds in _kinds(folder).items():
        left = {kind: names for kind, names in kinds.items() if not taken.issuperset(names)}
        if split in named or not left:
            continue
        if len(left) > 1:
            one, other = sorted(left)[:2]
            raise RefusedError(
                f"{folder}: shards of two kinds for {split}, {left[one][0]} and "
                f"{left[other][0]}; keep one kind there, or say which is meant: "
                f"data.shards.{split}='{one}', or{options({split: one})}"
            )
        found[split] = next(iter(left.values()))
    return disjoint(found | named, f"{folder}: ")


def _kinds(folder: Path) -> dict[str, dict[str, list[str]]]:
    """{split: {the glob of their names: shards}} of all that lie in a folder as one of the layouts has it."""
    entries = _entries(folder)
    names = [name for name in entries if name.endswith(".tar")]
    for inner in entries:
        if re.fullmatch("[A-Za-z_]+", inner):
            names += [f"{inner}/{name}" for name in _entries(folder / inner) if name.endswith(".tar")]
    alike: dict[str, list[str]] = {}  # but for their numbers: one look at a pattern is enough for all of them
    for name in sorted(names):
        stem = name[:-4].rstrip(digits)
        if len(stem) < len(name) - 4:
            alike.setdefault(stem, []).append(name)
    found: dict[str, dict[str, list[str]]] = {}
    for stem, shards in alike.items():
        if match := next(filter(None, (layout.fullmatch(shards[0]) for layout in _LAYOUTS)), None):
            found.setdefault(match["split"], {})[f"{stem}[0-9]*.tar"] = shards
    for kinds in found.values():
        others = {kind: match[1] for kind in kinds if (match := _OTHER_SET.fullmatch(kind))}
        if len(set(others.values())) > 1:  # another set's folder, with splits of its own
            for kind in others:
                del kinds[kind]
    return found


def _entries(folder: Path) -> list[str]:
    """The names of all that is in a folder, nothing where it is none."""
    try:
        return os.listdir(folder) if folder.is_dir() else []
    except OSError as error:
        raise RefusedError(f"{folder}: {error.strerror}") from error


def _named(folder: Path, split: str, pattern: str) -> list[str]:
    """The files of a pattern."""
    whole, found = f"{folder.absolute()}/", list[str]()
    for entry in expand(pattern):
        names = sorted(glob(entry, root_dir=folder, recursive=True)) if has_magic(entry) else [entry]
        if not names:
            raise RefusedError(f'{folder}: shards of {split}, "{pattern}": nothing is called "{entry}"')
        found += [os.path.normpath(name).removeprefix(whole) for name in names]
    there = {parent: set(_entries(folder / parent)) for parent in set(map(os.path.dirname, found))}
    if missing := [name for name in found if os.path.basename(name) not in there[os.path.dirname(name)]]:
        raise RefusedError(
            f'{folder}: shards of {split}, "{pattern}": {missing[0]} is missing '
            f"({len(missing):,} of {len(found):,} are); bring them there, or name those that are"
        )
    return found


def states(folder: Path, shards: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, time of modification in ns) of each shard; (-1, -1) of one that is not there."""
    found: dict[str, os.DirEntry[str]] = {}
    for parent in {shard.rpartition("/")[0] for shard in shards}:
        if (folder / parent).is_dir():  # one look at it: one for each shard would take long where disks are far away
            before = f"{parent}/" if parent else ""
            with os.scandir(folder / parent) as entries:
                found |= {before + entry.name: entry for entry in entries}
    return [_state(found.get(shard)) for shard in shards]


def _state(entry: os.DirEntry[str] | None) -> tuple[int, int]:
    try:
        status = entry.stat() if entry is not None else None
    except OSError:  # a link to nothing
        status = None
    return (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)


def disjoint(splits: dict[str, list[str]], where: str = "") -> dict[str, list[str]]:
    """The splits; refused where a shard is in two of them, or twice in one."""
    of: dict[str, str] = {}
    for split, shards in splits.items():
        for shard in shards:
            if (other := of.setdefault(shard, split)) != split:
                raise RefusedError(
                    f"{where}{shard}: is in two splits, {other} and {split}; name the shards of both (data.shards, "
                    "--shards)"
                )
        if len(set(shards)) < len(shards):
            twice = next(shard for shard in shards if shards.count(shard) > 1)
            raise RefusedError(f"{where}{twice}: is named twice for {split}; an epoch reads each shard once")
    return splits


def options(patterns: Mapping[str, str]) -> str:
    """What a command of `hsvit shards` has to be told."""
    return "".join(f" --shards {shlex.quote(f'{split}={pattern}')}" for split, pattern in patterns.items())


def parsed(given: Sequence[str]) -> dict[str, str]:
    """{split: pattern} of options SPLIT=PATTERN."""
    found: dict[str, str] = {}
    for option in given:
        split, sign, pattern = option.partition("=")
        if not sign or not SPLIT.fullmatch(split):
            raise RefusedError(f"--shards {option}: must be SPLIT=PATTERN, as 'train=train-{{0000..0146}}.tar'")
        if split in found:
            raise RefusedError(f"--shards {option}: {split} is given twice; join lists by ::")
        try:
            if urls(f"--shards {split}", pattern, ""):
                raise RefusedError(f"--shards {option}: is a URL; give the files of a folder")
        except ValueError as error:
            raise RefusedError(str(error)) from None
        found[split] = pattern
    return found


def no_split(where: str, split: str, there: Iterable[str]) -> RefusedError:
    """That a split is not among those that are there, and which key names another in its place."""
    found = list(there)
    others = [name for name in found if name != "train"]
    remedy = f'; data.{split} = "{others[0]}" takes that one in its place' if others and split != "train" else ""
    said = ", ".join(found) or f"no {NAMES}; data.shards tells other names"
    return RefusedError(f"{where}: no split {split} ({said}){remedy}")
