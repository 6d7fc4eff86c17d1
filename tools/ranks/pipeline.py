"""The published network divided by layers: a stage a rank, micro batches through all of them, in plain PyTorch.

All forwards run before all backwards (GPipe, arXiv 1811.06965); with one micro batch it is plain model parallelism.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_ds.run.links import Between, Inside, Links
from tools.benchmarks.published import ConvUnit, PublishedHSViT, published


class Sequences(nn.Module):
    """Maps [B, K, H, W] to the sequences of all groups [B, G, T, D]."""

    def __init__(self, network: PublishedHSViT) -> None:
        super().__init__()
        self.projection, self.groups = network.model.embed_projection, network.model.groups
        self.cls, self.positions = network.model.cls_token_embeddings, network.model.position_embeddings

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.projection(x.flatten(2)).unflatten(1, (self.groups, -1))
        cls = self.cls.squeeze(1).expand(len(x), -1, -1, -1)
        return torch.cat((cls, tokens), 2) + self.positions.squeeze(1)


class Groups(nn.Module):
    """One attention layer of every group: [B, G, T, D] to the same."""

    def __init__(self, network: PublishedHSViT, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(encoder[depth] for encoder in network.model.attn_encoders)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, g]) for g, layer in enumerate(self.layers)], 1)


class Answer(nn.Module):
    """[B, G, T, D] to logits [B, Q]."""

    def __init__(self, network: PublishedHSViT) -> None:
        super().__init__()
        self.classifier = network.classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x[:, :, 0].mean(1))
        return logits


def network(variant: str, submodules: int, image_size: int = 32, **overrides: float) -> PublishedHSViT:
    """A published variant with the convolutions of an HSViT of so many submodules: all but the first in groups."""
    torch.manual_seed(0)
    made = published(variant, image_size, **overrides)
    units = [unit for unit in made.modules() if isinstance(unit, ConvUnit)]
    for unit in units[1:]:
        c = unit.convolution
        unit.convolution = nn.Conv2d(
            c.in_channels, c.out_channels, c.kernel_size, padding=c.padding, bias=False, groups=submodules  # type: ignore[arg-type]
        )  # fmt: skip
    return made


def layers(network: PublishedHSViT) -> list[nn.Module]:
    """The network as layers, one after another."""
    convolutions = [part for block in network.model.conv2d_layers for part in block.layer]  # type: ignore[union-attr]
    depth = len(network.model.attn_encoders[0])  # type: ignore[arg-type]
    return [*convolutions, Sequences(network), *(Groups(network, i) for i in range(depth)), Answer(network)]


def layer_seconds(parts: Sequence[nn.Module], images: Tensor, repeats: int) -> list[tuple[float, float]]:
    """(forward, backward) of each layer on its own, medians."""
    found = []
    for layer in parts:
        runs = []
        for _ in range(repeats):
            x = images.detach().requires_grad_(images.requires_grad)
            began = time.perf_counter()
            y = layer(x)
            there = time.perf_counter()
            if y.requires_grad:
                y.backward(torch.ones_like(y))
            runs.append((there - began, time.perf_counter() - there))
        found.append((median(f for f, _ in runs), median(b for _, b in runs)))
        images = y.detach().requires_grad_()
    return found


def balanced(seconds: Sequence[float], stages: int) -> list[range]:
    """Consecutive layers of each stage, so that the slowest stage is as fast as can be."""
    count = len(seconds)

    def slowest(cuts: tuple[int, ...]) -> float:
        return max(sum(seconds[a:b]) for a, b in itertools.pairwise((0, *cuts, count)))

    cuts = min(itertools.combinations(range(1, count), stages - 1), key=slowest)
    return [range(a, b) for a, b in itertools.pairwise((0, *cuts, count))]


class Stage:
    """One rank's layers. Sends activations to the next rank and gradients back.

    Args:
        shape: of what comes in, for one micro batch.
    """

    def __init__(self, parts: Sequence[nn.Module], rank: int, stages: int, shape: Sequence[int]) -> None:
        self.net, self.rank, self.shape = nn.Sequential(*parts), rank, shape
        self.is_first, self.is_last = rank == 0, rank == stages - 1

    def step(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], between: Callable[[], object] = lambda: None
    ) -> float:
        """All forwards of the micro batches, then all backwards; the loss, of the last stage.

        Args:
            between: called after the forwards.
        """
        inputs, outputs, sent, loss = [], [], [], 0.0
        for x, y in zip(images, labels, strict=True):
            if not self.is_first:
                x = torch.empty(self.shape)
                dist.recv(x, src=self.rank - 1)
                x.requires_grad_()
            out = self.net(x)
            if self.is_last:
                out = F.cross_entropy(out, y) / len(images)
                loss += float(out.detach())
            else:
                sent.append(dist.isend(out.detach(), dst=self.rank + 1))
            inputs.append(x)
            outputs.append(out)
        between()
        for x, out in reversed(list(zip(inputs, outputs, strict=True))):
            grad = None
            if not self.is_last:
                grad = torch.empty_like(out)
                dist.recv(grad, src=self.rank + 1)
            out.backward(grad)
            if not self.is_first:
                assert x.grad is not None
                sent.append(dist.isend(x.grad, dst=self.rank - 1))
        for message in sent:
            assert message is not None
            message.wait()
        return loss


class Simulated(NamedTuple):
    """Of a pipeline's step, seconds. compute: of a rank, on average."""

    seconds: float
    compute: float

    @property
    def idle_ratio(self) -> float:
        """Idle to busy time, of all ranks summed."""
        return self.seconds / self.compute - 1


def simulated(
    stages: Sequence[tuple[float, float, float]], micro_batches: int, links: Links, sizes: Sequence[int]
) -> Simulated:
    """A step of `Stage.step` on ranks by their own clocks.

    A message travels once its receiver asks for it, as gloo's do: not while the receiver computes.

    Args:
        stages: (forward, backward) of each for one micro batch, and its update. sizes: bytes between each stage and the
            next.
    """
    ends = [0.0] * len(stages)
    hops: list[Inside | Between] = [
        links.inside if stage % links.host.ranks else links.between for stage in range(1, len(stages))
    ]
    for direction, order in enumerate((range(len(stages)), reversed(range(len(stages))))):
        sent = [0.0] * micro_batches
        for stage in order:
            hop = stage - 1 + direction
            for number in range(micro_batches):
                if 0 <= hop < len(hops):
                    ends[stage] = max(ends[stage], sent[number]) + sizes[hop] / hops[hop].bandwidth + hops[hop].latency
                sent[number] = ends[stage] = ends[stage] + stages[stage][direction]
    computing = [micro_batches * (forward + backward) + update for forward, backward, update in stages]
    ended = max(end + stage[2] for end, stage in zip(ends, stages, strict=True))
    return Simulated(ended, sum(computing) / len(stages))
