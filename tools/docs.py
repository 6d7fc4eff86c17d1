"""Writes what is generated in docs/ and recipes/studies/: `python -m tools.docs`.

The picture of the two directions, for light and dark pages; the keys of a recipe, as `hsvit recipe --keys` prints them;
the tables and plots of the studies that were run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools import studies
from tools.pages import filled

ROOT = Path(__file__).parents[1]
NAMES = ("text", "quiet", "box", "line", "wide", "slim")
THEMES = {
    "light": dict(zip(NAMES, ("#1f2328", "#59636e", "#f6f8fa", "#d1d9e0", "#0969da", "#8250df"), strict=True)),
    "dark": dict(zip(NAMES, ("#f0f6fc", "#9198a1", "#151b23", "#3d444d", "#4493f8", "#ab7df8"), strict=True)),
}
"""GitHub's colours by what is drawn in them; wide: HSViT, slim: Scala."""
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


def text(x: float, y: float, said: str, style: str = "text", anchor: str = "middle", size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}" font-size="{size}">{said}</text>'


def title(x: float, style: str, name: str, said: str) -> str:
    return text(x, 30, f'<tspan class="{style} bold">{name}</tspan> {said}', anchor="start", size=15)


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" class="{style}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float, style: str = "quiet") -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" class="{style} stroke" marker-end="url(#{style})"/>'


def sideways() -> Iterator[str]:
    """HSViT: one image goes to every rank's submodule; their CLS tokens meet before the head."""
    yield title(20, "wide", "Sideways: HSViT.", "One more rank is one more submodule.")
    yield arrow(20, 52, 520, 52, "wide")
    for rank in range(4):
        x, last = 20 + rank * 128, rank == 3
        yield box(x, 74, 116, 146, "box dashed" if last else "box")
        yield text(x + 58, 95, "+ 1 rank" if last else f"rank {rank}", "quiet", size=12)
        yield text(x + 58, 113, "+ 1 submodule" if last else f"submodule {rank}", "text bold")
        for row, part in enumerate(("convolutions", "attention groups")):
            yield box(x + 8, 124 + row * 34, 100, 27, "line dashed" if last else "wide fill")
            yield text(x + 58, 142 + row * 34, part, "quiet" if last else "text", size=12)
        for cls in range(4):
            yield f'<circle cx="{x + 37 + cls * 14}" cy="205" r="4.5" class="wide {"hollow" if last else "solid"}"/>'
        yield arrow(x + 58, 222, x + 58, 247, "quiet" if last else "wide")
    yield box(20, 252, 500, 30, "wide fill")
    yield text(270, 272, "mean of the CLS tokens: B × D numbers a forward, nothing backward")
    yield arrow(270, 284, 270, 306, "wide")
    yield text(270, 324, "head: the same on every rank")


def down() -> Iterator[str]:
    """Scala: the channels that a width takes of every layer; the smallest takes those at the other end."""
    yield title(580, "slim", "Down: Scala.", "One training, every width.")
    yield arrow(590, 52, 590, 282, "slim")
    for row, (width, first, used) in enumerate((("1.00", 0, 12), ("0.75", 0, 9), ("0.50", 0, 6), ("0.25", 9, 3))):
        y = 58 + row * 58
        yield text(650, y + 26, width, "text bold", anchor="end")
        for channel in range(12):
            taken = first <= channel < first + used
            yield box(664 + channel * 20, y, 16, 40, "slim taken" if taken else "line dashed")
    yield text(650, 306, "width", "quiet", anchor="end", size=12)
    yield text(664, 306, "channels of every layer that it computes with", "quiet", anchor="start", size=12)
    yield text(664, 324, "and that an export of it contains", "quiet", anchor="start", size=12)


def picture(theme: str) -> str:
    """The two directions, as SVG."""
    colours = THEMES[theme]
    styles = [
        f".{name} {{ fill: {colour}; }} .{name}.stroke {{ stroke: {colour}; stroke-width: 1.5; }}"
        for name, colour in colours.items()
    ]
    styles += [
        f"text {{ font-family: {FONT}; }} .bold {{ font-weight: 600; }}",
        f".box {{ stroke: {colours['line']}; }} .line {{ fill: none; stroke: {colours['line']}; }}",
        ".dashed { stroke-dasharray: 4 3; } rect.dashed { fill: none; } .fill { fill-opacity: 0.14; }",
        f".taken {{ fill-opacity: 0.75; }} .hollow {{ fill: none; stroke: {colours['line']}; stroke-width: 1.5; }}",
    ]
    heads = [
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" class="{name}"/></marker>'
        for name in ("quiet", "wide", "slim")
    ]
    about = "HSViT adds ranks, and with each a submodule; Scala takes fewer channels of every layer"
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="18 8 890 324" width="890" height="324" role="img">',
            f"<title>{about}</title>",
            f"<style>{' '.join(styles)}</style>",
            f"<defs>{''.join(heads)}</defs>",
            *sideways(),
            *down(),
            "</svg>\n",
        ]
    )


def written() -> Iterator[tuple[Path, str]]:
    """(file, what it holds) of everything generated."""
    from hsvit_ds.commands.keys import markdown

    for theme in THEMES:
        yield ROOT / f"docs/directions-{theme}.svg", picture(theme)
    recipes = ROOT / "docs/recipes.md"
    yield recipes, filled(recipes.read_text("utf-8"), markdown())
    results, parts = ROOT / "docs/results.md", dict[Path, list[str]]()
    yield results, filled(results.read_text("utf-8"), studies.overview())
    for sweep, found in studies.kept():
        plot = sweep.with_suffix(".svg")
        yield plot, studies.picture(found)
        parts.setdefault(sweep.parent / "README.md", []).append(studies.markdown(found, plot.name))
    for readme, tables in parts.items():
        yield readme, filled(readme.read_text("utf-8"), "\n".join(tables))


def main() -> None:
    for path, content in written():
        path.write_text(content, "utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
