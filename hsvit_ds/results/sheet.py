"""One HTML file that needs nothing else: what every page of ours has around what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_HERE = Path(__file__).parent


def document(
    title: str, about: str, body: str, meanings: Iterable[tuple[str, str]], mark: str, style: str, scripts: str = ""
) -> str:
    """The file. title, about: text; body, mark, scripts: of HTML; meanings: (word, what it means); style: the name of
    the page's own style sheet."""
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in meanings)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{mark}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{asset("sheet.css")}{asset(style)}</style>
</head>
<body>
<header><div><h1>{escape(title)}</h1><p class="soft">{escape(about)}</p></div>
<button id="theme" aria-label="switch between light and dark">Dark</button></header>
<main>
{body}
</main>
<footer><h2>What it means</h2><dl>{words}</dl></footer>
<script>
{asset("sheet.js")}</script>
{scripts}
</body>
</html>
"""


def asset(name: str) -> str:
    return (_HERE / name).read_text("utf-8")


def script_json(value: Any) -> str:
    """Inside a script: nothing in it ends the script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def notes(texts: Sequence[str]) -> str:
    """What a reader must know before the rest."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes">{items}</ul>' if texts else ""


def part(heading: str, body: str, control: str = "") -> str:
    return f'<div class="part"><div class="head"><h3>{escape(heading)}</h3>{control}</div>{body}</div>'
