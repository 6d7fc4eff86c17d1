"""Reading, decoding and augmenting shards beside webdataset and ImageFolder: `python -m tools.benchmark data FOLDER`.

Every shard is in the page cache and PyTorch has one thread. Other processes of these benchmarks start here too:
`python -m tools.benchmarks.data FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hsvit_ds.data import augment, decode, splits
from hsvit_ds.data.augment import normalise
from hsvit_ds.data.decode import Box, Picture
from hsvit_ds.data.index import open_index
from hsvit_ds.data.order import Order
from hsvit_ds.data.order import Share as Part
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.sets import IMAGENET_MEAN, IMAGENET_STD
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from tools.benchmarks import data_alternatives as alternatives
from tools.benchmarks.data_alternatives import DECODERS, WINDOW, Data, Rate, from_the_start, one, rates
from tools.benchmarks.steps import machine, show

MEASURED = 512  # images, at least
BATCH = 64
PASSES = 2  # through workers, after a first one
POLICIES = ("rand-m9-mstd0.5-inc1", "TrivialAugmentWide", "3a")
TRAINING = augment.Config(crop="random_resized", flip=0.5, filter="bilinear")
Rows = list[dict[str, Any]]


# One core


def over(found: dict[str, float], base: str, target: str, kind: str = "hsvit-ds") -> Rows:
    """Rows of images/s; those whose name begins with `kind` have a target over `base`."""
    return [
        {
            "implementation": name,
            "images/s": f"{value:,.0f}",
            f"over {base.split(',')[0]}": f"{value / found[base]:.2f}x",
            "target": target if name.startswith(kind) else "",
        }
        for name, value in found.items()
    ]


def reader(data: Data, repeats: int) -> Rows:
    compared: dict[str, Rate] = {
        "hsvit-ds": lambda: from_the_start(lambda: alternatives.reads(data), one),
        "webdataset": lambda: from_the_start(lambda: alternatives.webdataset_reads(data), one),
    }
    return over(rates(compared, repeats), "webdataset", "2x")


def at_once(measure: Rate, workers: int) -> float:
    """What so many processes, forked here, measure at the same time, together."""
    context = get_context("fork")
    barrier, found = context.Barrier(workers), context.SimpleQueue()

    def work() -> None:
        barrier.wait()
        found.put(measure())

    started = [context.Process(target=work) for _ in range(workers)]
    for process in started:
        process.start()
    total = sum(found.get() for _ in started)
    for process in started:
        process.join()
    return total


def by_core_and_node(compared: dict[str, Rate], repeats: int, workers: int, what: str) -> Rows:
    """Rows of images/s of one process and of `workers` at once."""
    node = {f"{name} at once": partial(at_once, measure, workers) for name, measure in compared.items()}
    found = rates(compared | node, repeats)
    return [
        {
            what: name,
            "images/s": f"{found[name]:,.0f}",
            "ms an image": f"{1000 / found[name]:.3f}",
            f"images/s, {workers} processes": f"{found[f'{name} at once']:,.0f}",
        }
        for name in compared
    ]


def decoders(data: Data, repeats: int, workers: int) -> Rows:
    files = [file for file in alternatives.reads(data) if file[:3] == b"\xff\xd8\xff"]
    compared: dict[str, Rate] = {
        name: partial(from_the_start, partial(map, decoder, files), one) for name, decoder in DECODERS.items()
    }
    return by_core_and_node(compared, repeats, workers, "decoder")


def path(data: Data, repeats: int) -> Rows:
    return over(rates(alternatives.in_this_process(data), repeats), "webdataset, Pillow, torchvision", "1.5x")


def stages(data: Data, repeats: int, workers: int) -> Rows:
    """What each part of this project's path adds; the last is the device's."""
    jobs = list(data.jobs(1))
    files = list(alternatives.reads(data))
    name = decode.installed("auto")

    def whole(file: bytes) -> Any:
        picture = Picture(file, name)
        return picture.pixels(Box(0, 0, picture.height, picture.width), max(picture.height, picture.width))

    trained = {"decode the whole, crop, resize, flip": data.shards(filter="bilinear")}
    trained |= {f"  and {policy}": data.shards(filter="bilinear", policy=policy) for policy in POLICIES}
    answers = [next(iter(trained.values())).training(job).pixels for job in jobs]
    compared: dict[str, Rate] = {
        "read": lambda: from_the_start(lambda: alternatives.reads(data), one),
        "decode the whole, in memory": lambda: from_the_start(lambda: map(whole, files), one),
    }
    for stage, source in trained.items():
        compared[f"read, {stage}" if stage[0] != " " else stage] = partial(
            from_the_start, partial(map, lambda job, source=source: source.training(job).pixels, jobs)
        )
    compared["normalise batches"] = lambda: from_the_start(
        lambda: (normalise(answer, IMAGENET_MEAN, IMAGENET_STD) for answer in answers)
    )
    return by_core_and_node(compared, repeats, workers, "stage, bilinear")


# Workers


def node(data: Data, repeats: int, workers: int) -> Rows:
    found = rates(alternatives.by_workers(data, workers, PASSES), repeats, warm_up=0)
    return over(found, "webdataset, Pillow, torchvision", "1.5x")


def reader_of(data: Path, size: int, batch: int, grid: Grid, **options: Any) -> Reader:
    """The training split in `data`, as a run reads it."""
    index = open_index(data, "train")
    known: dict[str, Any] = {
        "name": "benchmark",
        "root": str(data),
        "classes": index.largest_label + 1,
        "image_size": size,
    }
    config = splits.Config(**known, window=WINDOW, **options)
    order = Order(tuple(index.lengths.tolist()), WINDOW, batch, seed=0)
    return Reader(config, TRAINING, order, Part(batch, 1, 1, 0), grid)


def epochs(reader: Reader) -> dict[str, float]:
    """Images/s of steps that cost nothing but the input, the share of them spent waiting, bytes sent an image.

    A first epoch, in which the workers start, is left out. Measured as `Trainer` measures.
    """
    weight = torch.ones((), device=reader.grid.device, requires_grad=True)
    seconds: list[float] = []
    waits: list[float] = []
    for epoch in range(PASSES + 1):
        if epoch == 1:
            seconds, waits = [], []
            reader.grid.barrier()
            reader.grid.images.take()
        since = time.perf_counter()
        for (batch,) in reader.train(epoch, 0):
            waits.append(time.perf_counter() - since)
            images, _ = augment.prepare(batch, TRAINING, reader.facts)
            (weight * images.mean()).backward()
            seconds.append(time.perf_counter() - since)
            since = time.perf_counter()
    reader.close()
    count = len(seconds) * reader.order.global_batch
    total = sum(seconds)
    return {"rate": count / total, "wait": sum(waits) / total, "bytes": reader.grid.images.take() / count}


def trainer(data: Data, repeats: int, workers: int) -> Rows:
    """The reader of a run, in front of a model that costs nothing, by worker processes."""
    grid = Grid(GridConfig(), submodules=1)
    waits: dict[int, list[float]] = {}

    def measure(count: int) -> float:
        found = epochs(reader_of(data.folder, data.size, data.batch, grid, workers=count))
        waits.setdefault(count, []).append(found["wait"])
        return found["rate"]

    counts = sorted({1, workers})
    found = rates({str(count): partial(measure, count) for count in counts}, repeats, warm_up=0)
    return [
        {
            "data.workers": count,
            "images/s": f"{found[str(count)]:,.0f}",
            "perf/data_wait": f"{statistics.median(waits[count]):.2f}",
        }
        for count in counts
    ]


# Ranks


def shared(data: Data, repeats: int) -> Rows:
    """A replica of two ranks on this machine, a worker each."""
    arguments = ["--size", str(data.size), "--batch", str(data.batch), "--repeats", str(repeats)]
    found = asked(data.folder, *arguments, ranks=2)
    return [
        {
            "data.share": share,
            "images/s of the replica": f"{rate:,.0f}",
            "over none": f"{rate / found['none']['rate']:.2f}x",
            "kB sent by a rank, an image": f"{found[share]['bytes'] / 1e3:.1f}",
        }
        for share, rate in ((share, values["rate"]) for share, values in found.items())
    ]


def share(folder: Path, size: int, batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """On a rank: {data.share: what `epochs` found}, medians."""
    grid = Grid(GridConfig(submodule_ranks=2), submodules=2)
    readers = {name: reader_of(folder, size, batch, grid, share=name, workers=1) for name in ("none", "gather")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, reader in readers.items():
            found[name].append(epochs(reader))
    grid.close()
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def asked(folder: Path, *arguments: str, ranks: int) -> Any:
    """What fresh processes, the ranks of a grid, answer."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "answer.json"
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "tools.benchmarks.data", str(folder), "--out", str(out), *arguments]
        started = []
        for rank in range(ranks):
            env = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            started.append(subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}))
        if any([process.wait() for process in started]):
            raise RuntimeError(f"{' '.join(command)} failed")
        return json.loads(out.read_text())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def run(folder: Path, size: int, workers: int, repeats: int, out: Path | None) -> None:
    """All tables. out: a folder for their rows."""
    torch.set_num_threads(1)
    names = ("webdataset", "torchvision", "timm", "numpy")
    where = f"median of {repeats}: {machine(torch.device('cpu'))}"
    print(", ".join([decode.installed("auto"), *(f"{name} {version(name)}" for name in names)]))

    def table(name: str, title: str, rows: Rows) -> None:
        show(rows, f"{title}, {where}", out / f"{name}.csv" if out is not None else None)

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = alternatives.prepare(folder, Path(temporary), MEASURED, max(workers, 2), size, BATCH)
        what = f"{len(data.index)} images of {folder.name}, "
        crop = f"{what}random crops to {size} px in batches of {BATCH}"
        table("reader", f"{what}one process, bytes alone", reader(data, repeats))
        table("decoders", f"{what}decoding alone", decoders(data, repeats, workers))
        table("path", f"{crop}, one process", path(data, repeats))
        table("stages", f"{crop}, stages", stages(data, repeats, workers))
        table("node", f"{crop}, {workers} workers", node(data, repeats, workers))
        table("trainer", f"{crop}, the reader of a run", trainer(data, repeats, workers))
        table("share", f"{crop}, two ranks of a replica, a worker each", shared(data, repeats))


def main() -> None:
    """A process that `asked` started."""
    parser = argparse.ArgumentParser("tools.benchmarks.data", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("--size", "--batch", "--repeats"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    answer = share(args.folder, args.size, args.batch, args.repeats)
    if os.environ["RANK"] == "0":
        args.out.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
