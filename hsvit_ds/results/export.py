"""A trained model, or a subnet of it, as files that need no trainer: weights, a timm config, a torch.export program,
ONNX and a model card."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..data.preprocessing import Preprocessing
from ..engine.interop import MODEL, save_model
from ..errors import RefusedError
from ..models import Model
from ..models.mobilenet import MobileNet, timm_name
from ..models.slimmable import Width
from ..models.timm_models import Classifier
from ..models.vit import ViT
from .card import Card


def export(model: Model, width: Width, out: Path, card: Card) -> list[Path]:
    """Write the network of a width or a mix into the folder `out`; the files.

    model.safetensors (for hsvit-ds, and for timm where it has the model), config.json (timm's), model.pt2
    (torch.export), model.onnx, classes.txt and README.md; the batch is free in both programs.
    """
    small = model.cpu().subnet(width).eval()
    seen, names = card.preprocessing, card.classes
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--out {out}: {error.strerror}") from error
    save_model(small, out / MODEL, seen, names, str(width))
    if _timm_has(small):
        config = timm_config(small, seen) | ({"label_names": list(names)} if names else {})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    program = _program(small)
    torch.export.save(program, out / "model.pt2")
    _onnx(program, out / "model.onnx")
    if names:
        (out / "classes.txt").write_text("\n".join(names) + "\n", "utf-8")
    (out / "README.md").write_text(card.text(small, width, _timm_has(small)), "utf-8")
    return sorted(out.iterdir())


def _timm_has(model: Model) -> TypeGuard[ViT | MobileNet | Classifier]:
    """Whether timm builds it by itself: not what this project registers there, such as transformers' CvT, nor a ViT
    whose blocks have MLPs of several sizes, a MobileNetV2 of other channels than it has names for, or a UniFormer."""
    if isinstance(model, ViT):
        return not isinstance(model.config.mlp_ratio, tuple)
    if isinstance(model, MobileNet):
        return timm_name(model.config) != ""
    return isinstance(model, Classifier) and type(model.net).__module__.partition(".")[0] == "timm"


def timm_config(model: ViT | MobileNet | Classifier, seen: Preprocessing) -> dict[str, Any]:
    """What `timm.create_model("local-dir:…")` reads beside model.safetensors."""
    arguments: dict[str, Any] = {"in_chans": model.channels}
    known: dict[str, Any]
    if isinstance(model, Classifier):
        net: Any = model.net
        architecture, features, known = model.config.name.partition(".")[0], net.num_features, net.pretrained_cfg
    elif isinstance(model, MobileNet):
        architecture, features = timm_name(model.config), model.config.features
        known = {"first_conv": "conv_stem", "classifier": "classifier", "fixed_input_size": False}
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
            "mean": list(seen.mean),
            "std": list(seen.std),
            "interpolation": seen.filter,
            "crop_pct": seen.eval_crop or 1.0,
            "crop_mode": "center" if seen.eval_crop else "squash",
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


def _program(model: Model) -> torch.export.ExportedProgram:
    """The forward as PyTorch's own operations: it runs where hsvit_kernels is not installed."""
    example = torch.zeros(2, model.channels, model.image_size, model.image_size)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own, about torch's own
        return torch.export.export(
            _Plain(model), (example,), dynamic_shapes={"images": {0: batch}}, strict=False
        ).run_decompositions()


def _onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RefusedError('ONNX needs the export extra: pip install "hsvit-ds[export]"') from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of shapes that it does without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        torch.onnx.export(
            program, (), path, input_names=["images"], output_names=["logits"], external_data=False, verbose=False
        )
