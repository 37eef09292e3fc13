"""What most of GGUF's blocks are: codes with scales, and minima, for groups of 16 or 32 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.weights.formats import CodeFormat
from latentkv.weights.weight import QuantizedWeight

# The largest of a matrix' scales in float16: a smaller one has no bits to spare, a larger one is infinite.
_SMALLEST, _LARGEST = 2.0**-13, 65504.0


@dataclass(frozen=True)
class CodedBlocks:
    """Blocks of weights: what codes stand for, * scales + minima, in float32 and in this order.

    Attributes:
        codes: [B, W] int8, of `format`.
        scales: [B, G] float32, one for W / G weights.
        format: in which the codes are kept.
        minima: [B, G] float32, where the format has such.
    """

    codes: Tensor
    scales: Tensor
    format: CodeFormat
    minima: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights, float32 [B, W]."""
        grouped = self.format.values(self.codes).view(*self.scales.shape, -1).mul_(self.scales[..., None])
        if self.minima is not None:
            grouped.add_(self.minima[..., None])
        return grouped.flatten(1)

    def as_weight(self, rows: int) -> QuantizedWeight:
        """The same as a matrix of so many rows.

        A scale that the file has in two parts is one number here: rounded to float16, by 2^-12 of it or of the largest
        one at most; where it could not be, all are float32. Powers of two are bfloat16.
        """
        shared = [self.scales] if self.minima is None else [self.scales, self.minima]
        dtype = next(dtype for dtype, holds in _SCALES if all(map(holds, shared)))
        scales, *minima = (numbers.to(dtype).view(rows, -1) for numbers in shared)
        group = self.codes.shape[1] // self.scales.shape[1]
        return QuantizedWeight(self.codes.reshape(rows, -1), scales, self.format, group, minima[0] if minima else None)


def _is_bfloat16(numbers: Tensor) -> bool:
    return torch.equal(numbers.bfloat16().float(), numbers)


def _fits_float16(numbers: Tensor) -> bool:
    largest = float(numbers.abs().amax())
    return largest == 0 or _SMALLEST <= largest <= _LARGEST


def _is_float32(numbers: Tensor) -> bool:
    return numbers.dtype == torch.float32


_SCALES = ((torch.bfloat16, _is_bfloat16), (torch.float16, _fits_float16), (torch.float32, _is_float32))
