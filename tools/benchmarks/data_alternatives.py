"""What the data benchmarks compare over the same shards: this project's path, webdataset's, and torchvision's.

No file of this one's imports is slow, since the alternatives' worker processes import it.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from hsvit_ds.data import augment, decode, loader
from hsvit_ds.data.batch import Job
from hsvit_ds.data.index import Index
from hsvit_ds.data.indexing import make
from hsvit_ds.data.layouts import split_shards
from hsvit_ds.data.order import Order
from hsvit_ds.data.scan import scan
from hsvit_ds.data.sets import IMAGENET_MEAN, IMAGENET_STD
from hsvit_ds.data.sources import Shards
from hsvit_ds.data.transform import Transform

WINDOW = 8192  # of the order, as by default
BUFFER = 1000  # samples that webdataset shuffles together
IMAGES = "jpg;jpeg;png;webp"
Rate = Callable[[], float]


@dataclass(frozen=True)
class Data:
    """Samples to measure with.

    folder: links to their shards, as a training split with an index. files: the same images, a folder a class. size:
    side of the crops. batch: images of one.
    """

    folder: Path
    files: Path
    index: Index
    size: int
    batch: int

    @property
    def order(self) -> Order:
        return Order(tuple(self.index.lengths.tolist()), WINDOW, self.batch, seed=0)

    @property
    def urls(self) -> list[str]:
        return [str(self.folder / name) for name in self.index.shards]

    def shards(self, **options: Any) -> Shards:
        """Cropped at random and flipped, and what `options` of `augment.Config` add."""
        config = augment.Config(crop="random_resized", flip=0.5, **options)
        return Shards(self.index, Transform(config, self.size, decode.installed("auto"), seed=0))

    def jobs(self, epochs: int) -> Iterator[Job]:
        for epoch in range(epochs):
            for samples in self.order.epoch(epoch).split(self.batch):
                yield Job(epoch, samples, torch.zeros_like(samples))


def prepare(folder: Path, place: Path, images: int, shards: int, size: int, batch: int) -> Data:
    """Link the first shards of `folder`'s first split that hold `images`, at least `shards` of them, into `place`."""
    found = next(iter(split_shards(folder).values()))
    linked: list[Path] = []
    linked_to = place / "shards"
    linked_to.mkdir()
    count = 0
    for path in found:
        if count >= images and len(linked) >= shards:
            break
        linked.append(linked_to / f"benchmark-train-{len(linked):04d}.tar")
        linked[-1].symlink_to((folder / path).resolve())
        count += len(scan(linked[-1]).samples)
    index = make(linked_to, "train")
    data = Data(linked_to, place / "files", index, size, batch)
    source = data.shards()
    for sample in range(len(index)):
        file, label = source.read(sample)
        name = data.files / f"{label:05d}" / f"{sample:08d}{Path(index.name(sample)).suffix}"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(file)
    return data


# Clocks


def rates(alternatives: dict[str, Rate], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """The median of what each alternative returns over `repeats`, taking turns so that noise hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in alternatives}
    for repeat in range(repeats + warm_up):
        for name, measure in alternatives.items():
            value = measure()
            if repeat >= warm_up:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def one(_: Any) -> int:
    return 1


def from_the_start(make: Callable[[], Iterable[Any]], count: Callable[[Any], int] = len) -> float:
    """Images/s of everything that `make` gives, its start included."""
    start = time.perf_counter()
    images = sum(count(item) for item in make())
    return images / (time.perf_counter() - start)


def later(make: Callable[[], Iterator[Any]], skipped: int) -> float:
    """Images/s after `skipped` images.

    By then every worker process has started, and what they had made before the clock began is no more than usual.
    """
    batches = make()
    while skipped > 0:
        skipped -= len(next(batches))
    start = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    return images / (time.perf_counter() - start)


# This project


def reads(data: Data) -> Iterator[bytes]:
    """The image files in the order of an epoch."""
    source = data.shards()
    yield from (source.read(sample)[0] for sample in data.order.epoch(0).tolist())


def ours(data: Data, source: Shards) -> Iterator[Tensor]:
    """Normalised batches of an epoch, in this process."""
    for job in data.jobs(1):
        yield augment.normalise(source.training(job).pixels, IMAGENET_MEAN, IMAGENET_STD)


def ours_by_workers(data: Data, source: Shards, workers: int, passes: int) -> Iterator[Tensor]:
    """As `ours`, normalised here as on a rank, the rest in worker processes."""
    stream = loader.answers(source.training, lambda first: skipped(data.jobs(passes), first), workers, pin=False)
    try:
        for answer in stream:
            yield augment.normalise(answer.pixels, IMAGENET_MEAN, IMAGENET_STD)
    finally:
        stream.close()


def skipped(jobs: Iterator[Job], first: int) -> Iterator[Job]:
    return (job for n, job in enumerate(jobs) if n >= first)


# The others


def usual(size: int) -> transforms.Compose:
    """What training scripts for ImageNet do to a Pillow image."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def pipeline(data: Data) -> Any:
    """webdataset's, shuffled, up to the bytes of the samples."""
    return webdataset.WebDataset(data.urls, shardshuffle=len(data.urls), empty_check=False).shuffle(BUFFER)


def webdataset_reads(data: Data) -> Iterator[bytes]:
    for image, _label in pipeline(data).to_tuple(IMAGES, "cls"):
        yield image


def webdataset_images(data: Data, passes: int = 1) -> Any:
    """(normalised batches, labels) by Pillow and torchvision's transforms."""
    images = pipeline(data).decode("pil").to_tuple(IMAGES, "cls").map_tuple(usual(data.size))
    return images.batched(data.batch).repeat(passes)


def image_folder(data: Data, workers: int = 0) -> DataLoader[Any]:
    more: dict[str, Any] = {}
    if workers:
        more = {"persistent_workers": True, "multiprocessing_context": get_context("forkserver")}
    images = ImageFolder(data.files, usual(data.size))
    return DataLoader(images, data.batch, shuffle=True, num_workers=workers, **more)


def webdataset_by_workers(data: Data, workers: int, passes: int) -> Iterator[Tensor]:
    """The start of workers is as this project's, a fork server: only what they do differs."""
    context = get_context("forkserver")
    images = webdataset_images(data, passes)
    for batch, _labels in webdataset.WebLoader(
        images, batch_size=None, num_workers=workers, multiprocessing_context=context
    ):
        yield batch


def image_folder_by_workers(data: Data, workers: int, passes: int) -> Iterator[Tensor]:
    batches = image_folder(data, workers)
    for _ in range(passes):
        for batch, _labels in batches:
            yield batch


def first(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of (images, labels)."""
    return (images for images, _labels in batches)


def by_workers(data: Data, workers: int, passes: int) -> dict[str, Rate]:
    """The alternatives of a training path, through worker processes, after a first pass."""
    makes: dict[str, Callable[[], Iterator[Tensor]]] = {
        f"hsvit-ds, {name}": partial(ours_by_workers, data, data.shards(filter=name), workers, passes + 1)
        for name in augment.FILTERS
    }
    makes["webdataset, Pillow, torchvision"] = partial(webdataset_by_workers, data, workers, passes + 1)
    makes["ImageFolder, Pillow, torchvision"] = partial(image_folder_by_workers, data, workers, passes + 1)
    return {name: partial(later, make, len(data.index)) for name, make in makes.items()}


def in_this_process(data: Data) -> dict[str, Rate]:
    """The alternatives of a training path, without workers."""
    makes: dict[str, Callable[[], Iterable[Tensor]]] = {
        f"hsvit-ds, {name}": partial(ours, data, data.shards(filter=name)) for name in augment.FILTERS
    }
    makes["webdataset, Pillow, torchvision"] = lambda: first(webdataset_images(data))
    makes["ImageFolder, Pillow, torchvision"] = lambda: first(image_folder(data))
    return {name: partial(from_the_start, make) for name, make in makes.items()}


# Decoders: bytes to uint8 RGB of the whole image


def by_simplejpeg(data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB")


def by_torchvision(data: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def by_pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


DECODERS = {"simplejpeg": by_simplejpeg, "torchvision": by_torchvision, "Pillow": by_pillow}
