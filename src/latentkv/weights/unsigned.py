"""Unsigned codes of 2, 4, 5 and 6 bits in words, as `weights/layout.py` describes them."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW, _TWO, _ONE = 0x000F000F, 0x00030003, 0x00010001  # of the code in each half of a word
# For each format: pairs of codes that are packed together; words with four bits of eight codes each; then in a last
# word, bits of a pair's code from the fifth on (of uint2 from the first).
_PAIRS = {"uint2": 8, "uint4": 4, "uint5": 16, "uint6": 8}


def words_of(codes: Tensor, fmt: str) -> Tensor:
    """[..., n] codes from 0 on, n whole packs, to [..., words] int32."""
    count = _PAIRS[fmt]
    pairs = codes.to(torch.int32).unflatten(-1, (-1, count, 2))
    pairs = pairs[..., 0] | pairs[..., 1] << 16  # [..., packs, pairs]
    words: list[Tensor] = []
    if fmt != "uint2":
        nibbles = (pairs & _LOW).unflatten(-1, (-1, 4)) << 4 * torch.arange(4, dtype=torch.int32)
        words.append(nibbles.sum(-1, dtype=torch.int32))
    if fmt != "uint4":
        bits, mask = (1, _ONE) if fmt == "uint5" else (2, _TWO)
        above = pairs if fmt == "uint2" else pairs >> 4
        shifted = (above & mask) << bits * torch.arange(count, dtype=torch.int32)
        words.append(shifted.sum(-1, keepdim=True, dtype=torch.int32))
    return torch.cat(words, dim=-1).flatten(-2)


def codes_of(words: Tensor, fmt: str) -> Tensor:
    """The inverse of `words_of`: [..., words] int32 to [..., n] codes."""
    count = _PAIRS[fmt]
    packs = words.unflatten(-1, (-1, {"uint2": 1, "uint4": 1, "uint5": 5, "uint6": 3}[fmt]))
    pairs = torch.zeros(*packs.shape[:-1], count, dtype=torch.int32)
    if fmt != "uint2":
        nibbles = packs[..., : count // 4, None] >> 4 * torch.arange(4, dtype=torch.int32)
        pairs |= (nibbles & _LOW).flatten(-2)
    if fmt != "uint4":
        bits, mask = (1, _ONE) if fmt == "uint5" else (2, _TWO)
        above = packs[..., -1:] >> bits * torch.arange(count, dtype=torch.int32) & mask
        pairs |= above if fmt == "uint2" else above << 4
    return torch.stack([pairs & 0xFFFF, pairs >> 16 & 0xFFFF], dim=-1).flatten(-3)
