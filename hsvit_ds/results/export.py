"""A trained model, or a subnet of it, as files that need no trainer: weights, a timm config, a torch.export program,
ONNX and a model card."""

from __future__ import annotations

import json
import re
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor

from hsvit_kernels import force, reference

from .. import __version__, models
from ..data import augment
from ..data.sets import Facts
from ..engine.interop import save_model
from ..errors import RefusedError
from ..models import Model
from ..models.batchnorm import BatchNorm
from ..models.slimmable import Width
from ..models.timm_models import Classifier
from ..models.vit import ViT

REPEATS = 20
"""Forwards that a latency is the median of, after five to warm up."""
_UNITS = {"": "macs", "macs": "macs", "params": "params", "ms": "ms"}


@dataclass(frozen=True)
class Budget:
    """What a subnet may cost: multiply-adds or parameters, or milliseconds of one image on this machine."""

    most: float
    kind: str

    @classmethod
    def of(cls, text: str) -> Budget:
        """1.3G (multiply-adds of an image), 6Mparams or 8ms.

        Raises:
            RefusedError: anything else.
        """
        match = re.fullmatch(r"([0-9.]+)([kMG]?)(|macs|params|ms)", text)
        try:
            assert match is not None
            number, scale, unit = match.groups()
            return cls(float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[scale], _UNITS[unit])
        except (AssertionError, ValueError):
            raise RefusedError(f"--budget {text}: must look like 1.3G (multiply-adds), 6Mparams or 8ms") from None

    def cost(self, model: Model, width: Width) -> float:
        if self.kind == "ms":
            return latency_ms(model.subnet(width))
        return models.macs(model, width) if self.kind == "macs" else models.parameters(model, width)

    def widest(self, model: Model, widths: Sequence[Width]) -> Width:
        """The largest of `widths`, smallest first, that costs no more.

        Raises:
            RefusedError: none of them.
        """
        for width in reversed(widths):
            if self.cost(model, width) <= self.most:
                return width
        least = self.cost(model, widths[0])
        raise RefusedError(
            f"--budget: no trained width costs at most {self.most:g} {self.kind}; the smallest, {widths[0]}, "
            f"costs {least:g}"
        )


@torch.no_grad()
def latency_ms(model: Model) -> float:
    """Milliseconds of one image on the model's device, the median of `REPEATS`."""
    model.eval()
    x = _example(model, 1)
    times = []
    for _ in range(5 + REPEATS):
        start = time.perf_counter()
        model(x).sum().item()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def export(
    model: Model,
    width: Width,
    out: Path,
    facts: Facts,
    augmentation: augment.Config,
    names: Sequence[str],
    about: dict[str, str],
) -> list[Path]:
    """Write the subnet at a width into the folder `out`; the files.

    model.safetensors, config.json (timm's, for models that timm has), model.pt2 (torch.export), model.onnx, classes.txt
    and README.md; the batch is free in both programs. augmentation: of the run, for the input that it was evaluated
    with. names: what the labels mean, or none. about: lines of the model card.
    """
    small = model.cpu().subnet(width).eval()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--out {out}: {error.strerror}") from error
    if _timm_has(small):
        save_file(timm_weights(small), out / "model.safetensors")
        config = timm_config(small, facts, augmentation) | ({"label_names": list(names)} if names else {})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    else:
        save_model(small, out / "model.safetensors")
    program = _program(small)
    torch.export.save(program, out / "model.pt2")
    _onnx(program, out / "model.onnx")
    if names:
        (out / "classes.txt").write_text("\n".join(names) + "\n", "utf-8")
    slimmable = len(model.config.widths.family) > 1
    (out / "README.md").write_text(_card(small, width if slimmable else None, names, about), "utf-8")
    return sorted(out.iterdir())


def _timm_has(model: Model) -> TypeGuard[ViT | Classifier]:
    """Whether timm builds it by itself: not what this project registers there, such as transformers' CvT."""
    return isinstance(model, ViT) or (
        isinstance(model, Classifier) and type(model.net).__module__.partition(".")[0] == "timm"
    )


def timm_weights(model: ViT | Classifier) -> dict[str, Tensor]:
    """The weights as timm names them."""
    net = model.net if isinstance(model, Classifier) else model
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    for path, module in net.named_modules():
        if isinstance(module, BatchNorm):  # timm's counts the steps too, and loads nothing without the count
            weights[f"{path}.num_batches_tracked"] = torch.tensor(0)
    return weights


def timm_config(model: ViT | Classifier, facts: Facts, augmentation: augment.Config) -> dict[str, Any]:
    """What `timm.create_model("local-dir:…")` reads beside model.safetensors."""
    arguments: dict[str, Any] = {"in_chans": model.channels}
    known: dict[str, Any]
    if isinstance(model, Classifier):
        net: Any = model.net
        architecture, features, known = model.config.name.partition(".")[0], net.num_features, net.pretrained_cfg
    else:
        c = model.config
        architecture, features = f"deit_tiny{'_distilled' if c.distilled else ''}_patch16_224", c.embedding
        known = {
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if c.distilled else "head",
            "fixed_input_size": True,
        }
        arguments |= {
            "patch_size": c.patch_size,
            "embed_dim": c.embedding,
            "depth": c.depth,
            "num_heads": c.heads,
            "mlp_ratio": c.mlp_ratio,
        }
        if c.layer_scale:
            arguments["init_values"] = c.layer_scale
    if known["fixed_input_size"]:
        arguments["img_size"] = model.image_size
    return {
        "architecture": architecture,
        "num_classes": model.classes,
        "num_features": features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.channels, model.image_size, model.image_size],
            "fixed_input_size": known["fixed_input_size"],
            "mean": list(facts.mean),
            "std": list(facts.std),
            "interpolation": augmentation.filter,
            "crop_pct": augmentation.eval_crop or 1.0,
            "crop_mode": "center" if augmentation.eval_crop else "squash",
            "num_classes": model.classes,
            "first_conv": known["first_conv"],
            "classifier": known["classifier"],
        },
    }


class _Plain(torch.nn.Module):
    """A model of images alone."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def _example(model: Model, batch: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.zeros(batch, model.channels, model.image_size, model.image_size, device=device)


def _program(model: Model) -> torch.export.ExportedProgram:
    """The forward as PyTorch's own operations: it runs where hsvit_kernels is not installed."""
    force("reference")
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(
            _Plain(model), (_example(model, 2),), dynamic_shapes={"images": {0: batch}}, strict=False
        )
    finally:
        force("auto")
    linear = torch.ops.hsvit_kernels.sliced_linear.default
    table = torch.export.default_decompositions()
    table[linear] = reference.sliced_linear
    return program.run_decompositions(table)


def _onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RefusedError('ONNX needs the export extra: pip install "hsvit-ds[export]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own, about torch's own
        torch.onnx.export(
            program, (), path, input_names=["images"], output_names=["logits"], external_data=False, verbose=False
        )


def _card(model: Model, width: Width | None, names: Sequence[str], about: dict[str, str]) -> str:
    """The model card. width: of a subnet of a slimmable network."""
    numbers, macs = (
        sum(p.numel() for p in model.parameters()),
        model.config.macs(model.image_size, model.channels, model.classes),
    )
    rows = {
        **({} if width is None else {"width": str(width)}),
        "parameters": f"{numbers:,}",
        "GMACs of an image": f"{macs / 1e9:.4g}",
        "images": f"{model.channels} x {model.image_size} x {model.image_size}",
        "classes": f"{model.classes}{', see classes.txt' if names else ''}",
        **about,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    in_timm = _timm_has(model)
    tags = "[image-classification, timm]" if in_timm else "[image-classification]"
    load = _TIMM_EXAMPLE if in_timm else _OWN_EXAMPLE
    if isinstance(model, ViT) and model.config.norm_eps != 1e-6:
        load += _EPS.format(eps=model.config.norm_eps)
    title, origin = f"# {_name(model)}", f"Trained by hsvit-ds {__version__}."
    if width is not None:
        title += f" at width {width}"
        origin = f"A subnet of a slimmable network (Scala, arXiv 2412.04786) that hsvit-ds {__version__} trained."
    return f"""---
tags: {tags}
library_name: {"timm" if in_timm else "hsvit-ds"}
---
{title}

{origin}

| | |
| --- | --- |
{table}

{load}
`model.pt2` (`torch.export.load`) and `model.onnx` take images of any batch, normalised as the table says.
"""


def _name(model: Model) -> str:
    if isinstance(model, Classifier):
        return model.config.name
    if isinstance(model, ViT):
        return "ViT"
    backbone = model.config.backbone.name
    return f"HSViT on {backbone}" if backbone else "HSViT"


_TIMM_EXAMPLE = """```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
```
"""
_EPS = """
Its LayerNorms use an eps of {eps:g}, which timm's config cannot say: set `m.eps = {eps:g}` for every LayerNorm `m`.
"""
_OWN_EXAMPLE = """```python
from pathlib import Path

from hsvit_ds.interop import load_model

model = load_model(Path("model.safetensors"))
```
"""
