"""A recipe for a data set of somebody's own, sized to its images and to this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import counted
from .goals import Goal
from .survey import UNEVEN, Survey

MINUTES = {Goal.small: 4.0, Goal.elastic: 8.0, Goal.accurate: 20.0}
"""That a training may take here, where the epochs allow it."""
EPOCHS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)
"""Of which the largest is taken that is within them, or the smallest."""
EVALUATION = 0.4
"""What an evaluated image costs, of a trained one."""
_WHY = {
    Goal.small: "an HSViT (arXiv 2404.05196) of 0.8 million parameters, quick to train and to run",
    Goal.accurate: "a larger HSViT (arXiv 2404.05196), for better answers",
    Goal.elastic: "a slimmable HSViT by Scala's task (arXiv 2412.04786): one training, a network for every budget",
}


@dataclass(frozen=True)
class Proposal:
    """A recipe's choices. batch: global. epochs: 0 until steps were timed."""

    goal: Goal
    name: str
    shards: Path
    index: Path | None
    survey: Survey
    variant: str
    image_size: int
    batch: int
    has_gpu: bool
    epochs: int = 0
    minutes: float = 0.0

    @classmethod
    def of(cls, goal: Goal, name: str, shards: Path, index: Path | None, survey: Survey, has_gpu: bool) -> Proposal:
        """Model, image size and batch, by the number and the size of the images and by the machine."""
        sides = [side for side in (32, 64, 128) if side <= survey.shorter or side == 32]
        side = max(s for s in sides if s < 128 or has_gpu)
        variant = "C2A2" if goal != Goal.accurate else "C4A8" if has_gpu else "C3A4"
        images = len(survey.splits["train"].items)
        most = 256 if has_gpu else 64
        batch = 8
        while batch < most and batch * 16 <= images:  # some steps an epoch, of some images
            batch *= 2
        return cls(goal, name, shards, index, survey, variant, side, batch, has_gpu)

    def within(self, rate: float) -> Proposal:
        """With as many epochs as are within the goal's minutes. rate: images/s of training, here."""
        images = {split: len(source.items) for split, source in self.survey.splits.items()}
        held = images.get("val", images.get("test", 0))
        minutes = (images["train"] + EVALUATION * held) / rate / 60  # of an epoch
        epochs = max((e for e in EPOCHS if e * minutes <= MINUTES[self.goal]), default=EPOCHS[0])
        return replace(self, epochs=epochs, minutes=epochs * minutes)

    @property
    def words(self) -> str:
        took = counted(max(round(self.minutes), 1), "minute")
        widths = " at four widths" if self.goal == Goal.elastic else ""
        return (
            f"HSViT {self.variant}{widths} at {self.image_size} px, {self.epochs} epochs in batches of {self.batch}: "
            f"about {took} {'on this GPU' if self.has_gpu else 'on this CPU'}, as timed"
        )

    def text(self) -> str:
        """The recipe's file."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        s, images = self.survey, {split: len(source.items) for split, source in self.survey.splits.items()}
        yield f"# {self.name}: {_WHY[self.goal]}."
        yield "#"
        parts = ", ".join(f"{count:,} of {split}" for split, count in images.items())
        yield f"# Data:     images: {parts}; {counted(len(s.classes), 'class', 'classes')}"
        if self.minutes:
            device = "a GPU" if self.has_gpu else "a CPU"
            took = counted(max(round(self.minutes), 1), "minute")
            yield f"# Expected: about {took} on {device}, by steps that were timed"
        if self.goal == Goal.accurate:
            yield "# Instead:  a network that has seen other images, where it can be downloaded (not run):"
            yield '#           \'model={kind="timm", name="resnet50", weights="default"}\' data.image_size=224'
        yield "# Keys:     hsvit recipe --keys"
        yield ""
        yield "[model]"
        yield 'kind = "hsvit"'
        yield f'variant = "{self.variant}"  # C2A2, C3A4 and C4A8 are each larger than the one before'
        yield "dropout = 0.1"
        if self.goal == Goal.elastic:
            yield from ("", "[model.widths]  # 25, 50, 75 and 100 % of the channels", "smallest = 0.25")
            yield from ("granularity = 0.25", "", "[task]", 'kind = "scala"')
        yield from ("", "[run]", f"name = {_quoted(self.name)}")
        yield f"epochs = {self.epochs or EPOCHS[-1]}  # more are better while the loss on {self._val} still falls"
        yield f"global_batch = {self.batch}"
        yield from ("", "[optimizer]", "lr = 2e-3", "weight_decay = 0.05", "warmup_epochs = 2.0", "clip = 1.0")
        yield from ("", "[augment]", 'crop = "random_resized"  # a part of each image, another one every time')
        yield from ("crop_scale = [0.35, 1.0]", "flip = 0.5  # 0 where left and right mean something, as in text")
        yield from ("colour_jitter = 0.2", "label_smoothing = 0.1", "eval_crop = 1.0  # the centre of an image")
        if self.goal == Goal.accurate:
            yield "cutmix = 1.0"
            yield "mix_probability = 0.5"
        yield from ("", "[data]", f"name = {_quoted(self.name)}", f"root = {_quoted(str(self.shards))}")
        if self.index is not None:
            yield f"index = {_quoted(str(self.index))}  # of tars that are left as they are"
        yield f"image_size = {self.image_size}"
        if self.survey.is_grey:
            yield "channels = 1  # grey images; 3 reads them as RGB, for a network that has seen photographs"
        yield '# workers = "auto"  # processes that read and augment: the cores; a number, where they are to be fewer'
        for role, other in (("val", "test"), ("test", "val")):
            there = role if role in s.splits else other
            name = s.names.get(there, there)
            if name != role:
                yield f'{role} = "{name}"' + ("" if role in s.splits else "  # there is no other")

    @property
    def _val(self) -> str:
        return "val" if "val" in self.survey.splits else "test"


def found(survey: Survey, folder: Path) -> Iterator[str]:
    """What to tell a person of a survey, a line each."""
    total = sum(len(source.items) for source in survey.splits.values())
    yield f"{folder}: {counted(total, 'image')} of {counted(len(survey.classes), 'class', 'classes')}"
    (small, large) = survey.sizes
    formats = ", ".join(f"{count:,} {name}" for name, count in survey.formats.items())
    sizes = f"{small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if large != small else "")
    yield f"sizes: {sizes} px, the middle one's shorter side {survey.shorter} px; {formats}"
    counts = survey.counts()["train"]
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] >= UNEVEN * counts[least]:
        many = f"{survey.classes[most]} has {counted(counts[most], 'image')} to train"
        few = f"{survey.classes[least]} has {counts[least]:,}"
        yield f"uneven: {many}, {few}; look at the accuracy of each class"
    if survey.damaged:
        yield f"left out, damaged: {counted(len(survey.damaged), 'image')}"
    if survey.copies:
        yield f"left out, copies of others: {counted(len(survey.copies), 'image')}"
    if survey.others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in list(survey.others.items())[:5])
        yield f"left alone, no images: {kinds}"
    if survey.held_out:
        yield f"drawn from train, by seed, the same share of each class: {' and '.join(survey.held_out)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # of which TOML's basic strings are a superset
