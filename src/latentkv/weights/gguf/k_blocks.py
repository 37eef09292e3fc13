"""GGUF's K types: 256 weights in groups of 16 or 32, whose scales (and minima) are small numbers times a block's own.

Each function takes blocks [B, bytes] of uint8 and returns their codes and scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.formats import INT4, INT6, UINT2, UINT4, UINT5, CodeFormat
from latentkv.weights.gguf.bits import half, planes
from latentkv.weights.gguf.coded_blocks import CodedBlocks


def q2_k(blocks: Tensor) -> CodedBlocks:
    """Weights are d s q - dmin m, 4 bits each for s and m of 16 weights."""
    scales = blocks[:, :16]
    return _affine(UINT2, planes(blocks[:, 16:80], 32, 2), scales & 15, scales >> 4, half(blocks, 80), half(blocks, 82))


def q3_k(blocks: Tensor) -> CodedBlocks:
    """Weights are d (s - 32) (q - 4), q of 3 bits, s of 6 bits for 16 weights."""
    high = planes(blocks[:, :32], 32, 1)
    scales = planes(blocks[:, 96:104], 8, 4) | (planes(blocks[:, 104:108], 4, 2) << 4)
    codes = planes(blocks[:, 32:96], 32, 2) | (high << 2)
    return _symmetric(INT4, codes, 4, scales.float().sub_(32), half(blocks, 108))


def q4_k(blocks: Tensor) -> CodedBlocks:
    """Weights are d s q - dmin m, 6 bits each for s and m of 32 weights."""
    scales, minima = _six_bits(blocks[:, 4:16])
    return _affine(UINT4, planes(blocks[:, 16:], 32, 4), scales, minima, half(blocks, 0), half(blocks, 2))


def q5_k(blocks: Tensor) -> CodedBlocks:
    """Weights as those of Q4_K, with a fifth bit: the groups' in turn, from the lowest bit of 32 bytes up."""
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = planes(blocks[:, 48:], 32, 4) | (planes(blocks[:, 16:48], 32, 1) << 4)
    return _affine(UINT5, codes, scales, minima, half(blocks, 0), half(blocks, 2))


def q6_k(blocks: Tensor) -> CodedBlocks:
    """Weights are d s (q - 32), s of 8 bits for 16 weights."""
    codes = planes(blocks[:, :128], 64, 4) | (planes(blocks[:, 128:192], 32, 2) << 4)
    return _symmetric(INT6, codes, 32, blocks[:, 192:208].view(torch.int8).float(), half(blocks, 208))


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of 8 groups, 6 bits each, out of 12 bytes.

    Four scales and four minima have the low 6 bits of a byte each; of the other four, the last four bytes have the low
    4 bits (scales below minima) and the bytes before them, in the two bits left over, the high ones.
    """
    first, second, last = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), 1)
    return scales, minima


def _affine(form: CodeFormat, codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> CodedBlocks:
    return CodedBlocks(codes.view(torch.int8), d * scales.float(), form, -(dmin * minima.float()))


def _symmetric(form: CodeFormat, codes: Tensor, middle: int, scales: Tensor, d: Tensor) -> CodedBlocks:
    return CodedBlocks(codes.view(torch.int8) - middle, d * scales, form)
