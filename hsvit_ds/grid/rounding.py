"""The CLS sums of submodules in fewer bits, to travel.

A submodule's sum of an image is rounded by itself, so that what arrives depends neither on which rank holds the
submodule nor on what else is there: one process that rounds computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8")
_SCALE = 4  # bytes of an fp32 number


def size(features: int, form: str) -> int:
    """Bytes of one submodule's sum of one image."""
    return {"fp32": 4 * features, "bf16": 2 * features, "int8": features + _SCALE}[form]


def rounded(x: Tensor, form: str) -> Tensor:
    """[..., D] as it arrives, in x's dtype, for autograd x itself: the gradient passes the rounding as it is (Bengio et
    al., arXiv 1308.3432, the straight-through estimator)."""
    if form == "fp32":
        return x
    if form == "bf16":
        y = x.detach().bfloat16().to(x.dtype)
    else:
        whole, scale = _int8(x.detach())
        y = (whole * scale).to(x.dtype)
    # An autograd function of one's own would do, but torch.compile has made wrong gradients of some.
    return y + (x - x.detach()).nan_to_num(0) if x.requires_grad else y


def pack(x: Tensor, form: str) -> Tensor:
    """[..., D] as bytes [..., `size`] in the formats "bf16" and "int8"."""
    if form == "bf16":
        return x.bfloat16().contiguous().view(torch.uint8)
    whole, scale = _int8(x)
    return torch.cat((whole.nan_to_num(0).to(torch.int8).view(torch.uint8), scale.view(torch.uint8)), -1)


def unpack(x: Tensor, form: str) -> Tensor:
    """What `pack` made, as fp32 [..., D]: exactly what `rounded` gives."""
    if form == "bf16":
        return x.view(torch.bfloat16).float()
    whole, scale = x[..., :-_SCALE].contiguous(), x[..., -_SCALE:].contiguous()
    return whole.view(torch.int8).float() * scale.view(torch.float32)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] as whole numbers from -127 to 127, still fp32, and the scale [..., 1] to multiply them with: the largest
    magnitude / 127. Halves go to the even number. Where a number is not finite, the scale is not, and all D become NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round(), scale
