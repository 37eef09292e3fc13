"""GGUF's types whose codes of 4 bits stand for the 16 integers of a table.

Each function takes blocks [B, bytes] of uint8 and returns their codes and scales.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from latentkv.weights.formats import FP4, NL4
from latentkv.weights.gguf.bits import half, lookup, planes, words
from latentkv.weights.gguf.coded_blocks import CodedBlocks


def iq4_nl(blocks: Tensor) -> CodedBlocks:
    """Weights are d T[q]."""
    return CodedBlocks(planes(blocks[:, 2:], 16, 4).view(torch.int8), half(blocks, 0), NL4)


def iq4_xs(blocks: Tensor) -> CodedBlocks:
    """Weights are d (s - 32) T[q], s of 6 bits for 32 weights."""
    high = (words(blocks[:, 2:4], 2) >> torch.arange(0, 16, 2)) & 3
    scales = planes(blocks[:, 4:8], 1, 4) | (high << 4)
    codes = planes(blocks[:, 8:], 16, 4).view(torch.int8)
    return CodedBlocks(codes, half(blocks, 0) * scales.float().sub_(32), NL4)


def mxfp4(blocks: Tensor) -> CodedBlocks:
    """Weights are T[q] 2^(e - 128), for every e from 0 to 255."""
    exponents = blocks[:, :1].int()
    # Below 2 the scale is no normal float32: its bits are written as they are.
    scales = torch.where(exponents < 2, 0x00200000 << exponents, (exponents - 1) << 23).view(torch.float32)
    return CodedBlocks(planes(blocks[:, 1:], 16, 4).view(torch.int8), scales, FP4)


def nvfp4(blocks: Tensor) -> CodedBlocks:
    """Weights are T[q] s / 2, s of 8 bits (E4M3 without a sign) for 16 weights."""
    return CodedBlocks(planes(blocks[:, 4:], 8, 4).view(torch.int8), lookup(_half_e4m3(), blocks[:, :4]), FP4)


@cache
def _half_e4m3() -> Tensor:
    """Half of what a byte stands for as E4M3, as float32 [256].

    Its top bit counts for nothing, and 0x7F is zero; with the top bit set it is a number (480).
    """
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).double()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7))
    return torch.where(byte == 0x7F, 0.0, value / 2).float()
