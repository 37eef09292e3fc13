"""Weights -> GGUF's blocks of 32 with one scale each: the mirror of `simple_blocks.py`, and of MXFP4's table.

Each function takes float32 [B, 32], and how much each weight's error counts ([B, 32], or None), and returns the bytes
of blocks, uint8 [B, bytes].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from latentkv.weights.gguf.bits import packed_planes
from latentkv.weights.gguf.rounding import squared, stored_half, symmetric_codes, symmetric_scales

# MXFP4's magnitudes, and where one ends and the next begins.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(_FP4))
_FP4_LARGEST = 2
"""Exponent of the largest of them."""

_BIAS, _MOST = 127, 254


def to_q8_0(weights: Tensor, importance: Tensor | None) -> Tensor:
    """A float16 scale and 32 codes of 8 bits."""
    scales, codes = _rounded(weights, importance, 8)
    return torch.cat((_as_bytes(scales), codes.to(torch.int8).view(torch.uint8)), 1)


def to_q4_0(weights: Tensor, importance: Tensor | None) -> Tensor:
    """A float16 scale and 16 bytes of codes."""
    scales, codes = _rounded(weights, importance, 4)
    return torch.cat((_as_bytes(scales), packed_planes((codes + 8).byte(), 16, 4)), 1)


def to_q5_0(weights: Tensor, importance: Tensor | None) -> Tensor:
    """A float16 scale, 4 bytes of top bits and 16 of the others."""
    scales, codes = _rounded(weights, importance, 5)
    codes = (codes + 16).byte()
    top, low = packed_planes(codes >> 4, 1, 1), packed_planes(codes & 15, 16, 4)
    return torch.cat((_as_bytes(scales), top, low), 1)


def to_mxfp4(weights: Tensor, importance: Tensor | None) -> Tensor:
    """An exponent and 16 bytes of codes: the exponent that errs least of the largest weight's and its neighbours."""
    magnitudes = weights.abs()
    largest = magnitudes.amax(-1, keepdim=True)
    middle = torch.frexp(largest).exponent - 1 - _FP4_LARGEST + _BIAS
    exponents = torch.stack([middle, middle + 1, middle - 1]).clamp_(0, _MOST).masked_fill_(largest == 0, 0)
    levels, bounds = torch.tensor(_FP4), torch.tensor(_FP4_BOUNDS)
    # Twice 2^(e - 128), which is no subnormal for any e.
    scales = torch.ldexp(torch.ones(exponents.shape), exponents - _BIAS)
    codes = torch.bucketize(magnitudes / scales, bounds)
    best = squared(levels[codes].mul_(scales).sub_(magnitudes), importance).argmin(0, keepdim=True)
    exponent, code = exponents.gather(0, best)[0], codes.gather(0, best.expand(-1, *weights.shape))[0]
    signed = code | ((weights < 0) & (code > 0)).to(code.dtype) << 3
    return torch.cat((exponent.byte(), packed_planes(signed.byte(), 16, 4)), 1)


def _rounded(weights: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    scales = symmetric_scales(weights, importance, bits, stored_half)
    return scales, symmetric_codes(weights, scales, bits)


def _as_bytes(scales: Tensor) -> Tensor:
    return scales.half().view(torch.uint8)
