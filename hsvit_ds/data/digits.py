"""The built-in real data: scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_kernels.random import sequence

SIDE = 32
MEAN, STD = (0.3053,), (0.3237,)  # of the training split at 32 px, in units of full scale
SPLITS = {"train": (0, 1150), "val": (1150, 1438), "test": (1438, 1797)}
_SPLIT_KEY = 20240408  # fixed for good: results of different versions stay comparable


@cache
def split(name: str) -> tuple[Tensor, Tensor]:
    """(images uint8 [N, 1, 32, 32], labels int64 [N]) of "train", "val" or "test"."""
    from sklearn.datasets import load_digits  # here, as it takes 2 s: a recipe is read without it

    digits = load_digits()
    shuffled = sequence(_SPLIT_KEY, count=len(digits.target)).argsort(stable=True)
    start, stop = SPLITS[name]
    chosen = shuffled[start:stop]
    small = torch.from_numpy(digits.images)[chosen, None].float() * (255 / 16)
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images.round().to(torch.uint8), torch.from_numpy(digits.target)[chosen].long()
