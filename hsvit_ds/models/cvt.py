"""CvT (arXiv 2103.15808), of the papers' baselines the one that timm lacks: transformers' model, registered with timm.

Parameters have transformers' names, so its published weights (huggingface.co/microsoft/cvt-13) are files for `weights`.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn
from transformers import CvtConfig, CvtForImageClassification
from transformers.models.cvt.modeling_cvt import CvtDropPath


class Cvt(CvtForImageClassification):
    """transformers' classifier of images, with what timm's models have. Takes timm's arguments."""

    def __init__(
        self,
        depth: list[int],
        pretrained: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **_: Any,
    ) -> None:
        if pretrained:
            raise RuntimeError("timm has no weights of CvT")
        table = {"depth": depth, "num_channels": in_chans, "num_labels": num_classes}
        super().__init__(CvtConfig(**table, drop_path_rate=[0.0, 0.0, drop_path_rate]))  # type: ignore[arg-type]
        self.pretrained_cfg = {"classifier": "classifier"}
        for path, module in list(self.named_modules()):
            if isinstance(module, CvtDropPath):
                parent, _dot, leaf = path.rpartition(".")
                setattr(self.get_submodule(parent), leaf, DropPath(module.drop_prob))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] to logits [B, Q]."""
        logits: Tensor = super().forward(pixel_values=images).logits
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        raise ValueError("transformers' CvT cannot recompute its activations")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        block = r"^cvt\.encoder\.stages\.(\d+)" + ("" if coarse else r"\.layers\.(\d+)")
        return {"stem": r"^cvt\.encoder\.stages\.0\.embedding", "blocks": block}


@register_model
def cvt_13(**arguments: Any) -> nn.Module:
    return Cvt([1, 2, 10], **arguments)


@register_model
def cvt_21(**arguments: Any) -> nn.Module:
    return Cvt([1, 4, 16], **arguments)
