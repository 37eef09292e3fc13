"""What most of GGUF's blocks are: integers with scales, and minima, for groups of 16 or 32 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.weights.weight import QuantizedWeight

# The largest of a matrix' scales in float16: a smaller one has no bits to spare, a larger one is infinite.
_SMALLEST, _LARGEST = 2.0**-13, 65504.0


@dataclass(frozen=True)
class Integers:
    """Blocks of weights: codes * scales + minima, in float32 and in this order.

    Attributes:
        codes: [B, W] int8; from 0 on where there are minima, else with the middle code at 0.
        scales: [B, G] float32, one for W / G weights.
        bits: of a code.
        minima: [B, G] float32.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    minima: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights, float32 [B, W]."""
        grouped = self.codes.float().view(*self.scales.shape, -1).mul_(self.scales[..., None])
        if self.minima is not None:
            grouped.add_(self.minima[..., None])
        return grouped.flatten(1)

    def as_weight(self, rows: int) -> QuantizedWeight:
        """The same as a matrix of so many rows.

        A scale that the file has in two parts is one number here: rounded to float16, by 2^-12 of it or of the largest
        one at most; where it could not be, all are float32.
        """
        shared = [self.scales] if self.minima is None else [self.scales, self.minima]
        dtype = torch.float16 if all(map(_fits_float16, shared)) else torch.float32
        scales, *minima = (numbers.to(dtype).view(rows, -1) for numbers in shared)
        group = self.codes.shape[1] // self.scales.shape[1]
        bits = 4 if self.bits == 3 else self.bits  # of which there are none in memory
        return QuantizedWeight(self.codes.reshape(rows, -1), scales, bits, group, minima[0] if minima else None)


def _fits_float16(numbers: Tensor) -> bool:
    largest = float(numbers.abs().amax())
    return largest == 0 or _SMALLEST <= largest <= _LARGEST
