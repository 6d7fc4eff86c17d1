"""Counter-based randomness: every draw is a pure function of what it is for.

A draw is keyed on (seed, step, pass, site) and counted by (index of the image in the global batch, element), so
dropout masks, subsets, mixing and permutations do not depend on ranks, workers, accumulation, tiling or device, and no
generator state has to be stored. The bits come from pcg4d (Jarzynski and Olano, "Hash Functions for GPU Rendering",
JCGT 9(3), 2020): four 32-bit words in, four out, a bijection made of wrapping 32-bit multiply-adds, so PyTorch's int32
tensors and Triton's int32 registers give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

_LCG_MULTIPLIER = 1664525
_LCG_INCREMENT = 1013904223
_MASK32 = 0xFFFFFFFF


class Site(IntEnum):
    """What a draw is for; two sites never share bits."""

    ATTENTION = 1
    EMBEDDING = 2
    SUBMODULE = 3
    MIXING = 4
    ORDER = 5
    INIT = 6
    AUGMENT = 7
    DROP_PATH = 8
    WIDTH = 9
    ERASING = 10


def pcg4d(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hash four broadcastable int32 tensors into four int32 tensors of their common shape."""
    words = [w * _LCG_MULTIPLIER + _LCG_INCREMENT for w in (a, b, c, d)]
    words = [w.clone() for w in torch.broadcast_tensors(*words)]
    for round_ in range(2):
        x, y, z, w = words
        x.addcmul_(y, w)
        y.addcmul_(z, x)
        z.addcmul_(x, y)
        w.addcmul_(y, z)
        if round_ == 0:
            for word in words:  # int32 shifts keep the sign, the hash wants zeros
                word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))
    return words[0], words[1], words[2], words[3]


def _hash(words: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`pcg4d` on Python integers, for keys."""
    x, y, z, w = ((v * _LCG_MULTIPLIER + _LCG_INCREMENT) & _MASK32 for v in words)
    for round_ in range(2):
        x = (x + y * w) & _MASK32
        y = (y + z * x) & _MASK32
        z = (z + x * y) & _MASK32
        w = (w + y * z) & _MASK32
        if round_ == 0:
            x, y, z, w = x ^ x >> 16, y ^ y >> 16, z ^ z >> 16, w ^ w >> 16
    return x, y, z, w


def key(*words: int) -> tuple[int, int]:
    """Fold any number of integers (each below 2**64, signs included) into a 64-bit key of two 32-bit words."""
    high, low = 0x243F6A88, 0x85A308D3  # digits of pi: an all-zero input is not a fixed point
    for word in words:
        high, low, _, _ = _hash((high, low, word & _MASK32, (word >> 32) & _MASK32))
    return high, low


def generator(*words: int) -> torch.Generator:
    """PyTorch's generator on the CPU, seeded with the key of `words`: for initial weights."""
    high, low = key(*words)
    return torch.Generator().manual_seed(high << 32 | low)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@dataclass(frozen=True)
class Draw:
    """The randomness of one pass over one micro batch.

    key: int32 [2], folded from (seed, step, pass). image: int32 [B], each image's index in the global batch.
    """

    key: Tensor
    image: Tensor

    @classmethod
    def of(cls, *words: int, image: Tensor, device: torch.device | str = "cpu") -> Draw:
        """Key a draw on `words`, for example (seed, step, pass); `image` int [B] counts in the global batch."""
        folded = torch.tensor([_signed(word) for word in key(*words)], dtype=torch.int32)
        return cls(
            key=folded.to(device, non_blocking=True),
            image=image.to(device=device, dtype=torch.int32, non_blocking=True),
        )

    @classmethod
    def anew(cls, images: int, device: torch.device | str = "cpu") -> Draw:
        """Key a draw of so many images on PyTorch's generator of the device, for a training loop without ranks.

        `torch.manual_seed` repeats it, and a forward that activation checkpointing computes again draws the same.
        """
        words = torch.randint(-(1 << 31), 1 << 31, (2,), dtype=torch.int32, device=device)
        return cls(key=words, image=torch.arange(images, dtype=torch.int32, device=device))

    def slice(self, start: int, stop: int) -> Draw:
        """The draw of images `start` to `stop` of this micro batch."""
        return replace(self, image=self.image[start:stop])

    def words(self, site: Site, element: Tensor) -> Tensor:
        """Random bits for every (image, element): int32 [4, B, *element.shape]. element: int32, any shape."""
        return torch.stack(self.four_words(site, element))

    def four_words(self, site: Site, element: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`words` one by one, to be put where they are wanted."""
        image = self.image.view(-1, *[1] * element.dim())
        return pcg4d(self.key[0], self.key[1] + (int(site) << 24), image, element)

    def bytes(self, site: Site, element: Tensor) -> Tensor:
        """Sixteen random bytes for every (image, element): [B, *element.shape, 16], word by word."""
        return split_bytes(torch.stack(self.four_words(site, element), dim=-1)).flatten(-2)

    def uniform(self, site: Site, element: Tensor) -> Tensor:
        """A number in (0, 1), a multiple of 2**-23 plus 2**-24, for every (image, element): fp32."""
        return uniform(self.four_words(site, element)[0])


def split_bytes(words: Tensor) -> Tensor:
    """int32 [...] to its four bytes, the lowest first: integers [..., 4]."""
    if torch.compiler.is_compiling():  # inductor chooses strides that cannot be viewed as bytes
        return (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 255
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


def split_halves(words: Tensor) -> Tensor:
    """int32 [...] to its two halves, the lower first: integers of at least 16 bits [..., 2]."""
    if torch.compiler.is_compiling():  # as above
        return words.unsqueeze(-1) >> torch.arange(0, 32, 16, device=words.device)
    return words.contiguous().view(torch.int16).view(*words.shape, 2)


def uniform(words: Tensor) -> Tensor:
    """int32 bits to fp32 in the open interval (0, 1): 23 bits, centred in their bin.

    Of 24 bits the highest would be rounded to 1. So it stays below n when it is multiplied with an n below 2**24.
    """
    return ((words >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def threshold(probability: float) -> int:
    """Dropout is decided by one byte an element: drop where byte < threshold. The rate is threshold / 256."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout = {probability}: must be in [0, 1)")
    return min(round(probability * 256), 255)


def keep_scale(probability: float) -> float:
    """What kept elements are multiplied with: the inverse of the exact keep rate (256 - threshold) / 256."""
    return 256 / (256 - threshold(probability))


def sequence(*words: int, count: int, first: int = 0) -> Tensor:
    """`count` random 32-bit numbers as int64 in [0, 2**32), keyed on `words`, the same on every machine: of their
    sequence those from number `first` on."""
    high, low = (torch.tensor(_signed(word), dtype=torch.int32) for word in key(*words))
    index = torch.arange(first, first + count, dtype=torch.int64)
    counter = (index & _MASK32).to(torch.int32)  # wraps on purpose: the bits count, not the sign
    bits, *_ = pcg4d(high, low, (index >> 32).to(torch.int32), counter)
    return bits.to(torch.int64) & _MASK32
