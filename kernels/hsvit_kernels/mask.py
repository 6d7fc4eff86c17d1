"""Which attention weights survive dropout: the definitions of the mask, and how a CPU draws it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .random import Draw, Site, split_bytes, split_halves, threshold

MASK = 2
"""Number of the newest definition of dropout's masks (`definition`); a checkpoint names it."""
CLS_PLACE = 255


def definition(tokens: int) -> int:
    """By which of `Keep`'s definitions the mask of groups of so many tokens is drawn.

    Bits are cheaper where a tile of 32 x 32 weights is full enough for its lanes to be, and one is enough.
    """
    return MASK if 17 < tokens <= 33 else 1


@dataclass(frozen=True)
class Keep:
    """Which attention weights survive dropout: one definition for each number of tokens.

    A weight's fate depends on (key, image, global group, layer, head, query, key token) only. The place of a token is
    its number among the feature tokens, 255 for CLS. pcg4d hashes counters in wrapping 32-bit arithmetic, and a number
    of 8 bits below the threshold drops its weight.

    Definition 1: call layer * ceil(h / 2) + head // 2 of a query hashes
    ((group * 2048 + call) * 256 + query's place) * 32 + lane. Lane key's place // 32 * 4 + key's place % 8 // 2 gives
    sixteen numbers, bytes: word key's place // 8 % 4, byte key's place % 2 * 2 + head % 2. So the eight keys of a row
    that lie in one GPU thread share a hash.

    Definition 2, of 18 to 33 tokens: the weights of 32 queries by 32 keys are bits of 32 lanes' words, as a tensor core
    lays them out: lane query % 8 * 4 + key % 8 // 2, bit key % 2 * 16 + query // 8 % 4 * 4 + key // 8 % 4 (of places).
    Eight words of a lane are the bits of as many numbers, the lowest first: the words w ^ w >> 16 (pcg4d's lower bits
    are poor) of counters 2 c and 2 c + 1, where
    c = (((group * 2048 + layer * h + head) * 8 + query // 32) * 8 + key // 32) * 32 + lane.
    """

    draw: Draw
    probability: float
    layer: int
    heads: int
    groups: range
    rows: int
    tokens: int

    def mask(self, images: slice) -> Tensor:
        """bool [images, G, h, rows, T]."""
        return self.margin(images) >= 0

    def margin(self, images: slice) -> Tensor:
        """Negative where a weight is dropped: integers [images, G, h, rows, T].

        In 8 or 16 bits, because a CPU's operations on these are an order of magnitude faster than on bools.
        """
        return self._bits(images) if definition(self.tokens) == MASK else self._bytes(images)

    def _call(self, calls: int) -> Tensor:
        """[G, calls, 1]: group * 2048 + call, of so many calls a layer."""
        device = self.draw.key.device
        call = torch.arange(self.layer * calls, (self.layer + 1) * calls, device=device)
        group = torch.arange(self.groups.start, self.groups.stop, device=device)
        return group.view(-1, 1, 1) * 2048 + call.view(-1, 1)

    def _bytes(self, images: slice) -> Tensor:
        """By definition 1: each weight's number less the threshold."""
        draw, device, features = self.draw.slice(images.start, images.stop), self.draw.key.device, self.tokens - 1
        query = (torch.arange(self.rows, device=device) + CLS_PLACE) % (CLS_PLACE + 1)
        counter = (self._call(-(-self.heads // 2)) * 256 + query) * 32
        lane = torch.arange(-(-features // 32) * 4 + 1, device=device)
        lane[-1] = 31  # CLS, whose halves are the upper ones of the last word
        words = draw.four_words(Site.ATTENTION, (counter.unsqueeze(-1) + lane).to(torch.int32))
        # A half of a word has the bytes of a key's two heads. Image, group, call, row, block of 32 keys, word, lane.
        blocks = torch.stack([word[..., :-1].unflatten(-1, (-1, 4)) for word in words], dim=-2)
        of_cls, of_features = split_halves(words[3][..., -1:])[..., 1], split_halves(blocks).flatten(4)
        halves = torch.cat((of_cls, of_features[..., :features]), dim=-1)
        shift = torch.arange(0, 16, 8, dtype=halves.dtype, device=device).view(2, 1, 1)
        bytes_ = (halves.unsqueeze(3) >> shift).bitwise_and_(255).flatten(2, 3)
        return bytes_[:, :, : self.heads].sub_(threshold(self.probability))

    def _bits(self, images: slice) -> Tensor:
        """By definition 2: negative or not."""
        features, device = self.tokens - 1, self.draw.key.device
        lane, of_cls = torch.arange(32, device=device), 7 * 32  # of the block of 32 that the place of CLS is in
        parts = [of_cls * 8 + of_cls + lane[31:], of_cls * 8 + lane[28:], of_cls + lane[3::4], lane]
        parts = parts[: 2 if self.rows == 1 else 4]
        dropped = self._dropped(images, torch.cat(parts)).split([len(part) for part in parts], dim=-1)
        # CLS is the last query of its lanes, and the last key: bit 31 of one, and every fourth of eight queries'.
        found = torch.empty((*dropped[0].shape[:3], self.rows, self.tokens), dtype=torch.int8, device=device)
        found[..., 0, :1] = _signs(dropped[0])
        found[..., 0, 1:] = _by_query(dropped[1])[..., 3, :features]
        if self.rows > 1:
            last_key = dropped[2].unsqueeze(-1) << torch.arange(12, -4, -4, dtype=torch.int32, device=device)
            found[..., 1:, 0] = _signs(last_key.mT.flatten(-2)[..., :features])
            found[..., 1:, 1:] = _by_query(dropped[3])[..., :features, :features]
        return found

    def _dropped(self, images: slice, places: Tensor) -> Tensor:
        """int32 [images, G, h, places]: words whose bits are 1 where a weight is dropped.

        places: (query // 32 * 8 + key // 32) * 32 + lane.
        """
        counter = (self._call(self.heads) * 2048 + places) * 2
        draw, least = self.draw.slice(images.start, images.stop), threshold(self.probability)
        both = torch.stack((counter, counter + 1)).to(torch.int32)
        words = draw.four_words(Site.ATTENTION, both)  # in place below: what is as large and new costs page faults
        for word in words:
            word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).bitwise_not_()
        drop = torch.zeros_like(words[0][:, 0])
        for bit in range(8):
            one = words[bit % 4][:, bit // 4]
            drop = drop.bitwise_or_(one) if least >> bit & 1 else drop.bitwise_and_(one)
        return drop


def _signs(words: Tensor) -> Tensor:
    """int8, negative where the words are."""
    return (words >> 24).to(torch.int8)


def _by_query(words: Tensor) -> Tensor:
    """Words of lanes that have all keys of some queries, int32 [..., 4 n], to int8 [..., 4 n, 32], queries by keys,
    negative where a bit is 1."""
    count = words.shape[-1] // 4
    if torch.compiler.is_compiling():  # bit by bit, as inductor chooses strides that cannot be viewed as bytes
        query, key = torch.arange(4 * count, device=words.device).view(-1, 1), torch.arange(32, device=words.device)
        bit = key % 2 * 16 + query // count * 4 + key // 8
        return _signs(words[..., query % count * 4 + key % 8 // 2] << (31 - bit).to(torch.int32))
    # A byte has 2 queries by 4 keys, eight lanes' bytes are eight keys side by side: to bytes of eight keys each.
    bytes_ = split_bytes(words).unflatten(-1, (2, 2)).unflatten(-3, (count, 4)).movedim(-1, -3).flatten(-2)
    rows = _transposed(bytes_.contiguous().view(torch.int64)).view(torch.int32).flatten(-2).mT.flatten(-2)
    # Then each bit of a byte to the sign of a byte of its own.
    bits = rows.view(torch.uint8).long().mul_(0x0101010101010101).bitwise_and_(0x8040201008040201 - 2**64)
    found: Tensor = bits.add_(0x7F7F7F7F7F7F7F7F).view(torch.int8).unflatten(-1, (-1, 32))
    return found


def _transposed(x: Tensor) -> Tensor:
    """int64 [...]: eight bytes of eight bits, each an 8 x 8 matrix (Warren, Hacker's Delight, section 7-3)."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        moved = (x ^ (x >> shift)) & mask
        x = x ^ moved ^ (moved << shift)
    return x
