"""GGUF's types whose codes of 4 bits stand for the 16 integers of a table.

Each function takes blocks [B, bytes] of uint8 and returns their integers, in 8 bits: those of the table.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from latentkv.weights.gguf.bits import half, lookup, planes, words
from latentkv.weights.gguf.integers import Integers

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What a code of IQ4_NL and IQ4_XS stands for."""

FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what a code of MXFP4 and NVFP4 stands for (E2M1, without its negative zero); their scales are halved."""


def iq4_nl(blocks: Tensor) -> Integers:
    """Weights are d T[q]."""
    return Integers(_levels(IQ4_LEVELS, planes(blocks[:, 2:], 16, 4)), half(blocks, 0), 8)


def iq4_xs(blocks: Tensor) -> Integers:
    """Weights are d (s - 32) T[q], s of 6 bits for 32 weights."""
    high = (words(blocks[:, 2:4], 2) >> torch.arange(0, 16, 2)) & 3
    scales = planes(blocks[:, 4:8], 1, 4) | (high << 4)
    codes = _levels(IQ4_LEVELS, planes(blocks[:, 8:], 16, 4))
    return Integers(codes, half(blocks, 0) * scales.float().sub_(32), 8)


def mxfp4(blocks: Tensor) -> Integers:
    """Weights are T[q] 2^(e - 128), for every e from 0 to 255."""
    exponents = blocks[:, :1].int()
    # Below 2 the scale is no normal float32: its bits are written as they are.
    scales = torch.where(exponents < 2, 0x00200000 << exponents, (exponents - 1) << 23).view(torch.float32)
    return Integers(_levels(FP4_LEVELS, planes(blocks[:, 1:], 16, 4)), scales, 8)


def nvfp4(blocks: Tensor) -> Integers:
    """Weights are T[q] s / 2, s of 8 bits (E4M3 without a sign) for 16 weights."""
    return Integers(_levels(FP4_LEVELS, planes(blocks[:, 4:], 8, 4)), lookup(_half_e4m3(), blocks[:, :4]), 8)


def _levels(levels: tuple[int, ...], codes: Tensor) -> Tensor:
    return lookup(torch.tensor(levels, dtype=torch.int8), codes)


@cache
def _half_e4m3() -> Tensor:
    """Half of what a byte stands for as E4M3, as float32 [256].

    Its top bit counts for nothing, and 0x7F is zero; with the top bit set it is a number (480).
    """
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).double()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7))
    return torch.where(byte == 0x7F, 0.0, value / 2).float()
