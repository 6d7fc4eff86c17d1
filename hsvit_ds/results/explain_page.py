"""What a network looks at as one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from ..errors import counted
from . import maps, sheet
from .explain import Groups, Image, Seen, SeenByHSViT, SeenByViT
from .predict import Answers

MARK = '<meta name="generator" content="hsvit explain">'
SHOWN = 128
"""Feature maps of an image that are drawn; where there are more, each group's most attended ones."""
SMOOTH = 96
"""Pixels of a side from which an image is drawn smoothly."""
_SEEN = {"as the network sees it": "after resizing and cutting, in the pixels that the network is given"}
_HSVIT = {
    "submodule": "a share of the network with its own convolutions and attention groups; alone, only its own CLS "
    "tokens go into the head that all share",
    "group": "an attention group: a CLS token and a share of the channels, apart from all other groups",
    "CLS token": "the one whose vector a group answers with; its attention says how much it takes from which channel",
    "channel, feature map": "what one kernel of the last convolution, or one channel of the backbone, found and "
    "where; a channel is a token",
    "attention": "weights of the softmax, 0 to 1, mean over the heads; those of a CLS token sum to 1",
    "agreement": "cosine similarity of the vectors that two groups answer with: 1 the same direction, 0 unrelated",
}
_VIT = {
    "attention rollout": "0.5 × attention + 0.5 × what passes by it, multiplied over the layers (arXiv 2005.00928): "
    "how much of each patch has reached the CLS token; what is missing from 1 is its own",
    "width": "a subnet's share of the channels",
}


def html(images: Sequence[Image], words: Sequence[str], of: str) -> str:
    """words: which networks saw the images, a line each. of: the run's folder."""
    seen = [image for image in images if image.pixels is not None]
    by_vit = any(isinstance(one, SeenByViT) for image in seen for one in image.seen)
    wrong = [f"{image.name}: not read: {image.wrong}" for image in images if image.wrong]
    networks = "".join(f"<li>{escape(text)}</li>" for text in words)
    links = "".join(f'<a href="#image-{n}">{escape(image.name)}</a>' for n, image in enumerate(seen))
    navigation = f'<nav aria-label="images">{links}</nav>' if len(seen) > 1 else ""
    return sheet.document(
        f"What {of} looks at",
        f"{counted(len(seen), 'image')}, {time.strftime('%Y-%m-%d %H:%M')}",
        "\n".join(
            [f'<ul class="soft">{networks}</ul>', sheet.notes(wrong), navigation]
            + [_image(image, f"image-{n}") for n, image in enumerate(seen)]
        ),
        (_SEEN | (_VIT if by_vit else _HSVIT)).items(),
        MARK,
        "explain.css",
    )


def _image(image: Image, place: str) -> str:
    assert image.pixels is not None
    background = _Background(image)
    parts = []
    if by_vits := [seen for seen in image.seen if isinstance(seen, SeenByViT)]:
        parts.append(_rollouts(by_vits, background))
    for seen in image.seen:
        if isinstance(seen, SeenByHSViT):
            several = f", {seen.network}" if len(image.seen) > 1 else ""
            parts.append(_hsvit(seen, background, several))
    return (
        f'<section id="{place}"><h2>{escape(image.name)}</h2><div class="seen">'
        f"<figure>{background.alone()}<figcaption class=note>as the network sees it</figcaption></figure>"
        f"{_answers(image.seen)}</div>{''.join(parts)}</section>"
    )


class _Background:
    """The image, for what is drawn over it."""

    def __init__(self, image: Image) -> None:
        assert image.pixels is not None
        self.name, self.uri = image.name, maps.picture(image.pixels)
        self.kind = ' class="smooth"' if len(image.pixels) >= SMOOTH else ""

    def alone(self) -> str:
        return f'<img class="input{" smooth" if self.kind else ""}" src="{self.uri}" alt="{escape(self.name)}">'

    def under(self, values: Tensor, low: float, high: float, what: str) -> str:
        over = maps.heat(values, low, high, maps.OVERLAY)
        return (
            f'<div class="stack" role="img" aria-label="{escape(what)}"><img src="{self.uri}" alt=""{self.kind}>'
            f'<img src="{over}" alt=""></div>'
        )


def _answers(all_seen: Sequence[Seen]) -> str:
    """A row for everybody who answers; marked where it is another answer than that of the largest network."""
    several = len(all_seen) > 1
    rows: list[tuple[str, Answers]] = []
    for seen in all_seen:
        for who, answers in seen.answers.items():
            name = ", ".join(filter(None, (seen.network if several or not who else "", who)))
            rows.append((name, answers))
    largest = next(iter(all_seen[-1].answers.values()))  # of all its submodules, where it has some
    body = []
    for name, answers in rows:
        cells = []
        for place, (label, probability) in enumerate(answers):
            mark = "mark" if place == 0 and label != largest[0][0] else ""
            sign = "≠ " if mark else ""
            cells.append(f'<td class="answer {mark}">{sign}{escape(label)} <span>{100 * probability:.1f} %</span></td>')
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    heads = [f"{place}." for place in range(1, len(largest) + 1)]
    return _table(["who answers", *heads], body, "words")


def _rollouts(all_seen: Sequence[SeenByViT], background: _Background) -> str:
    high = max(float(seen.rollout.max()) for seen in all_seen)
    low = min(float(seen.rollout.min()) for seen in all_seen)
    tiles = []
    for seen in all_seen:
        (((label, probability), *_),) = seen.answers.values()
        what = f"attention rollout of {seen.network} over {background.name}; its numbers are in a table below"
        tiles.append(
            f"<figure>{background.under(seen.rollout, low, high, what)}<figcaption><h4>{escape(seen.network)}</h4>"
            f'<span class="note">{escape(label)} {100 * probability:.1f} %</span></figcaption></figure>'
        )
    numbers = _numbers([(seen.network, seen.rollout) for seen in all_seen], "row of patches", 4)
    told = "How much of each patch has reached the CLS token that answers, all layers together."
    return sheet.part(
        "Attention rollout",
        f'<p class="note">{told}</p><div class="tiles">{"".join(tiles)}</div>{numbers}',
        _scale(maps.OVERLAY, low, high),
    )


def _hsvit(seen: SeenByHSViT, background: _Background, several: str) -> str:
    parts = [_looked(seen, background, several)]
    if seen.groups is not None:
        parts.append(_cls_rows(seen, seen.groups, several))
    if seen.maps is not None:
        parts.append(_feature_maps(seen, seen.maps, several))
    if seen.groups is not None:
        parts.append(_agreement(seen, seen.groups, several))
    return "".join(parts)


def _looked(seen: SeenByHSViT, background: _Background, several: str) -> str:
    looked = seen.looked
    if looked is None:
        return ""
    low, high = float(looked.min()), float(looked.max())
    tiles = []
    for m, one in enumerate(looked):
        what = f"what submodule {m}{several} looks at on {background.name}; its numbers are in a table below"
        tiles.append(
            f"<figure>{background.under(one, low, high, what)}<figcaption><h4>submodule {m}</h4></figcaption></figure>"
        )
    told = "The feature maps of each submodule, summed with the attention of its CLS tokens to them as weights."
    numbers = _numbers([(f"submodule {m}", one) for m, one in enumerate(looked)], "row of the map", 3)
    return sheet.part(
        f"Where it looks{several}",
        f'<p class="note">{told}</p><div class="tiles">{"".join(tiles)}</div>{numbers}',
        _scale(maps.OVERLAY, low, high),
    )


def _cls_rows(seen: SeenByHSViT, groups: Groups, several: str) -> str:
    rows = groups.cls_rows
    layers, count, tokens = rows.shape
    high = float(rows.max())
    tiles = []
    for layer, one in enumerate(rows):
        what = f"attention of the CLS tokens in layer {layer}{several}, a row a group; its numbers are in a table below"
        uri = maps.heat(maps.spaced(one, _borders(seen, count), [1]), 0, high)
        tiles.append(f"<figure>{_framed(uri, what, seen)}<figcaption><h4>layer {layer}</h4></figcaption></figure>")
    names = ["itself", *map(str, range(tokens - 1))]
    body = [
        f'<tr><th scope="row">layer {layer}, group {g}</th>{_cells(rows[layer, g].tolist(), 3)}</tr>'
        for layer in range(layers)
        for g in range(count)
    ]
    of = " Numbers at the left are submodules." if seen.submodules > 1 else ""
    told = (
        "A row is a group, the first at the top; its columns are what its CLS token attends to: at the left itself, "
        f"then the {counted(tokens - 1, 'channel')} of the group. Mean over the heads.{of}"
    )
    kind = "wide" if tokens > count else ""
    return sheet.part(
        f"Attention of the CLS tokens{several}",
        f'<p class="note">{told}</p><div class="{kind}"><div class="tiles">{"".join(tiles)}</div></div>'
        f"{_details(['', *names], body)}",
        _scale(maps.AMOUNTS, 0, high),
    )


def _feature_maps(seen: SeenByHSViT, found: Tensor, several: str) -> str:
    """A strip of maps a group, the most attended first."""
    channels = len(found)
    strength = found.mean((1, 2)) if seen.groups is None else seen.groups.channels
    count = seen.submodules if seen.groups is None else len(seen.groups.vectors)
    each, high = channels // count, float(found.max())
    shown = max(1, min(each, SHOWN // count))
    figures = []
    for m in range(seen.submodules):
        strips = []
        for g in range(m * count // seen.submodules, (m + 1) * count // seen.submodules):
            order = strength[g * each : (g + 1) * each].argsort(descending=True, stable=True)[:shown] + g * each
            name = f"group {g}" if seen.groups is not None else "all"
            numbers = ", ".join(map(str, order.tolist()))
            what = f"feature maps of {name} of submodule {m}{several}: channels {numbers}"
            strips.append(f'<span>{name}</span><img src="{maps.strip(found[order], 0, high)}" alt="{what}">')
        title = f"<figcaption><h4>submodule {m}</h4></figcaption>" if seen.submodules > 1 else ""
        figures.append(f'<figure>{title}<div class="strips">{"".join(strips)}</div></figure>')
    first = "strongest" if seen.groups is None else "most attended"
    told = f"{counted(channels, 'channel')} of {found.shape[1]} × {found.shape[2]}, by group, the {first} first"
    told += f"; {shown} of {each} of each group are drawn." if shown < each else "."
    heads = ["channel", "group", "attention", "mean of its map", "highest"]
    body = [
        f'<tr><th scope="row">channel {c}</th><td>{c // each if seen.groups is not None else "–"}</td>'
        f"{'<td>–</td>' if seen.groups is None else _cells([float(strength[c])], 3)}"
        f"{_cells([float(found[c].mean()), float(found[c].max())], 3)}</tr>"
        for c in range(channels)
    ]
    return sheet.part(
        f"Feature maps{several}",
        f'<p class="note">{told}</p><div class="groups">{"".join(figures)}</div>{_details(heads, body)}',
        _scale(maps.AMOUNTS, 0, high),
    )


def _agreement(seen: SeenByHSViT, groups: Groups, several: str) -> str:
    found = groups.agreement
    borders = _borders(seen, len(found))
    what = (
        f"cosine similarity of the vectors of {counted(len(found), 'group')}{several}; its numbers are in a table below"
    )
    picture = _framed(maps.heat(maps.spaced(found, borders, borders), -1, 1, maps.AGREEMENT), what, seen)
    names = [f"group {g}" for g in range(len(found))]
    body = [
        f'<tr><th scope="row">{name}</th>{_cells(row.tolist(), 2)}</tr>' for name, row in zip(names, found, strict=True)
    ]
    told = "Each group's CLS token after the last layer beside each other's: how alike the groups' vectors are."
    if seen.submodules > 1:
        told += " Numbers at the left are submodules."
    return sheet.part(
        f"Agreement between groups{several}",
        f'<p class="note">{told}</p><figure class="square">{picture}</figure>{_details(["", *names], body)}',
        _scale(maps.AGREEMENT, -1, 1),
    )


def _borders(seen: SeenByHSViT, groups: int) -> list[int]:
    """The first group of each submodule but the first."""
    return list(range(groups // seen.submodules, groups, groups // seen.submodules))


def _framed(uri: str, what: str, seen: SeenByHSViT) -> str:
    """A picture of a row a group, with the numbers of the submodules at its left."""
    image = f'<img src="{uri}" alt="{escape(what)}">'
    if seen.submodules == 1:
        return image
    numbers = "".join(f"<span>{m}</span>" for m in range(seen.submodules))
    return f'<div class="table"><div class="rows" aria-hidden="true">{numbers}</div>{image}</div>'


def _scale(scale: str, low: float, high: float) -> str:
    return (
        f'<p class="scale"><span>{low:.3g}</span><i style="background: {maps.gradient(scale)}"></i>'
        f"<span>{high:.3g}</span></p>"
    )


def _numbers(found: Sequence[tuple[str, Tensor]], row: str, digits: int) -> str:
    """Of several maps of one size, a row of numbers a row of pixels."""
    heads = ["", *map(str, range(found[0][1].shape[1]))]
    body = [
        f'<tr><th scope="row">{escape(name)}, {row} {place}</th>{_cells(line.tolist(), digits)}</tr>'
        for name, one in found
        for place, line in enumerate(one)
    ]
    return _details(heads, body)


def _cells(values: Iterable[float], digits: int) -> str:
    return "".join(f"<td>{value:.{digits}f}</td>" for value in values)


def _details(heads: Sequence[str], body: Sequence[str]) -> str:
    return f"<details><summary>Numbers</summary>{_table(heads, body, 'tall')}</details>"


def _table(heads: Sequence[str], body: Sequence[str], kind: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
