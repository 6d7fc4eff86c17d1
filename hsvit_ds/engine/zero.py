"""Where DeepSpeed keeps each trained parameter's fp32 master and moments on this rank, one adapter per ZeRO stage.

Everything canonical (checkpoints, EMA) goes through `Shards`: the flat fp32 tensors that the optimizer steps, and for
each the fragments of named parameters that lie in it. DeepSpeed's own accessors return None at stage 0 and for frozen
parameters, link moments for the first parameter group only (stages 1, 2) and fail on tensors that the replicas do not
divide (stage 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hsvit_kernels import StepState

from ..grid.grid import Grid


def step_state(module: nn.Module) -> StepState:
    """What the passes of a step share about the sliced weights of a model, one that does nothing where it has none."""
    found = getattr(module, "step_state", None)
    return found if isinstance(found, StepState) else StepState()


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of the flattened parameter `name`, at `offset` of a flat tensor."""

    name: str
    shape: torch.Size
    start: int
    length: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.view(-1)[self.offset : self.offset + self.length]


class Shards:
    """Stage 0: every master is the parameter itself, whole on every rank.

    masters: the fp32 tensors that the optimizer steps and keys its state by. layout: the fragments in each of them.
    frozen: the tensors of parameters that are not trained, each with its fragment.
    """

    replicated = True
    """Whether every replica holds every master whole."""

    def __init__(self, module: nn.Module, optimizer: Any, grid: Grid) -> None:
        self.module, self.grid, self.zero = module, grid, optimizer
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.masters: list[Tensor] = []
        self.layout: list[list[Fragment]] = []
        self.frozen: list[tuple[Tensor, Fragment]] = []
        self.names = {id(p): name for name, p in module.named_parameters()}
        self._map()
        parameter: Any  # DeepSpeed's attributes are not in torch's stubs
        for parameter in module.parameters():
            if not parameter.requires_grad:
                self.frozen.append(self._frozen(parameter))

    def _map(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.masters.append(parameter)
                self.layout.append([self._whole(parameter)])

    def _whole(self, parameter: Tensor) -> Fragment:
        return Fragment(self.names[id(parameter)], parameter.shape, 0, parameter.numel(), 0)

    def _frozen(self, parameter: Any) -> tuple[Tensor, Fragment]:
        return parameter.data, self._whole(parameter)

    def publish(self) -> None:
        """Make the model compute with what is in the masters. Collective."""
        self._publish()
        step_state(self.module).clear()

    def _publish(self) -> None:
        pass  # the parameters are the masters

    # What is the same at every stage

    def gather(self, flats: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every trained parameter, from flats laid out like the masters. Collective."""
        for flat, fragments in zip(flats, self.layout, strict=True):
            for fragment in fragments:
                yield fragment.name, self._gather(flat, fragment, self.replicated)

    def gather_frozen(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter that is not trained. Collective."""
        for flat, fragment in self.frozen:
            yield fragment.name, self._gather(flat, fragment, replicated=True)

    def _gather(self, flat: Tensor, fragment: Fragment, replicated: bool) -> Tensor:
        if self.grid.replicas == 1 or replicated:
            return fragment.of(flat).detach().clone().view(fragment.shape)
        whole = torch.zeros(fragment.shape, dtype=flat.dtype, device=flat.device)
        part = whole.view(-1)[fragment.start : fragment.start + fragment.length]
        part.copy_(fragment.of(flat).detach())
        return self.grid.sum_over_replicas(whole)  # disjoint fragments: the sum is exact

    @torch.no_grad()
    def scatter(self, flats: list[Tensor], whole: Mapping[str, Tensor]) -> None:
        """Write this rank's fragments of the named tensors into flats laid out like the masters."""
        for flat, fragments in zip(flats, self.layout, strict=True):
            for fragment in fragments:
                self._scatter(flat, fragment, whole)

    @torch.no_grad()
    def scatter_frozen(self, whole: Mapping[str, Tensor]) -> None:
        for flat, fragment in self.frozen:
            self._scatter(flat, fragment, whole)

    def _scatter(self, flat: Tensor, fragment: Fragment, whole: Mapping[str, Tensor]) -> None:
        source = whole[fragment.name].reshape(-1)
        fragment.of(flat).copy_(source[fragment.start : fragment.start + fragment.length])

    def moments(self) -> dict[str, list[Tensor]]:
        """The optimizer's state as flats laid out like the masters; numbers (the step) as one-element tensors."""
        state = self.optimizer.state
        keys = sorted({key for master in self.masters for key in state.get(master, {})})
        return {key: [state[master].get(key, torch.zeros_like(master)) for master in self.masters] for key in keys}

    def set_moment(self, key: str, flats: list[Tensor]) -> None:
        for master, flat in zip(self.masters, flats, strict=True):
            self.optimizer.state[master][key] = flat


class FlatShards(Shards):
    """Stages 1 and 2: a flat buffer a parameter group, each replica stepping an equal part of it."""

    replicated = False

    def _map(self) -> None:
        zero = self.zero
        for i, parameters in enumerate(zero.round_robin_bit16_groups):
            size, first = int(zero.partition_size[i]), int(zero.partition_size[i]) * self.grid.replica
            fragments = []
            for parameter, begin in zip(parameters, zero.round_robin_bit16_offsets[i], strict=True):
                shape = parameter.shape
                start = min(max(first - begin, 0), shape.numel())
                stop = min(max(first + size - begin, 0), shape.numel())
                offset = begin + start - first if stop > start else 0
                fragments.append(Fragment(self.names[id(parameter)], shape, start, stop - start, offset))
            self.masters.append(zero.single_partition_of_fp32_groups[i])
            self.layout.append(fragments)

    @torch.no_grad()
    def _publish(self) -> None:
        for master, buffer in zip(self.masters, self.zero.bit16_groups_flat, strict=True):
            if self.grid.replicas == 1:
                buffer.copy_(master)
            else:
                dist.all_gather_into_tensor(buffer, master.to(buffer.dtype), group=self.grid.data_group)


class PartitionedShards(Shards):
    """Stage 3: every parameter cut into equal parts, padded at the end; the parts of a sub group lie in one flat."""

    replicated = False

    def _map(self) -> None:
        for parameters, master in zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True):
            fragments, offset = [], 0
            for parameter in parameters:
                fragments.append(self._part(parameter, offset))
                offset += parameter.partition_numel()
            self.masters.append(master)
            self.layout.append(fragments)

    def _part(self, parameter: Any, offset: int) -> Fragment:
        size, numel = parameter.partition_numel(), parameter.ds_numel
        start = min(size * self.grid.replica, numel)
        stop = min(start + size, numel)
        return Fragment(self.names[id(parameter)], torch.Size(parameter.ds_shape), start, stop - start, offset)

    def _frozen(self, parameter: Any) -> tuple[Tensor, Fragment]:
        return parameter.ds_tensor.data, self._part(parameter, 0)

    def gather_frozen(self) -> Iterator[tuple[str, Tensor]]:
        for flat, fragment in self.frozen:
            yield fragment.name, self._gather(flat, fragment, replicated=False)

    @torch.no_grad()
    def _publish(self) -> None:
        zero = self.zero
        for master, buffer in zip(self.masters, zero.fp16_partitioned_groups_flat, strict=True):
            buffer.copy_(master)
        # Small parameters stay gathered between steps, and would keep their old values.
        zero._partition_all_parameters()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def shards(stage: int, module: nn.Module, optimizer: Any, grid: Grid) -> Shards:
    """The adapter for a ZeRO stage, over the optimizer that DeepSpeed made."""
    kind = {0: Shards, 1: FlatShards, 2: FlatShards, 3: PartitionedShards}[stage]
    return kind(module, optimizer, grid)
