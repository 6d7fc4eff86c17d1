"""Runs side by side: what differs between their recipes, the seeds of a recipe as one group, what they reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import counted
from ..run import table
from .outcome import Outcome

MISSING = "–"
"""What stands for a value that is not there."""
ENOUGH = 3
"""Runs of each of two groups from which on a test of their difference is shown."""
_SEED = "run.seed"
_NAMES = ("run.name", "run.root", "tracking.", "checkpoint.")
"""Keys of which a difference is none of the experiment."""
Value = Callable[[Outcome], float | None]


@dataclass(frozen=True)
class Mean:
    """Over n runs. std: of the sample, None of one run."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Mean | None:
        """Of those that are there; None where none is."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Scored:
    """What runs must share to be averaged: the data, and the splits that choose and that give the result.

    counts: images of each split, () where they are not known.
    """

    name: str
    fingerprint: str
    val: str
    test: str
    counts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, run: Outcome) -> Scored:
        if run.summary:
            data = run.summary.data
            return cls(data.name, data.fingerprint, data.val, data.test, tuple(sorted(data.counts.items())))
        fingerprint = str(run.recipe.get("data.fingerprint", ""))
        return cls(str(run.recipe.get("data.name", "unknown data")), fingerprint, *run.record.splits, ())

    @property
    def words(self) -> str:
        """ "digits: result on test (359 images), best checkpoint by val (288 images)"."""
        return f"{self.name}: result on {self._split(self.test)}, best checkpoint by {self._split(self.val)}"

    @property
    def details(self) -> str:
        """What else tells two of them apart."""
        trained = dict(self.counts).get("train")
        parts = [counted(trained, "training image") if trained else "numbers of images not known"]
        return ", ".join([*parts, *([f"fingerprint {self.fingerprint[:12]}"] if self.fingerprint else [])])

    def _split(self, name: str) -> str:
        images = dict(self.counts).get(name)
        return name if images is None else f"{name} ({counted(images, 'image')})"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that are averaged, or one that is not finished.

    label: differs from all others'. short: without what others of the same data need not be told.
    """

    label: str
    runs: tuple[Outcome, ...]

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def mark(self) -> str:
        """ "" of finished runs."""
        return "" if self.is_finished else self.runs[0].record.state

    def mean(self, value: Value) -> Mean | None:
        return Mean.of(map(value, self.runs))


@dataclass(frozen=True)
class Test:
    """Welch's t-test of two groups' results. difference: of `first`'s mean from `second`'s, points. p: None where every
    run equals the others of its group."""

    first: Group
    second: Group
    difference: float
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Groups of the same data and splits, those with the best result first, unfinished runs last."""

    data: Scored
    groups: tuple[Group, ...]

    @property
    def runs(self) -> list[Outcome]:
        return [run for group in self.groups for run in group.runs]

    @property
    def result(self) -> str:
        """The metric that counts."""
        return f"{self.data.test}/top1"

    def tests(self) -> list[Test]:
        """Of the best group against each other one, where both have enough runs."""
        enough = [g for g in self.groups if g.is_finished and len(_values(g, self.result)) >= ENOUGH]
        if len(enough) < 2:
            return []
        return [_welch(enough[0], other, self.result) for other in enough[1:]]


@dataclass(frozen=True)
class Difference:
    """A key, and its value in each group; MISSING where its recipe has no such key."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """sections: by data and splits. trained: keys of which the groups' values differ. placed: the same of those that
    say where and how. by: the keys that groups were made by, () for seeds of one recipe. metrics: asked for beside the
    usual ones."""

    sections: tuple[Section, ...]
    trained: tuple[Difference, ...]
    placed: tuple[Difference, ...]
    by: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def groups(self) -> list[Group]:
        return [group for section in self.sections for group in section.groups]

    @property
    def runs(self) -> list[Outcome]:
        return [run for group in self.groups for run in group.runs]


def compare(runs: Sequence[Outcome], by: Sequence[str], metrics: Sequence[str]) -> Comparison:
    """by: keys as a person writes them, "lr"; none groups the seeds of one recipe. metrics: as "ema/test_top1".

    Raises:
        RefusedError: no run has such a key or metric.
    """
    keys = {key for run in runs for key in run.recipe}
    chosen = tuple(table.find(key, keys, f"--by {key}") for key in by)
    names = {name for run in runs for name in run.last}
    wanted = tuple(table.find(name, names, f"--metric {name}") for name in metrics)
    apart: dict[Scored, dict[Any, list[Outcome]]] = {}
    for run in runs:
        apart.setdefault(Scored.of(run), {}).setdefault(_together(run, chosen), []).append(run)
    made = [
        (data, [Group(label=_label(found, chosen), runs=tuple(found)) for found in groups.values()])
        for data, groups in apart.items()
    ]
    labels = _told_apart([(data, group) for data, groups in made for group in groups], chosen)
    sections = tuple(Section(data=data, groups=_sorted(groups, labels, data)) for data, groups in made)
    found = [group for section in sections for group in section.groups]
    return Comparison(
        sections=sections,
        trained=_differences(found, table.is_trained),
        placed=_differences(found, lambda key: not table.is_trained(key)),
        by=chosen,
        metrics=wanted,
    )


def _together(run: Outcome, by: Sequence[str]) -> Any:
    """What runs have in common that are averaged."""
    if not run.is_finished or not run.recipe:
        return run.record.where
    if by:
        return tuple(_text(run.recipe, key) for key in by)
    return tuple(sorted((key, repr(v)) for key, v in run.recipe.items() if key != _SEED and table.is_trained(key)))


def _label(runs: Sequence[Outcome], by: Sequence[str]) -> str:
    first = runs[0]
    if not first.is_finished:
        return first.name
    if by:
        return " ".join(f"{table.short(key, first.recipe)}={_text(first.recipe, key)}" for key in by)
    parts = first.summary.recipe.removesuffix(".toml").split("/")[-2:] if first.summary else []
    return "/".join(parts) or str(first.recipe.get("run.name", first.name))


def _told_apart(groups: Sequence[tuple[Scored, Group]], by: Sequence[str]) -> dict[int, str]:
    """{id of a group: its label}, each another: with the keys in which those of one label differ, then with their data,
    then with a number."""
    labels = {id(group): group.label for _, group in groups}
    for words in (_changes, _data_words, lambda alike: [f"#{number}" for number in range(1, len(alike) + 1)]):
        alike: dict[str, list[tuple[Scored, Group]]] = {}
        for pair in groups:
            alike.setdefault(labels[id(pair[1])], []).append(pair)
        for same in alike.values():
            if len(same) > 1:
                for (_, group), more in zip(same, words(same), strict=True):
                    labels[id(group)] = f"{labels[id(group)]} {more}".strip()
    return labels


def _changes(alike: Sequence[tuple[Scored, Group]]) -> list[str]:
    """What differs in what is trained, "lr=0.001"; the data stands elsewhere."""
    recipes = [group.runs[0].recipe for _, group in alike]
    found = [d for d in _differences([group for _, group in alike], table.is_trained) if not d.key.startswith("data.")]
    keys = {key for recipe in recipes for key in recipe}
    named = [(table.short(difference.key, keys), difference.values) for difference in found]
    return [" ".join(f"{key}={values[place]}" for key, values in named) for place in range(len(alike))]


def _data_words(alike: Sequence[tuple[Scored, Group]]) -> list[str]:
    """On which data, as far as that differs."""
    names = [(data.name, data.test, data.fingerprint[:6]) for data, _ in alike]
    told = [place for place, column in enumerate(zip(*names, strict=True)) if len(set(column)) > 1]
    return [f"({' '.join(name[place] for place in told)})" if told else "" for name in names]


def _sorted(groups: Iterable[Group], labels: dict[int, str], data: Scored) -> tuple[Group, ...]:
    def order(group: Group) -> tuple[bool, float, str]:
        found = group.mean(lambda run: run.last.get(f"{data.test}/top1"))
        return not group.is_finished, -found.mean if found else float("inf"), group.label

    return tuple(sorted((replace(group, label=labels[id(group)]) for group in groups), key=order))


def _differences(groups: Sequence[Group], counts: Callable[[str], bool]) -> tuple[Difference, ...]:
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in run.recipe)
    found = (
        Difference(key, tuple(_values_of(group, key) for group in groups))
        for key in keys
        if counts(key) and key != _SEED and not key.startswith(_NAMES)
    )
    return tuple(difference for difference in found if len(set(difference.values)) > 1)


def _values_of(group: Group, key: str) -> str:
    texts = list(dict.fromkeys(_text(run.recipe, key) for run in group.runs))
    return ", ".join(texts[:4]) + (", …" if len(texts) > 4 else "")


def _text(recipe: dict[str, Any], key: str) -> str:
    return (table.text(recipe[key]) or '""') if key in recipe else MISSING


def _values(group: Group, metric: str) -> list[float]:
    return [run.last[metric] for run in group.runs if metric in run.last]


def _welch(first: Group, second: Group, metric: str) -> Test:
    from scipy.stats import ttest_ind_from_stats  # takes a second to import

    one, other = (Mean.of(_values(group, metric)) for group in (first, second))
    assert one is not None
    assert other is not None
    p = None
    if one.std or other.std:
        stats = (one.mean, one.std, one.n, other.mean, other.std, other.n)
        p = float(ttest_ind_from_stats(*stats, equal_var=False).pvalue)
    return Test(first, second, one.mean - other.mean, p)
