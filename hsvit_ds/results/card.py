"""The model card of an export: what it is, how good and how costly, and code that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import __version__
from ..data.preprocessing import Preprocessing
from ..errors import counted
from ..models import Model
from ..models.mobilenet import MobileNet
from ..models.slimmable import Mix, Width
from ..models.timm_models import Classifier
from ..models.uniformer import UniFormer
from ..models.vit import ViT
from ..run.report import width_name

_SLICED = {
    "channels": "Scala, arXiv 2412.04786",
    "heads": "sliced by heads as HydraViT, arXiv 2409.17978",
    "mlp": "sliced in its MLPs as MatFormer, arXiv 2310.07707",
}
MANY = 20
"""Classes that are named in the card; more are in classes.txt."""


@dataclass(frozen=True)
class Row:
    """A width. macs: multiply-adds of an image. top1: %, by split, None where it was not measured. trained: see
    `report.WidthRow`."""

    width: Width
    parameters: int
    macs: int
    top1: Mapping[str, float | None]
    trained: bool


@dataclass(frozen=True)
class Card:
    """What a run says of a network.

    weights: what the run started from, empty for random ones. checkpoint: which weights, in words. rows: a width each.
    slice: that of `slimmable.Config`, or "mlp". sizes: images of each split that was measured. by_class: split, and of
    each class its name, images and top-1 in %; None where that was not measured.
    """

    run: str
    data: str
    weights: str
    checkpoint: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    rows: tuple[Row, ...]
    slice: str
    sizes: Mapping[str, int]
    by_class: tuple[str, Sequence[tuple[str, str, str]]] | None

    def text(self, model: Model, width: Width, in_timm: bool) -> str:
        """README.md of the export of `model`, the network of a width."""
        sliced = len(self.rows) > 1 or not width.is_full
        title = f"{_name(model)} at {width.words}" if sliced else _name(model)
        origin = f"Trained by hsvit-ds {__version__}"
        if sliced:
            origin = f"A subnet of a slimmable network ({_SLICED[self.slice]}) that hsvit-ds {__version__} trained"
        start = f", started from the weights {_cell(self.weights)}" if self.weights else ""
        parts = [
            f"---\ntags: [image-classification{', timm' if in_timm else ''}]\n"
            f"library_name: {'timm' if in_timm else 'hsvit-ds'}\n---\n# {title}",
            f"{origin}: run {self.run}, {self.checkpoint}, on {self.data}{start}. An image of {model.channels} x "
            f"{model.image_size} x {model.image_size} becomes {self._answers(model)}.",
            f"## Accuracy and cost\n\n{self._accuracy(width)}",
            f"## By class\n\n{self._classes(width)}",
            f"## An image\n\nAs in evaluation: {self.preprocessing.description}.",
            f"In five lines, the same to rounding:\n\n```python\n{_recipe(self.preprocessing)}\n```",
            f"## Load it\n\n{self._loading(model, in_timm)}",
        ]
        return "\n\n".join(parts) + "\n"

    def _answers(self, model: Model) -> str:
        if not self.classes:
            return f"{model.classes} logits, whose classes the data did not name"
        if len(self.classes) > MANY:
            return f"{model.classes} logits, a class of classes.txt each"
        return f"{model.classes} logits: {', '.join(map(_cell, self.classes))}"

    def _accuracy(self, width: Width) -> str:
        heads = [f"{split} top-1, %" for split in self.sizes]
        lines = [_line(["width", "parameters", "GMACs", *heads]), _line(["---"] * (3 + len(heads)))]
        for row in self.rows:
            scores = [row.top1[split] for split in self.sizes]
            cells = [width_name(row.width, row.trained), f"{row.parameters:,}", f"{row.macs / 1e9:.4f}"]
            cells += ["not measured" if score is None else f"{score:.2f}" for score in scores]
            lines.append(
                _line([f"**{cell}**" for cell in cells] if row.width == width and len(self.rows) > 1 else cells)
            )
        sizes = ", ".join(f"{split}: {counted(images, 'image')}" for split, images in self.sizes.items())
        note = f"{sizes}. " if sizes else "Nothing was measured at this checkpoint. "
        this = "In bold: this network. " if len(self.rows) > 1 else ""
        return "\n".join(lines) + f"\n\n{note}{this}A GMAC is a billion multiply-adds of one image."

    def _classes(self, width: Width) -> str:
        if self.by_class is None:
            option = "--mix" if isinstance(width, Mix) else "--widths"
            return f"Not measured at this width and checkpoint: `hsvit evaluate RUN {option} {width}` does."
        split, rows = self.by_class
        lines = [_line(["class", f"images of {split}", "top-1, %"]), _line(["---"] * 3)]
        return "\n".join([*lines, *(_line([_cell(cell) for cell in row]) for row in rows)])

    def _loading(self, model: Model, in_timm: bool) -> str:
        load = _TIMM if in_timm else _OWN
        if isinstance(model, ViT) and isinstance(model.config.mlp_ratio, tuple):
            load += _MIXED
        elif isinstance(model, ViT) and model.config.norm_eps != 1e-6:
            load += _EPS.format(eps=model.config.norm_eps)
        return f"{load}\n\n{_PROGRAM}\n\n{_ONNX}\n\n{_COMMAND}"


def _name(model: Model) -> str:
    if isinstance(model, Classifier):
        return model.config.name
    if isinstance(model, ViT | MobileNet | UniFormer):
        return type(model).__name__
    backbone = model.config.backbone.name
    return f"HSViT on {backbone}" if backbone else "HSViT"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A name in a table of Markdown as it is."""
    return "".join(f"\\{letter}" if letter in "\\|*_`[]<>" else letter for letter in text)


def _recipe(preprocessing: Preprocessing) -> str:
    """Python that makes `x`, fp32 [1, C, S, S], of the file photo.jpg."""
    p, side = preprocessing, preprocessing.image_size
    grey, filter_ = p.channels == 1, p.filter.upper()
    lines = [
        "import numpy as np, torch; from PIL import Image, ImageOps",
        f'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{"L" if grey else "RGB"}")',
    ]
    if p.eval_crop:
        lines.append(
            f"cut = {p.eval_crop} * min(image.size); left, top = (image.width - cut) / 2, (image.height - cut) / 2"
        )
        box = ", box=(left, top, left + cut, top + cut)"
    else:
        box = ""
    lines.append(
        f"image = np.asarray(image.resize(({side}, {side}), Image.Resampling.{filter_}{box}), np.float32) / 255"
    )
    means, stds = ([round(number, 6) for number in numbers] for numbers in (p.mean, p.std))
    turned = "[None, None]" if grey else ".transpose(2, 0, 1)[None]"
    lines.append(f"x = torch.from_numpy(((image - {means}) / {stds}){turned}).float()")
    return "\n".join(lines)


_TIMM = """With timm (FOLDER is where these files are):

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
probabilities = model(x).softmax(-1)
```"""
_EPS = """

Its LayerNorms use an eps of {eps:g}, which timm's config cannot say: set `m.eps = {eps:g}` for every LayerNorm `m`."""
_MIXED = """

timm's config has one size for the MLPs of all blocks, which these have not: there is none."""
_OWN = """With hsvit-ds (FOLDER is where these files are):

```python
import hsvit_ds
model = hsvit_ds.create_model("FOLDER")
probabilities = model(x).softmax(-1)
```"""
_PROGRAM = """With PyTorch alone:

```python
import torch
model = torch.export.load("FOLDER/model.pt2").module()
probabilities = model(x).softmax(-1)
```"""
_ONNX = """With ONNX Runtime alone:

```python
import onnxruntime
model = onnxruntime.InferenceSession("FOLDER/model.onnx")
logits = model.run(None, {"images": x.numpy()})[0]
```"""
_COMMAND = "Or from the command line: `hsvit predict FOLDER photo.jpg`."
