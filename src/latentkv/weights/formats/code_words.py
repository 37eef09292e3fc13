"""Codes of 2, 4, 5 and 6 bits in words, as `weights/layout.py` describes them."""

from __future__ import annotations

import torch
from torch import Tensor

_NIBBLE, _TWO_BITS, _BIT = 0x000F000F, 0x00030003, 0x00010001  # of the code in each half of a word
# Pairs of codes that are packed together, and their words. The first words have four bits of eight codes each; a last
# one has the bits from the fifth on (of 2-bit codes all).
_PACKS = {2: (8, 1), 4: (4, 1), 5: (16, 5), 6: (8, 3)}


def pack_of(bits: int) -> tuple[int, int]:
    """Words that are read together, and the codes of 2, 4, 5, 6 or 8 bits in them."""
    if bits == 8:
        return 1, 4
    pairs, words = _PACKS[bits]
    return words, 2 * pairs


def words_of(codes: Tensor, bits: int) -> Tensor:
    """[..., n] codes from 0 on, n whole packs, to [..., words] int32."""
    count, _ = _PACKS[bits]
    if bits == 4:  # by bytes: four times as fast
        eight = codes.view(torch.uint8).unflatten(-1, (-1, 8))
        low_half = eight[..., 0::4] | eight[..., 2::4] << 4
        high_half = eight[..., 1::4] | eight[..., 3::4] << 4
        return torch.cat([low_half, high_half], dim=-1).view(torch.int32)[..., 0]
    pairs = codes.to(torch.int32).unflatten(-1, (-1, count, 2))
    pairs = pairs[..., 0] | pairs[..., 1] << 16  # [..., packs, pairs]
    words: list[Tensor] = []
    if bits > 2:
        nibbles = (pairs & _NIBBLE).unflatten(-1, (-1, 4)) << 4 * torch.arange(4, dtype=torch.int32)
        words.append(nibbles.sum(-1, dtype=torch.int32))
        pairs = pairs >> 4
    above = (pairs & (_BIT if bits == 5 else _TWO_BITS)) << _above(bits) * torch.arange(count, dtype=torch.int32)
    words.append(above.sum(-1, keepdim=True, dtype=torch.int32))
    return torch.cat(words, dim=-1).flatten(-2)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """The inverse of `words_of`: [..., words] int32 to [..., n] codes."""
    count, pack = _PACKS[bits]
    packs = words.unflatten(-1, (-1, pack))
    pairs = torch.zeros(*packs.shape[:-1], count, dtype=torch.int32)
    if bits > 2:
        nibbles = packs[..., : count // 4, None] >> 4 * torch.arange(4, dtype=torch.int32)
        pairs |= (nibbles & _NIBBLE).flatten(-2)
    if bits != 4:
        above = packs[..., -1:] >> _above(bits) * torch.arange(count, dtype=torch.int32)
        above &= _BIT if bits == 5 else _TWO_BITS
        pairs |= above if bits == 2 else above << 4
    return torch.stack([pairs & 0xFFFF, pairs >> 16 & 0xFFFF], dim=-1).flatten(-3)


def _above(bits: int) -> int:
    """Bits of a code in the last word of a pack."""
    return 1 if bits == 5 else 2
