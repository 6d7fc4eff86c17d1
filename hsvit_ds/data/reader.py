"""From a run's position to the batches of this rank: which images, read where, shared how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from ..errors import RefusedError, counted
from ..grid.grid import Grid, ranks_here
from ..spans import Part, spanned
from . import augment, decode, loader, remote
from .batch import PADDING, Batch, Images, Job
from .index import Index
from .loader import Again, Loader
from .order import Order, Share
from .resident import Split, Views
from .sets import Facts
from .sources import InMemory, Shards, Source, digits_split
from .splits import Config, expected_channels, facts, not_on_device, open_split, shares_images, workers
from .stream import Streamed
from .transform import Transform

SHARE = 10
"""One in so many bytes of a device's memory may hold a split's images."""

DECODED = 1024
"""Images that a worker decodes in about the time that it takes to start."""


def ready_bytes(facts: Facts, augmentation: augment.Config, processes: int, images: int) -> int:
    """Of what the workers of a rank hold ready, in batches of `images`."""
    return processes * loader.READY * images * facts.channels * max(facts.image_size, augmentation.canvas) ** 2


class Reader:
    """Reads the training split in the run's order, and any split once, for one rank. Collective.

    Args:
        augmentation: what the workers do to training images. order: of the training split. share: this replica's part
        of every global batch.
    """

    def __init__(self, config: Config, augmentation: augment.Config, order: Order, share: Share, grid: Grid) -> None:
        self.config, self.augmentation, self.order, self.share, self.grid = config, augmentation, order, share, grid
        self.facts = facts(config)
        # Named here for a run that is opened elsewhere: its own decoder may be another version.
        f, decoder = self.facts, decode.installed(config.decoder)
        self._transform = Transform(augmentation, f.image_size, decoder, order.seed, f.channels)
        there = grid.together(lambda: open_split(config, "train"))
        self._pins = grid.device.type == "cuda"
        loader.preload(self._transform.modules)
        self._gathers = shares_images(config, grid.submodule_ranks, self.facts.image_size)
        self._training = self._source("train", there)
        self._cores, self._ranks = len(os.sched_getaffinity(0)), ranks_here()
        self._processes = workers(config, self._cores, self._ranks)
        self._bad: list[str] = []
        self._on_device, self.placement = self._placed("train", augmentation.canvas)
        """Whether the training split lives on the device, and where its images come from, in words."""
        if self._on_device and config.workers == "auto":  # a small set is decoded sooner than workers have started
            self._processes = min(self._processes, -(-self.count("train") // DECODED))
        self._residents: dict[str, Split] = {}
        self._gathers = self._gathers and not self._on_device
        self._check_memory()
        self.idle: Callable[[], None] = lambda: None
        """Called again and again while training waits for images; may raise."""
        self._passes: dict[str, Again] = {}
        self._stream: Loader | None = None
        self._answers: Iterator[Images] = iter(())
        self._position = (-1, -1)
        self.left_out = list(there.problems) if isinstance(there, Index) else []
        """Samples of the training split that its index leaves out, and why."""
        if there is not None:
            if not config.any_decoder:
                self._check_ranks("the decoder", self._transform.decoder)
            self._check_ranks("data of fingerprint", there.fingerprint)

    def _check_memory(self) -> None:
        """Of shared memory: a worker of training holds micro batches ready, and one of an evaluation its batches."""
        images = min(self.config.eval_batch, self.order.samples) + (0 if self._on_device else self.share.micro_batch)
        each = ready_bytes(self.facts, self.augmentation, self._workers, images)
        loader.check_shared_memory(self._ranks * each)

    def _check_ranks(self, what: str, mine: str) -> None:
        for rank, other in enumerate(self.grid.gather(mine)):
            if other != mine:
                raise RefusedError(
                    f"rank {rank} has {what} {other}, rank {self.grid.rank} {mine}; they must be the same"
                )

    def _source(self, split: str, there: Index | remote.Split | None) -> Source | Streamed:
        if there is None:
            return digits_split(split)
        if isinstance(there, Index):
            return Shards(there, self._transform)
        s = self.grid.submodule_ranks if self._gathers else 1
        return Streamed(
            there,
            self._transform,
            self.facts.classes,
            reader=self.grid.replica * s + (self.grid.submodule_rank if self._gathers else 0),
            readers=self.grid.replicas * s,
            count=self.share.micro_batch // s,
            window=self.config.window,
            cache=self.config.cache,
            timeout=self.config.timeout,
            image=self.config.image,
            channels=expected_channels(self.config),
        )

    def _placed(self, split: str, canvas: int = 0) -> tuple[bool, str]:
        """(whether a split is to live on the device, a word about it)."""
        c, device = self.config, self.grid.device
        if c.on_device == "never" or (c.on_device == "auto" and device.type != "cuda"):
            return False, ""
        if why := not_on_device(c, self.augmentation):
            return False, f"{split}: images come from workers, as {why}"
        size = self.count(split) * self.facts.channels * (canvas or self.facts.image_size) ** 2
        if c.on_device == "auto" and size > (most := torch.cuda.get_device_properties(device).total_memory // SHARE):
            mib = f"{size / 2**20:,.0f} MiB are more than {most / 2**20:,.0f}"
            return False, f"{split}: images come from workers, as {mib}, a tenth of the device's memory"
        return True, f"{split}: {counted(self.count(split), 'image')} on the device, {size / 2**20:,.1f} MiB"

    def _resident(self, split: str, training: bool = False) -> Split:
        """A split on the device, decoded when it is first asked for."""
        there = open_split(self.config, split)
        key = f"{there.fingerprint if there is not None else split}, {training}"
        if key not in self._residents:
            source = self._source(split, there)
            assert isinstance(source, InMemory | Shards)
            self._residents[key] = Split(source, training, self._processes, self.grid.device)
            self._bad += self._residents[key].bad
        return self._residents[key]

    @cached_property
    def _training_split(self) -> Split:
        return self._resident("train", training=True)

    @cached_property
    def _views(self) -> Views:
        return self._training_split.views(self._transform)

    @property
    def _workers(self) -> int:
        return 0 if isinstance(self._training, InMemory) else self._processes

    @property
    def working(self) -> str:
        """Who reads, in words; "" where the rank does it itself."""
        if not self._workers:
            return ""
        cores = f"; {counted(self._cores, 'core')}, {counted(self._ranks, 'rank')} on this host"
        return f"{counted(self._workers, 'data worker')} a rank{cores if self.config.workers == 'auto' else ''}"

    def _started(self, epoch: int, step: int) -> Loader:
        """The images of the micro batches from a step on."""
        source = self._training
        if isinstance(source, Streamed):
            done = (epoch * self.order.steps_per_epoch + step) * self.share.accumulation
            return source.start(self._workers, self._pins, done)
        answer, processes = self._answer()
        return loader.answers(answer, lambda n: self._jobs(epoch, step, n), processes, self._pins)

    def _answer(self) -> tuple[Callable[[Job], Images], int]:
        """What answers the jobs of training, and in how many workers."""
        if self._on_device:
            return self._views.training, self._workers if self._views.is_random else 0
        assert not isinstance(self._training, Streamed)
        return self._training.training, self._workers

    def train(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """The micro batches of every step of `epoch` from `first_step` on; skipped steps read nothing.

        The workers go on into the next epoch, which is there without waiting when it is asked for next.
        """
        if self._position != (epoch, first_step):
            self._close_stream()
            self._stream = self._started(epoch, first_step)
            self._stream.idle = lambda: self.idle()
            self._answers = iter(self._stream)
        steps = self.order.steps_per_epoch
        for step in range(first_step, steps):
            self._position = (-1, -1)  # unknown while a step is being read
            batches = [
                self._batch(next(self._answers), self.share.indices(micro), epoch * steps + step)
                for micro in range(self.share.accumulation)
            ]
            self._position = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
            yield batches

    def _jobs(self, epoch: int, step: int, skipped: int) -> Iterator[Job]:
        """What the workers are asked for from a step on, without end; without the first `skipped` micro batches."""
        steps, micros = self.order.steps_per_epoch, self.share.accumulation
        position, micro = divmod(skipped, micros)
        epoch, step = divmod(epoch * steps + step + position, steps)
        while True:
            batch = self.order.batches(epoch)
            for s in range(step, steps):
                samples, copies = batch(s)
                for a in range(micro, micros):
                    index = self._mine(self.share.indices(a))
                    yield Job(epoch, samples[index], copies[index])
                micro = 0
            epoch, step = epoch + 1, 0

    def _mine(self, whole: Tensor) -> Tensor:
        """The part of a forward's images that this rank reads."""
        return whole.chunk(self.grid.submodule_ranks)[self.grid.submodule_rank] if self._gathers else whole

    @spanned(Part.COPY)
    def _batch(self, read: Images, index: Tensor, step: int) -> Batch:
        if self._on_device:
            images, labels, views = self._training_split.look_up(read, self.augmentation)
        else:
            images, labels, views = self._shared(read)
        return Batch(images, labels, views, index, self.order.seed, step)

    def _shared(self, read: Images) -> tuple[Tensor, Tensor, Tensor]:
        """(images, labels, views) on the device, read here or by all ranks of the replica together."""
        self._bad += read.bad
        device = self.grid.device
        images, labels, views = (x.to(device, non_blocking=True) for x in read[:3])
        if not self._gathers:
            return images, labels, views
        # One message: each image's pixels, its label and its view as bytes.
        parts = [images.flatten(1), labels[:, None].view(torch.uint8), views.view(torch.uint8)]
        rows = self.grid.share_images(torch.cat(parts, 1))
        pixels, label, view = rows.split([part.shape[1] for part in parts], 1)
        labels = label.contiguous().view(torch.int64)[:, 0]
        return pixels.unflatten(1, images.shape[1:]), labels, view.contiguous().view(torch.float32)

    def new_bad(self) -> list[str]:
        """File, member and reason of what this rank could not read since the last call."""
        found, self._bad = self._bad, []
        return found

    def count(self, split: str) -> int:
        """Samples of a split."""
        there = open_split(self.config, split)
        return self.facts.samples[split] if there is None else sum(int(length) for length in there.lengths)

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, valid) of every batch; each sample of `split` is valid on exactly one replica.

        Every replica gets the same number of equal batches (ZeRO-3 gathers parameters in each forward), filled up
        where they are not valid. The label of an image that cannot be read is `batch.UNREADABLE`.
        """
        count = self.count(split)
        size = min(self.config.eval_batch, -(-count // self.grid.replicas))
        size += -size % self.grid.submodule_ranks  # which divide the images between them, or a backbone's part of them
        starts = range(self.grid.replica * size, count + self.grid.replica * size, size * self.grid.replicas)
        positions = [torch.arange(size) + start for start in starts]
        samples = [torch.where(p < count, p, -1) for p in positions]
        if self._on_device and self._placed(split)[0]:
            for images, labels in map(self._resident(split).held_out, samples):
                yield images, labels, labels != PADDING
            return
        source = self._source(split, open_split(self.config, split))
        answers = self._pass(split, source, samples, size)
        try:
            for read in answers:
                images, labels, _ = self._shared(read)
                yield images, labels, labels != PADDING
        finally:
            answers.close()

    def _pass(self, split: str, source: Source | Streamed, samples: list[Tensor], size: int) -> Loader:
        """The images of a split, in forwards of `size`; by workers that wait for the next time."""
        if isinstance(source, Streamed):
            size //= self.grid.submodule_ranks if self._gathers else 1
            return dataclasses.replace(source, count=size, once=True).start(self._workers, self._pins)
        key = f"{split}, {size}"
        if key not in self._passes:
            jobs = [self._mine(numbers) for numbers in samples]
            self._passes[key] = Again(source.held_out, jobs, self._workers, self._pins)
        return self._passes[key].once()

    def calibration(self, steps: int) -> Iterator[list[Batch]]:
        """The micro batches of the first steps of the first epoch; the training stream stays where it is."""
        if isinstance(self._training, Streamed):  # which its own workers alone can read
            yield from islice(self.train(0, 0), steps)
            return
        steps, micros = min(steps, self.order.steps_per_epoch), self.share.accumulation
        if "calibration" not in self._passes:
            answer, processes = self._answer()
            jobs = list(islice(self._jobs(0, 0, 0), steps * micros))
            self._passes["calibration"] = Again(answer, jobs, processes, self._pins)
        loaded = self._passes["calibration"].once()
        answers = iter(loaded)
        try:
            for step in range(steps):
                yield [self._batch(next(answers), self.share.indices(micro), step) for micro in range(micros)]
        finally:
            loaded.close()

    def close(self) -> None:
        """End the workers."""
        self._close_stream()
        for waiting in self._passes.values():
            waiting.close()
        self._passes.clear()

    def _close_stream(self) -> None:
        self._position = (-1, -1)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
