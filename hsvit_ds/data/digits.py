"""The built-in real data: scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution

import numpy as np
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
    pixels, target = _file()
    shuffled = sequence(_SPLIT_KEY, count=len(target)).argsort(stable=True)
    start, stop = SPLITS[name]
    chosen = shuffled[start:stop]
    small = pixels[chosen, None].float() * (255 / 16)
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images.round().to(torch.uint8), target[chosen]


@cache
def _file() -> tuple[Tensor, Tensor]:
    """(pixels [N, 8, 8] of 0 to 16, labels int64 [N]). Read without importing scikit-learn, which takes a second."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    return torch.from_numpy(table[:, :-1]).view(-1, 8, 8), torch.from_numpy(table[:, -1]).long()
