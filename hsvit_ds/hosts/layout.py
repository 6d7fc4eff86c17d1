"""Which ranks a run gets on the hosts that are there, and which submodules they hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import RefusedError, counted
from ..grid import grid
from ..run.recipe import Recipe, Run
from .cluster import Host


@dataclass(frozen=True)
class Layout:
    """The ranks of one start of a run."""

    hosts: tuple[Host, ...]
    """In the order of their ranks; slots: the ranks that each takes."""
    submodules: int
    """Of the model, present or not."""
    submodule_ranks: int
    absent: tuple[int, ...]
    """Submodules that no rank holds."""
    idle: int
    """Slots that take no rank."""

    @property
    def places(self) -> list[str]:
        """The host of each rank."""
        return [host.name for host in self.hosts for _ in range(host.slots)]

    def held_on(self, hosts: Collection[str]) -> set[int]:
        """Submodules of which some rank on one of these hosts holds a copy."""
        parts = grid.shares(self.submodule_ranks, self.submodules, self.absent)
        ranks = [rank for rank, host in enumerate(self.places) if host in hosts]
        return {submodule for rank in ranks for submodule in parts[rank % self.submodule_ranks]}

    def overrides(self, recipe: Recipe) -> list[str]:
        """Of the keys that are no longer as the recipe has them."""
        changed = []
        if self.submodule_ranks != recipe.grid.submodule_ranks:
            changed.append(f"grid.submodule_ranks={self.submodule_ranks}")
        if self.absent != recipe.grid.absent:
            changed.append(f"grid.absent=[{','.join(map(str, self.absent))}]")
        return changed

    def __str__(self) -> str:
        ranks = len(self.places)
        text = f"{counted(ranks, 'rank')} on {', '.join(f'{host.name} ({host.slots})' for host in self.hosts)}"
        replicas = counted(ranks // self.submodule_ranks, "replica")
        text += f" = {replicas} x {counted(self.submodule_ranks, 'submodule rank')}"
        text += f", without submodules {', '.join(map(str, self.absent))}" if self.absent else ""
        return text + (f", {counted(self.idle, 'slot')} idle" if self.idle else "")


def whole(hosts: Sequence[Host], recipe: Recipe) -> Layout:
    """A rank on every slot, as DeepSpeed starts them; whether that fits the recipe, the ranks will tell."""
    return Layout(tuple(hosts), recipe.model.submodules, recipe.grid.submodule_ranks, recipe.grid.absent, idle=0)


def fitted(hosts: Sequence[Host], recipe: Recipe, last: Layout, degraded: bool) -> Layout:
    """The most ranks with which the run can go on.

    As many whole replicas as divide the global batch. With too few ranks for one replica, degraded: each rank holds as
    many submodules as before, and those are absent whose ranks were lost; otherwise fewer ranks hold all of them.

    Args:
        hosts: that are there. last: of the start before. degraded: a model may lack submodules.

    Raises:
        RefusedError: nothing fits.
    """
    ranks, model, absent = sum(host.slots for host in hosts), recipe.model.submodules, recipe.grid.absent
    parts = grid.shares(recipe.grid.submodule_ranks, model, absent)
    shared = len(parts)
    if ranks < shared and degraded:
        kept = last.held_on([host.name for host in hosts])
        gone = _given_up(parts, kept, shared - ranks)
        shared, absent = ranks, tuple(sorted({*absent, *gone}))
    elif ranks < shared:
        shared = next((n for n in range(ranks, 0, -1) if _divides(n, model, absent)), shared)
    replicas = next((n for n in range(ranks // shared, 0, -1) if _fits(recipe.run, n)), 0)
    if not replicas:
        run = recipe.run
        raise RefusedError(
            f"{counted(ranks, 'rank')} on {', '.join(host.name for host in hosts)} are "
            f"{counted(ranks // shared, 'replica')} of {counted(shared, 'submodule rank')} at most, which cannot train "
            f"run.global_batch = {run.global_batch} in micro batches of run.micro_batch = {run.micro_batch}; "
            "bring a host back, or change these keys"
        )
    placed = _place(hosts, replicas * shared, shared)
    return Layout(placed, model, shared, absent, ranks - replicas * shared)


def _given_up(parts: list[range], kept: set[int], count: int) -> list[int]:
    """The submodules of `count` parts: of those that are not kept, then of the last ones."""
    order = sorted(range(len(parts)), key=lambda part: (not kept.issuperset(parts[part]), part))
    return [submodule for part in order[-count:] for submodule in parts[part]]


def _divides(submodule_ranks: int, submodules: int, absent: tuple[int, ...]) -> bool:
    try:
        grid.shares(submodule_ranks, submodules, absent)
    except RefusedError:
        return False
    return True


def _fits(run: Run, replicas: int) -> bool:
    share, rest = divmod(run.global_batch, replicas)
    return rest == 0 and share % (run.micro_batch or share) == 0


def _place(hosts: Sequence[Host], ranks: int, replica: int) -> tuple[Host, ...]:
    """`ranks` ranks in the order of the hosts, a replica of `replica` ranks on one host if that can be."""
    counts = [host.slots // replica * replica for host in hosts]
    if sum(counts) < ranks:
        counts = [host.slots for host in hosts]
    placed = []
    for host, count in zip(hosts, counts, strict=True):
        taken = min(count, ranks)
        ranks -= taken
        if taken:
            placed.append(Host(host.name, taken))
    return tuple(placed)
