"""Where a rank stands: replicas x submodule ranks, their process groups, and all rank logic.

rank = replica * submodule_ranks + submodule_rank, so that the ranks of a replica are neighbours on a host. `Grid` is
also the `mpu` that DeepSpeed asks for: a replica's ranks are its model-parallel group, the ranks that hold the same
submodules its data-parallel group.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RefusedError, counted
from ..spans import Part
from . import rendezvous, rounding
from .eager import eager
from .exchange import Channel, ExchangeFeatures, SumForward, SumRounded

T = TypeVar("T")
WRITERS = 3
"""Replicas, the first ones, that share the writing of a checkpoint: weights, optimizer's state, averages."""


@dataclass(frozen=True, kw_only=True)
class Config:
    submodule_ranks: int = 1
    """Ranks that share one model (S); divides the submodules present and the world size."""
    absent: tuple[int, ...] = ()
    """Submodules that no rank holds, in no replica: those of lost ranks; their weights stay in the checkpoints as they
    were."""
    exchange: str = "fp32"
    """What each submodule's CLS sum is rounded to before it travels, and so on one rank too: "fp32", not at all;
    "bf16"; "int8" with a scale for each image and submodule. It is part of what the model computes."""
    backend: str = "auto"
    """"gloo", "nccl", or "auto": nccl with a GPU for every rank of the host, gloo otherwise."""
    timeout: float = 600.0
    """Seconds a collective may take before the rank gives up."""

    def __post_init__(self) -> None:
        if self.submodule_ranks < 1:
            raise ValueError(f"submodule_ranks = {self.submodule_ranks}: must be at least 1")
        if list(self.absent) != sorted(set(self.absent)) or min(self.absent, default=0) < 0:
            raise ValueError(f"absent = {list(self.absent)}: must be different numbers from 0 on, the smallest first")
        if self.exchange not in rounding.FORMATS:
            raise ValueError(f'exchange = "{self.exchange}": must be "fp32", "bf16" or "int8"')
        if self.backend not in ("auto", "gloo", "nccl"):
            raise ValueError(f'backend = "{self.backend}": must be "auto", "gloo" or "nccl"')
        if self.timeout <= 0:
            raise ValueError(f"timeout = {self.timeout}: must be above 0 seconds")


def world_size() -> int:
    """Ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """Ranks of this host, as torchrun or DeepSpeed's launcher says; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def replicas(world: int, submodule_ranks: int, submodules: int, absent: tuple[int, ...] = ()) -> int:
    """Models among `world` ranks, whole but for `absent`; refuses what cannot be divided, with the arithmetic."""
    shares(submodule_ranks, submodules, absent)
    if world % submodule_ranks:
        raise RefusedError(
            f"grid.submodule_ranks = {submodule_ranks} does not divide the {counted(world, 'rank')} started: "
            f"start a multiple of {submodule_ranks}, or set submodule_ranks to one of "
            f"{[s for s in _possible(_present(submodules, absent)) if world % s == 0]}"
        )
    return world // submodule_ranks


def shares(submodule_ranks: int, submodules: int, absent: tuple[int, ...] = ()) -> list[range]:
    """The submodules of each rank of a replica: as many on each, with consecutive numbers.

    Raises:
        RefusedError: they cannot be divided so.
    """
    present = _present(submodules, absent)
    if found := _divided(present, submodule_ranks):
        return found
    if len(present) % submodule_ranks:
        why = f"does not divide model.submodules = {submodules}"
        why += f" without grid.absent = {list(absent)}" if absent else ""
        why += ": more submodule ranks than submodules" if submodule_ranks > len(present) else ""
    else:
        why = f"would give a rank submodules whose numbers do not follow each other, of {present}"
    raise RefusedError(f"grid.submodule_ranks = {submodule_ranks} {why}; use one of {_possible(present)}")


def _present(submodules: int, absent: tuple[int, ...]) -> list[int]:
    if absent and submodules == 1:
        raise RefusedError(f"grid.absent = {list(absent)}: this model has one submodule, or none; leave it empty")
    if absent and absent[-1] >= submodules:
        raise RefusedError(f"grid.absent = {list(absent)}: the submodules have numbers from 0 to {submodules - 1}")
    if len(absent) == submodules:
        raise RefusedError(
            f"grid.absent = {list(absent)}: all {counted(submodules, 'submodule')}; at least one must be present"
        )
    return [submodule for submodule in range(submodules) if submodule not in absent]


def _divided(present: list[int], ranks: int) -> list[range]:
    """Equal parts, one a rank; none where one of them would not have consecutive numbers."""
    each = max(len(present) // ranks, 1)
    parts = [range(first, first + each) for first in present[::each]]
    return parts if len(parts) == ranks and [number for part in parts for number in part] == present else []


def _possible(present: list[int]) -> list[int]:
    """Numbers of submodule ranks that can share the submodules present."""
    return [ranks for ranks in range(1, len(present) + 1) if _divided(present, ranks)]


class Grid:
    """This rank's place, and the groups around it.

    Groups, with a timeout, which DeepSpeed's own lack: `world`, `replica` (one model), `data` (the same submodules in
    every replica), and over gloo `signals`, for `any_rank`. Each rank of a gloo group connects with all others of it at
    once, so nothing is grouped twice. (Connecting at the first message, TORCH_GLOO_LAZY_INIT, takes five timeouts to
    notice a rank that ended before it.)
    """

    def __init__(self, config: Config, submodules: int) -> None:
        self.size = world_size()
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.submodule_ranks, self.absent = config.submodule_ranks, config.absent
        self.replicas = replicas(self.size, config.submodule_ranks, submodules, config.absent)
        self.replica, self.submodule_rank = divmod(self.rank, config.submodule_ranks)
        self.submodules = shares(config.submodule_ranks, submodules, config.absent)[self.submodule_rank]
        self.timeout = timedelta(seconds=config.timeout)
        self.device = self._device()
        self.backend = config.backend
        if config.backend == "auto":
            self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        rendezvous.join(self.backend, self.rank, self.size, self.timeout)
        s, r = self.submodule_ranks, self.replicas
        self.replica_ranks = [self.replica * s + i for i in range(s)]
        self.data_ranks = [i * s + self.submodule_rank for i in range(r)]
        assert dist.group.WORLD is not None, "the ranks have joined"
        self.world_group: dist.ProcessGroup = dist.group.WORLD
        self.replica_group = self._group([[i * s + j for j in range(s)] for i in range(r)])
        self.data_group = self._group([[i * s + j for i in range(r)] for j in range(s)])
        self.writers, self._gathers = min(WRITERS, r) * s, 0
        self.signals_group = self.world_group
        if self.backend == "nccl":  # which takes nothing from the host
            self.signals_group = dist.new_group(timeout=self.timeout, backend="gloo")
        self.exchanges = Channel("CLS sums", self.replica_group, s)
        self.features = Channel("maps", self.replica_group, s)
        self.norms = Channel("batch statistics", self.data_group, r, Part.STATISTICS)
        self.all_norms = Channel("batch statistics", self.world_group, self.size, Part.STATISTICS)
        self.images = Channel("images", self.replica_group, s)

    def _device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        index = self.local_rank % torch.cuda.device_count()  # two ranks may share a GPU over gloo
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def _group(self, lists: list[list[int]]) -> dist.ProcessGroup:
        """Every rank calls for every group, in the same order, and keeps its own."""
        if len(lists) == 1:
            return self.world_group
        groups = [dist.new_group(ranks, timeout=self.timeout) for ranks in lists]
        mine: dist.ProcessGroup = groups[next(i for i, ranks in enumerate(lists) if self.rank in ranks)]
        return mine

    # Rank logic

    @property
    def is_main(self) -> bool:
        """The one rank that prints, tracks and publishes checkpoints."""
        return self.rank == 0

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank does what a host needs once."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def writes(self, kind: int, shared: bool) -> bool:
        """Whether this rank writes a kind of a checkpoint's files: one replica, which the kind's number chooses, writes
        what all hold alike, and of it one rank what every rank does (`shared`: the head)."""
        replica = kind % (self.writers // self.submodule_ranks)
        return self.replica == replica and (self.submodule_rank == 0 or not shared)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes any file of a checkpoint."""
        return self.rank < self.writers

    # A collective in a compiled autograd function trained to something else, silently; the mark breaks the graph here.
    @eager
    def exchange(self, sums: Tensor, form: str) -> Tensor:
        """[B, M here, D], a sum for each submodule of this rank, to their sum [B, D] over the replica, each rounded to
        `form`: the one message of an HSViT forward, none backward.

        Sums of rounded numbers need more bits, so what is rounded travels for each submodule and is summed on arrival;
        of more submodules than that saves bytes, the fp32 sum does.
        """
        here, features = sums.shape[1:]
        if here * rounding.size(features, form) < rounding.size(features, "fp32"):
            summed: Tensor = SumRounded.apply(sums, form, self.exchanges)
        else:
            summed = SumForward.apply(rounding.rounded(sums, form).sum(1), self.exchanges)
        return summed

    def share_of(self, images: int) -> slice:
        """Which of a replica's images this rank computes a backbone for.

        Raises:
            ValueError: the ranks of the replica cannot divide them.
        """
        share, rest = divmod(images, self.submodule_ranks)
        if rest:
            raise ValueError(
                f"{counted(images, 'image')} cannot be divided by {counted(self.submodule_ranks, 'submodule rank')}"
            )
        return slice(self.submodule_rank * share, (self.submodule_rank + 1) * share)

    @eager
    def exchange_features(self, x: Tensor) -> Tensor:
        """[B / S, K, f], a backbone's maps of this rank's images, K the channels of the submodules present, to
        [B, K / S, f], this rank's channels of all images of the replica; gradients travel back."""
        exchanged: Tensor = ExchangeFeatures.apply(x, self.features)
        return exchanged

    def share_images(self, images: Tensor) -> Tensor:
        """[B / S, ...] uint8 of each submodule rank, in the order of ranks, to [B, ...] on all of them."""
        return self.images.all_gather(images).flatten(0, 1)

    def any_rank(self, mine: bool) -> Callable[[], bool]:
        """Start asking whether `mine` is true on any rank; what is returned waits for the answer."""
        if self.size == 1:
            return lambda: mine
        flag = torch.tensor([int(mine)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.signals_group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flag)

        return answer

    @property
    def last_collective(self) -> str:
        """The collective of the grid that this rank began last; DeepSpeed's own are not known here."""
        return Channel.last

    def barrier(self) -> None:
        Channel.last = "barrier"
        dist.barrier(self.world_group)

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        box = [value]
        Channel.last = "broadcast of an object"
        dist.broadcast_object_list(box, src=0, group=self.world_group, device=self._object_device())
        return box[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone and give every rank its value, or its refusal."""
        result: Any = None
        if self.is_main:
            try:
                result = action()
            except RefusedError as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, RefusedError):
            raise result
        return result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, on every rank; where all print the same, as usual, a digest travels alone."""
        if not self._differ(hashlib.sha256(repr(value).encode()).digest()):
            return [value] * self.size
        values: list[Any] = [None] * self.size
        Channel.last = "gather of objects"
        dist.all_gather_object(values, value, group=self.world_group)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """Every rank's picklable value, on rank 0; nothing elsewhere."""
        values: list[Any] = [None] * self.size if self.is_main else []
        Channel.last = "gather of objects on rank 0"
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.world_group)
        return values

    def _differ(self, mine: bytes) -> bool:
        """Whether `mine`, of as many bytes on every rank, is not the same on all of them."""
        numbers = torch.tensor(list(mine), dtype=torch.int32)
        extremes = torch.cat((numbers, -numbers))
        Channel.last = "comparison of values"
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.signals_group)
        largest, smallest = extremes[: len(numbers)], -extremes[len(numbers) :]
        return not torch.equal(largest, smallest)

    def gather_of_writers(self, value: T) -> list[T]:
        """Every writing rank's value, as JSON has it, on rank 0. For their checkpoint threads, which need no group:
        what they tell goes through the store that the ranks met by, on connections of its own.

        Raises:
            RuntimeError: some rank has said nothing within the timeout.
        """
        self._gathers += 1
        keys = [f"hsvit-ds/written/{self._gathers}/{rank}" for rank in range(self.writers)]
        if not self.is_main:
            self._writers_store.set(keys[self.rank], json.dumps(value))
            return []
        found = [value]
        for key in keys[1:]:
            found.append(json.loads(self._writers_store.get(key)))
            self._writers_store.delete_key(key)
        return found

    @cached_property
    def _writers_store(self) -> dist.Store:
        store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(self.timeout)
        return store

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where one is refused, all are, for the first one's reason."""
        result, refusal = None, None
        try:
            result = action()
        except RefusedError as error:
            refusal = str(error)
        if self.any_rank(refusal is not None)():
            raise RefusedError(next(reason for reason in self.gather(refusal) if reason is not None))
        return result  # type: ignore[return-value]

    def sum_over_replicas(self, x: Tensor) -> Tensor:
        """Sum over the replicas, in place; a replica's ranks hold the same value."""
        Channel.last = f"all_reduce of {tuple(x.shape)} {x.dtype} (over the replicas)"
        dist.all_reduce(x, group=self.data_group)
        return x

    def sum_over_submodule_ranks(self, x: Tensor) -> Tensor:
        Channel.last = f"all_reduce of {tuple(x.shape)} {x.dtype} (over the submodule ranks)"
        dist.all_reduce(x, group=self.replica_group)
        return x

    def _object_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def close(self) -> None:
        """Leave together: without the barrier gloo was seen to abort at exit."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    # The mpu interface of DeepSpeed

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.replica

    def get_data_parallel_world_size(self) -> int:
        return self.replicas

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data_ranks

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.replica_group

    def get_model_parallel_rank(self) -> int:
        return self.submodule_rank

    def get_model_parallel_world_size(self) -> int:
        return self.submodule_ranks

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
