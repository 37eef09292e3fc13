"""GGUF's types with one scale a block: 32 weights, or 256 of three levels.

Each function takes blocks [B, bytes] of uint8 and returns their codes and scales.
Products and sums come in the order in which ggml writes them, so that zeros keep their signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.formats import INT4, INT5, INT8, UINT4, UINT5
from latentkv.weights.gguf.bits import half, planes
from latentkv.weights.gguf.coded_blocks import CodedBlocks


def q4_0(blocks: Tensor) -> CodedBlocks:
    """Weights are d (q - 8)."""
    return CodedBlocks(_signed(planes(blocks[:, 2:], 16, 4), 8), half(blocks, 0), INT4)


def q4_1(blocks: Tensor) -> CodedBlocks:
    """Weights are d q + m."""
    return CodedBlocks(planes(blocks[:, 4:], 16, 4).view(torch.int8), half(blocks, 0), UINT4, half(blocks, 2))


def q5_0(blocks: Tensor) -> CodedBlocks:
    """Weights are d (q - 16)."""
    return CodedBlocks(_signed(_five_bits(blocks[:, 2:]), 16), half(blocks, 0), INT5)


def q5_1(blocks: Tensor) -> CodedBlocks:
    """Weights are d q + m."""
    return CodedBlocks(_five_bits(blocks[:, 4:]).view(torch.int8), half(blocks, 0), UINT5, half(blocks, 2))


def q8_0(blocks: Tensor) -> CodedBlocks:
    """Weights are d q, q from -128 to 127."""
    return CodedBlocks(blocks[:, 2:].view(torch.int8), half(blocks, 0), INT8)


def tq1_0(blocks: Tensor) -> CodedBlocks:
    """Weights are d (q - 1), q from 0 to 2: the leading digit, base 3, of what a byte's fraction becomes by 3^n.

    48 bytes have five digits each (32, then 16 side by side), 4 bytes have four.
    """
    parts = (_powers(blocks[:, :32], 5), _powers(blocks[:, 32:48], 5), _powers(blocks[:, 48:52], 4))
    digits = (torch.cat(parts, 1).short() * 3) >> 8
    return CodedBlocks(_signed(digits.to(torch.uint8), 1), half(blocks, 52), INT4)


def tq2_0(blocks: Tensor) -> CodedBlocks:
    """Weights are d (q - 1), q from 0 to 3."""
    return CodedBlocks(_signed(planes(blocks[:, :64], 32, 2), 1), half(blocks, 64), INT4)


def _five_bits(data: Tensor) -> Tensor:
    """Numbers of 5 bits, uint8 [B, 32]: 4 bytes of their top bits, 16 bytes of the others."""
    return planes(data[:, 4:], 16, 4) | (planes(data[:, :4], 1, 1) << 4)


def _signed(codes: Tensor, middle: int) -> Tensor:
    return codes.view(torch.int8) - middle


def _powers(data: Tensor, digits: int) -> Tensor:
    """Bytes times 1, 3, 9 and so on, as bytes that wrap around, `digits` rows of them."""
    return (data[:, None] * 3 ** torch.arange(digits, dtype=torch.uint8)[:, None]).flatten(1)
