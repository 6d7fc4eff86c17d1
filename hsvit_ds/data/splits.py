"""A data set as a recipe names it: what is known of it, where its splits are, what of it is refused."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from ..errors import RefusedError, counted
from . import augment, decode, layouts, remote
from .digits import SPLITS as DIGITS
from .index import Index, command, open_index
from .layouts import is_command, is_url, no_split, split_shards
from .sets import GREY_MEAN, GREY_STD, SETS, Facts, photographs
from .sources import Shards
from .transform import Transform

MOST, STREAMING = 8, 4
"""Workers of a rank by themselves, and those of a stream."""


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "digits"
    """The data set: "digits" is built in; "cifar10", "cifar100", "fashion_mnist", "mnist", "food101", "tiny_imagenet",
    "imagenette" and "imagenet1k" are known; any other name is a set of your own."""
    root: str = ""
    """Folder of its shards, NAME-SPLIT-0000.tar, SPLIT-0000.tar, or SPLIT/0000.tar in a folder for each split, indexed
    by `hsvit shards index`; or a URL with `_info.json` (https:, gs:, pipe:cat /x), whose shards are streamed, with the
    weaker promises of `stream.py`."""
    shards: dict[str, str] = field(default_factory=dict)
    """Splits whose shards are called otherwise: {split: pattern}, a list as webdataset takes it, relative to root or
    whole: train = "train-{000000..000146}.tar", lists joined by "::", of files also globs, as "a/*.tar". Their lengths
    behind URLs are those in `_info.json`, in root or else beside a split's first shard."""
    val: str = "val"
    """The split that is evaluated while a run trains, and that chooses its best checkpoint; "test" where a set has no
    other. Metrics, tables and pictures bear its name."""
    test: str = "test"
    """The split of the result; "val" where a set has no other."""
    index: str = ""
    """Folder of the index files, where they are not beside the shards."""
    image: str = ""
    """Extension of a sample's image, where more than one of its files is an image or none is called so: "jpg" or
    "rgb.png", or several, the preferred first: "jpg;png". An index knows that of `hsvit shards index --image`."""
    classes: int = 0
    """Of a data set of your own; 0: as many as its shards name, or those of the known one."""
    image_size: int = 0
    """Side of the images that the model takes, pixels; 0: that of the known data set, 224 for your own."""
    channels: int = 0
    """Of an image: 1, grey from its file to the model, or 3, where a grey image is read as RGB; 0: those of the known
    data set, 3 for your own. A set whose images have others is refused, unless 3 are asked for."""
    window: int = 8192
    """Samples shuffled together after the shards were."""
    last_batch: str = "drop"
    """The last incomplete global batch of an epoch: "drop" it, or "fill" it up with the epoch's first samples."""
    share: str = "auto"
    """"none": every submodule rank reads all images of its replica; "gather": each reads its part and they gather
    uint8; "auto": gather from 3 submodule ranks and above 64 px on."""
    on_device: str = "auto"
    """Whether images are decoded once and live on the device: "always", "never", or "auto": on a GPU, where the split
    takes at most a tenth of its memory and only flips or `augment.canvas` show an image in another way."""
    cache: str = ""
    """Folder for streamed shards, which are then fetched once; "": fetched in every epoch."""
    timeout: float = 30.0
    """Seconds that a server may send nothing before it is asked again."""
    workers: int | Literal["auto"] = "auto"
    """Processes of a rank that read, decode and augment; 0: the rank itself; "auto": as many as it has cores, at most
    8, and 4 for a stream."""
    decoder: str = "auto"
    """"simplejpeg" (turbo-JPEG), "pillow", or "auto": the first that is installed. Resolved with its version: another
    one gives other pixels, and is refused."""
    any_decoder: bool = False
    """Go on although the images were decoded by another program or version before, or are on another rank."""
    fingerprint: str = ""
    """Of the training split's index; filled in, and compared when a run is resumed."""
    max_bad_fraction: float = 0.01
    """Share of the training images that may be unreadable before the run stops."""
    eval_batch: int = 256
    """Images of a forward in evaluation, on each replica."""

    def __post_init__(self) -> None:
        choices = {
            "share": ("auto", "none", "gather"),
            "last_batch": ("drop", "fill"),
            "on_device": ("auto", "always", "never"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        for name in ("window", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("workers", "classes", "image_size"):
            if getattr(self, name) != "auto" and getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        self._check_channels()
        layouts.check(self.root, self.shards)
        if self.timeout <= 0:
            raise ValueError(f"timeout = {self.timeout}: must be above 0 seconds")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction = {self.max_bad_fraction}: must be in [0, 1]")
        if self.name not in SETS and not self.classes and not self.is_placed:
            raise ValueError(
                f'name = "{self.name}": not one of {", ".join(SETS)}; for a data set of your own set root, the folder '
                "of its shards, or classes"
            )
        known = SETS["digits"]
        if self.name == "digits" and (
            self.is_placed
            or self.classes not in (0, known.classes)
            or self.image_size not in (0, known.image_size)
            or self.channels not in (0, known.channels)
        ):
            raise ValueError('name = "digits" is built in: it takes no root, shards, classes, image_size or channels')

    def _check_channels(self) -> None:
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels = {self.channels}: must be 1 or 3, or 0 for those of the data set")
        if self.channels == 1 and self.name in SETS and SETS[self.name].channels == 3:
            raise ValueError(f"channels = 1: {self.name} has 3; leave it out, or set name to that of the grey images")

    @property
    def is_placed(self) -> bool:
        """Whether it says where the data is."""
        return bool(self.root or self.shards)

    @property
    def urls(self) -> dict[str, tuple[str, ...]]:
        """Of the splits in `shards` that are streamed."""
        found = {split: layouts.urls("", pattern, self.root) for split, pattern in self.shards.items()}
        return {split: urls for split, urls in found.items() if urls}

    @property
    def patterns(self) -> dict[str, str]:
        """Of the splits in `shards` that are files."""
        streamed = self.urls
        return {split: pattern for split, pattern in self.shards.items() if split not in streamed}

    @property
    def stream(self) -> str:
        """The key and value that makes it a stream, in whole or in part; "" for files."""
        if is_url(self.root):
            return f"data.root = {self.root}"
        return next((f"data.shards.{split} = {self.shards[split]}" for split in self.urls), "")

    @property
    def commands(self) -> list[str]:
        """What a shell would run to read it."""
        places = [self.root, *chain.from_iterable(self.urls.values())]
        return [place for place in places if is_command(place)]

    def moved(self, root: str) -> Config:
        """With its data in another root; shards that did not lie in its own are found there by their names.

        Raises:
            RefusedError: a root that is none, or where its shards cannot be.
        """
        inside = {split: pattern for split, pattern in self.shards.items() if not layouts.leads_elsewhere(pattern)}
        try:
            return dataclasses.replace(self, root=root, shards=inside)
        except ValueError as error:
            raise RefusedError(f"[data] {error}") from None


def workers(config: Config, cores: int, ranks: int) -> int:
    """Processes of a rank that read; of its share of the usable `cores` of a host that has `ranks` of them.

    Never of its cores where it reads a stream, whose order the number is a part of: the run may go on elsewhere.
    """
    if config.workers != "auto":
        return config.workers
    return STREAMING if config.stream else max(1, min(cores // ranks, MOST))


def facts(config: Config) -> Facts:
    """What the model depends on; no file is read."""
    known = SETS.get(config.name)
    if known is None:
        grey = config.channels == 1
        known = (
            photographs(224, config.classes, mean=GREY_MEAN, std=GREY_STD) if grey else photographs(224, config.classes)
        )
    size, classes = config.image_size or known.image_size, config.classes or known.classes
    more = (config.channels or known.channels) // known.channels  # grey images as RGB have the same statistics thrice
    return dataclasses.replace(
        known,
        image_size=size,
        classes=classes,
        channels=known.channels * more,
        mean=known.mean * more,
        std=known.std * more,
    )


def expected_channels(config: Config) -> int:
    """Channels that the first images must have; 0: any, as grey ones are to be read as RGB."""
    return 0 if config.channels == 3 else facts(config).channels


def split_names(config: Config) -> list[str]:
    """The splits that are there."""
    if config.name == "digits":
        return list(DIGITS)
    streamed = remote.split_names(config.root, config.timeout, config.urls) if config.stream else []
    files = split_shards(Path(config.root), config.patterns) if config.root and not is_url(config.root) else []
    return list(dict.fromkeys([*streamed, *files]))


def open_split(config: Config, split: str) -> Index | remote.Split | None:
    """Where the samples of a split are: by their index, behind URLs, or None for a set in memory.

    Raises:
        RefusedError: nothing is there, or it is not of this data set.
    """
    if config.name == "digits":
        if split not in DIGITS:
            raise no_split("the digits", split, DIGITS)
        return None
    if is_url(config.root) or split in config.urls:
        return remote.open_split(config.root, split, config.timeout, config.urls)
    if not config.root and config.shards and split not in config.shards:
        raise no_split("data.shards", split, config.shards)
    if not config.root:
        raise RefusedError(
            f"data.root is not set: the folder of {config.name}'s shards, {layouts.NAMES}, or as data.shards names them"
        )
    return _open_files(config, split)


def _open_files(config: Config, split: str) -> Index:
    """The index of a split in a folder."""
    folder, patterns = Path(config.root), config.patterns
    if not folder.is_dir():
        raise RefusedError(f"data.root = {folder}: no such folder")
    if split not in split_shards(folder, patterns):
        raise no_split(f"data.root = {folder}", split, split_names(config))
    where = Path(config.index) if config.index else folder
    index = open_index(folder, split, where, patterns)
    if config.image not in ("", index.image):
        raise RefusedError(
            f'{index.path}: its images are "{index.image}", but data.image = "{config.image}"; make it anew: '
            f"{command(folder, where, config.image, patterns)}"
        )
    if not len(index):
        tells = f"hsvit shards check {shlex.quote(str(folder))}{layouts.options(patterns)} tells why"
        raise RefusedError(f"{index.path}: holds no sample; {tells}")
    classes = facts(config).classes or len(index.classes)
    if classes and index.largest_label >= classes:
        raise RefusedError(
            f"{index.path}: {index.named_with(index.largest_label)} has label {index.largest_label}, but "
            f"{config.name} has {counted(classes, 'class', 'classes')}, 0 to {classes - 1}; is data.root the right "
            "folder, or data.classes to be set?"
        )
    return index


def class_names(config: Config) -> tuple[str, ...]:
    """What the labels mean, as the shards say it; () where they do not."""
    if config.name == "digits":
        return tuple(str(digit) for digit in range(facts(config).classes))
    if is_url(config.root) or "train" in config.urls:
        return remote.class_names(config.root, config.timeout, config.urls)
    there = open_split(config, "train") if config.is_placed else None
    return there.classes if isinstance(there, Index) else ()


def check_splits(config: Config) -> None:
    """Refuse a data set that lacks a split, before a run trains an epoch to find out."""
    for split in ("train", config.val, config.test):
        there = open_split(config, split)
        if split == "train" and isinstance(there, Index):
            _check_channels(config, there)


def _check_channels(config: Config, index: Index) -> None:
    """Look at images from all over a split; of a stream its workers look at the first ones."""
    decoder = decode.resolved(config.decoder)
    shards = Shards(index, Transform(augment.Config(), 1, decoder, seed=0))
    some = range(0, len(index), max(len(index) // decode.FIRST, 1))[: decode.FIRST]
    decode.check_channels(((index.name(i), shards.read(i)[0]) for i in some), expected_channels(config), decoder)


def named_as_before(config: Config) -> Config:
    """For a run from when no recipe named its splits: "val" and "test" stood in for each other."""
    there = split_names(config)
    val = next((name for name in (config.val, "validation", "test") if name in there), config.val)
    test = next((name for name in (config.test, "val", "validation") if name in there), config.test)
    return dataclasses.replace(config, val=val, test=test)


def resolved(config: Config) -> Config:
    """With classes and image size, and the decoder and the fingerprint of the data, filled in; refuses others than a
    recipe names."""
    if config.name not in SETS and not config.classes:
        config = dataclasses.replace(config, classes=len(class_names(config)))
        if not config.classes:
            raise RefusedError(
                f"data.root = {config.root}: names no classes (classes.txt, _info.json, kept in the index); set "
                "data.classes to their number"
            )
    about = facts(config)
    config = dataclasses.replace(config, classes=about.classes, image_size=about.image_size)
    if config.name == "digits" or not config.is_placed:
        return config
    there = open_split(config, "train")
    assert there is not None
    if config.fingerprint not in ("", there.fingerprint):
        where = config.root or config.shards["train"]
        raise RefusedError(
            f'data.fingerprint = "{config.fingerprint}", but the training split in {where} has '
            f'"{there.fingerprint}": other samples, labels or shards. Take them with data.fingerprint=""'
        )
    return dataclasses.replace(config, decoder=decode.resolved(config.decoder), fingerprint=there.fingerprint)


def shard_lengths(config: Config) -> tuple[int, ...]:
    """Samples in each shard of the training split; without data one shard of the published size."""
    if config.name == "digits" or (config.name in SETS and not config.is_placed):
        return (facts(config).samples["train"],)
    there = open_split(config, "train")
    assert there is not None
    return tuple(int(length) for length in there.lengths)


def shares_images(config: Config, submodule_ranks: int, image_size: int) -> bool:
    """Whether the ranks of a replica each read a part and gather; decided by `share`, see there.

    Streams are always shared: two ranks that read one apart might not get the same images again after a fault.
    """
    if config.stream:
        return submodule_ranks > 1
    if config.share == "auto":
        return submodule_ranks > 2 and image_size > 64
    return config.share == "gather" and submodule_ranks > 1


def not_on_device(config: Config, augmentation: augment.Config) -> str:
    """Why images have to come from workers, empty where they need not."""
    if config.stream:
        return f"{config.stream} is a stream"
    if keys := augmentation.needs_workers:
        return f"augment.{keys[0]} = {getattr(augmentation, keys[0])!r} is computed by them, from the files"
    return ""


def check_on_device(config: Config, augmentation: augment.Config) -> None:
    """Refuse images on the device that have to come from workers."""
    if config.on_device == "always" and (why := not_on_device(config, augmentation)):
        raise RefusedError(f'data.on_device = "always": images have to come from workers, as {why}; set "auto"')


def check_share(config: Config, facts: Facts, submodule_ranks: int, micro_batch: int) -> None:
    """Refuse a micro batch that the ranks of a replica cannot divide, and streams that they do not."""
    if config.stream and config.share == "none" and submodule_ranks > 1:
        raise RefusedError('data.share = "none": the ranks of a replica share a stream; set "auto" or "gather"')
    if shares_images(config, submodule_ranks, facts.image_size) and micro_batch % submodule_ranks:
        raise RefusedError(
            f'data.share = "{config.share}": the micro batch of {micro_batch} is not divisible by '
            f'{counted(submodule_ranks, "submodule rank")}; choose another global batch, or data.share = "none"'
        )
