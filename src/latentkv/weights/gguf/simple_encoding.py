"""Weights -> GGUF's blocks of 32 with one scale each: the mirror of `simple_blocks.py`, and of MXFP4's table.

Each function takes float32 [B, 32], and how much each weight's error counts ([B, 32], or None), and returns the bytes
of blocks, uint8 [B, bytes].
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.gguf.bits import packed_planes
from latentkv.weights.gguf.rounding import squared, stored_half, symmetric_codes, symmetric_scales

# MXFP4's magnitudes, and where one ends and the next begins.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BOUNDS = tuple((low + high) / 2 for low, high in zip(_FP4, _FP4[1:], strict=False))
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
    """An exponent and 16 bytes of codes: that exponent, of the largest weight's and its neighbours, which errs least."""
    largest = weights.abs().amax(-1, keepdim=True)
    middle = torch.frexp(largest).exponent - 1 - _FP4_LARGEST + _BIAS
    magnitudes, levels = weights.abs(), torch.tensor(_FP4)
    best = error = codes = None
    for step in (0, 1, -1):
        exponent = (middle + step).clamp(0, _MOST).masked_fill_(largest == 0, 0)
        # Twice 2^(e - 128), which float32 has for every e as no subnormal.
        scale = torch.ldexp(torch.ones_like(largest), exponent - _BIAS)
        found = torch.bucketize(magnitudes / scale, torch.tensor(_FP4_BOUNDS))
        wrong = squared(levels[found].mul_(scale).sub_(magnitudes), importance)
        if best is None or error is None or codes is None:
            best, error, codes = exponent, wrong, found
            continue
        better = wrong < error
        best, error = torch.where(better, exponent, best), torch.where(better, wrong, error)
        codes = torch.where(better, found, codes)
    if best is None or codes is None:
        raise RuntimeError("nothing was tried")
    signed = codes | ((weights < 0) & (codes > 0)).to(codes.dtype) << 3
    return torch.cat((best.byte(), packed_planes(signed.byte(), 16, 4)), 1)


def _rounded(weights: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    scales = symmetric_scales(weights, importance, bits, stored_half)
    return scales, symmetric_codes(weights, scales, bits)


def _as_bytes(scales: Tensor) -> Tensor:
    return scales.half().view(torch.uint8)
