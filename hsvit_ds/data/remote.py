"""What stands behind URLs: the shards of each split, whose lengths `_info.json` tells, on servers that fail."""

from __future__ import annotations

import hashlib
import json
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from http.client import HTTPException
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from ..errors import RefusedError, counted, first_line, warn
from .layouts import NONE, PLAIN, disjoint, is_url, no_split, parts

TRIES = 8
"""Times that a shard is asked for before the run is refused; a quarter of a second is waited after the first, and each
time twice as long: half a minute in all."""
TRANSIENT = (OSError, EOFError, ValueError, HTTPException, tarfile.TarError, RecursionError)
"""What a server, a subprocess or a file that breaks off becomes on its way through urllib, tarfile and webdataset."""
_FINAL = (400, 401, 403, 404, 405, 410)  # of a URL that will not get better
INFO = "_info.json"
Urls = Mapping[str, tuple[str, ...]]
"""Of the splits whose shards a recipe names."""


@dataclass(frozen=True)
class Split:
    """A split's shards. shards: their names, relative to `root` where they lie there. lengths: samples of each. named:
    their URLs, where a recipe names them."""

    root: str
    shards: tuple[str, ...]
    lengths: tuple[int, ...]
    named: tuple[str, ...] = ()

    @cached_property
    def urls(self) -> tuple[str, ...]:
        return self.named or tuple(f"{self.root}/{shard}" for shard in self.shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each shard's first sample."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.shards, self.lengths)).encode()).hexdigest()[:16]


def open_split(root: str, split: str, timeout: float, named: Urls = NONE) -> Split:
    """The shards that are named for a split, or those of `_info.json`, which `hsvit shards make` writes and timm reads;
    with the lengths that it tells."""
    if split not in (there := split_names(root, timeout, named)):
        raise no_split(f"{root}/{INFO}" if root else "data.shards", split, there)
    if split in named:
        return _named(root, split, timeout, named[split])
    about = _splits(f"{root}/{INFO}", timeout)[split]
    try:
        found = Split(root, tuple(about["filenames"]), tuple(int(length) for length in about["shard_lengths"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{root}/_info.json: split {split} has no {error}; `hsvit shards make` writes it") from None
    if not found.shards or len(found.shards) != len(found.lengths):
        files, lengths = counted(len(found.shards), "file"), counted(len(found.lengths), "length")
        raise RefusedError(f"{root}/_info.json: {split} has {files} and {lengths}")
    # They become parts of paths, of URLs and, behind pipe:, of a shell's command.
    if odd := [shard for shard in found.shards if not PLAIN.fullmatch(str(shard))]:
        raise RefusedError(
            f"{root}/_info.json: {str(odd[0])!a} of {split} is not the plain name of a tar "
            "(letters, digits, _, ., - and /)"
        )
    return found


def split_names(root: str, timeout: float, named: Urls = NONE) -> list[str]:
    """The splits that `ROOT/_info.json` names, and those that a recipe does; refused where two share a shard.

    Of the former none all of whose shards are named as another's.
    """
    splits = _splits(f"{root}/{INFO}", timeout) if is_url(root) else {}
    if not named:
        return list(splits)
    taken = set(chain.from_iterable(named.values()))
    found = {split: [f"{root}/{name}" for name in about.get("filenames", [])] for split, about in splits.items()}
    others = {split: urls for split, urls in found.items() if not taken.issuperset(urls)}
    return list(disjoint(others | {split: list(urls) for split, urls in named.items()}))


def class_names(root: str, timeout: float, named: Urls = NONE) -> tuple[str, ...]:
    """What `_info.json` calls the labels; () where it does not."""
    place = _place(root, named["train"]) if not root and "train" in named else f"{root}/{INFO}"
    return tuple(str(name) for name in _info(place, timeout).get("classes", []))


def _named(root: str, split: str, timeout: float, urls: tuple[str, ...]) -> Split:
    """Shards with the lengths that `_info.json` has for their names, of whatever split."""
    place = _place(root, urls)
    splits = _splits(place, timeout)
    known: dict[str, Any] = {}
    for about in (*splits.values(), splits.get(split, {})):  # its own last, which count
        known |= zip(map(str, about.get("filenames", [])), about.get("shard_lengths", []), strict=False)
    base = f"{root or parts(urls[0])[0]}/"
    names = [_name(url, base) for url in urls]
    of: dict[str, str] = {}
    for name, url in zip(names, urls, strict=True):
        if (other := of.setdefault(name, url)) != url:
            raise RefusedError(
                f"{place}: cannot tell the lengths of {other} and {url} apart; set data.root to the URL that has both"
            )
    if unknown := [name for name in names if not isinstance(known.get(name), int)]:
        raise RefusedError(
            f"{place}: has no length of {unknown[0]} ({len(unknown):,} of {counted(len(names), 'shard')} of {split}); "
            f"write it there, into filenames and shard_lengths of {split}"
        )
    return Split(root or base[:-1], tuple(names), tuple(known[name] for name in names), urls)


def _place(root: str, urls: tuple[str, ...]) -> str:
    """Where `_info.json` lies: in the root, or beside the first shard."""
    folder, _, after = parts(urls[0])
    return f"{root}/{INFO}" if root else f"{folder}/{INFO}{after}"


def _name(url: str, base: str) -> str:
    folder, name, _ = parts(url)
    whole = f"{folder}/{name}"
    return whole.removeprefix(base) if whole.startswith(base) else name


def _splits(place: str, timeout: float) -> dict[str, Any]:
    splits = _info(place, timeout).get("splits")
    if not isinstance(splits, dict) or not all(map(_is_split, splits.values())):
        raise RefusedError(f"{place}: names no splits with filenames and shard_lengths; `hsvit shards make` writes it")
    return splits


def _is_split(about: Any) -> bool:
    keys = ("filenames", "shard_lengths")
    return isinstance(about, dict) and all(isinstance(about.get(key, []), list) for key in keys)


@cache
def _info(place: str, timeout: float) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        from webdataset.gopen import gopen

        open_http_ourselves(timeout)
        with gopen(place) as stream:
            found = json.loads(stream.read())
            return found if isinstance(found, dict) else {}

    try:
        if not is_url(place) and not Path(place).exists():
            raise RefusedError(f"{place}: no such file.")
        return _tried(read, place)
    except RefusedError as error:
        raise RefusedError(
            f"{error} It tells the samples of each shard, which a stream has to know before it is read; timm's "
            "layout, as `hsvit shards make` writes it"
        ) from error


def _tried(action: Any, url: str) -> Any:
    """The result of an action that may fail for a while."""
    for attempt in range(TRIES):
        try:
            return action()
        except TRANSIENT as error:
            wait(attempt, url, error)
    return None


def wait(attempt: int, url: str, error: Exception) -> None:
    words = error.args[:1]  # webdataset adds the stream and the URL
    reason = words[0].partition(" @ <")[0] if words and isinstance(words[0], str) else first_line(error)
    if attempt + 1 == TRIES:
        raise RefusedError(
            f"{url}: {reason}; tried {counted(TRIES, 'time')}. Is the server there, and the file whole?"
        ) from error
    delay = 0.25 * 2**attempt
    warn(f"{url}: {reason}; again in {delay:g} s")
    time.sleep(delay)


class _Download:
    """A response that is known to be whole when it ends: Python's own stops short without a word."""

    def __init__(self, response: Any) -> None:
        self._response = response
        length = response.headers.get("Content-Length")
        self._left = int(length) if length is not None else 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._response.read() if size < 0 else self._response.read(size)
        self._left -= len(data)
        if (size < 0 or not data) and self._left > 0:
            raise OSError(f"cut off {self._left} bytes before its end")
        return data

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_http_ourselves(timeout: float) -> None:
    """Take HTTP out of webdataset's hands: its curl waits for a stalled server for ever, and cannot tell 404."""
    from webdataset.gopen import gopen_schemes

    def http(url: str, *_: object, **__: object) -> _Download:
        try:
            return _Download(urllib.request.urlopen(url, timeout=timeout))
        except urllib.error.HTTPError as error:
            if error.code in _FINAL:
                raise RefusedError(f"{url}: {error.code} {error.reason}; is data.root right, or data.shards?") from None
            raise

    gopen_schemes.update(http=http, https=http)
