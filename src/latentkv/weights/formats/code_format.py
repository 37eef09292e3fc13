"""`CodeFormat`: what the codes of a quantised weight are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.weights.formats import code_words


@dataclass(frozen=True)
class CodeFormat:
    """What a code of a quantised weight can be, and what it stands for before it is scaled.

    Attributes:
        name: "int4".
        kernel: its number in `csrc/linear.h`.
        bits: of a code.
        lowest: the least code; int8 holds all.
        has_minima: beside the scale of a group is what is added to all its weights.
        levels: what the codes stand for, from the lowest on; None: themselves.
        default_group: weights that share a scale where nobody says how many, among formats that weights are rounded
            to; None: a whole row.
    """

    name: str
    kernel: int
    bits: int
    lowest: int
    has_minima: bool = False
    levels: tuple[float, ...] | None = None
    default_group: int | None = None

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.lowest + 2**self.bits - 1

    @property
    def pack(self) -> tuple[int, int]:
        """32-bit words that are read together, and the codes in them."""
        return code_words.pack_of(self.bits)

    def words_of(self, codes: Tensor) -> Tensor:
        """Codes [..., n] int8, n whole packs, as words [..., m] int32."""
        if self.bits == 8:
            return codes.contiguous().view(torch.int32)
        return code_words.words_of(codes - self.lowest, self.bits)

    def codes_of(self, words: Tensor) -> Tensor:
        """The inverse of `words_of`, in any integer dtype."""
        return words.view(torch.int8) if self.bits == 8 else code_words.codes_of(words, self.bits) + self.lowest

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before they are scaled, float32, of the same shape."""
        if self.levels is None:
            return codes.float()
        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int() - self.lowest]
