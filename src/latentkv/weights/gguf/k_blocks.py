"""GGUF's K types: 256 weights in groups of 16 or 32, whose scales (and minima) are small numbers times a block's own.

Each function takes blocks [B, bytes] of uint8 and returns float32 [B, 256].
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.gguf.bits import half, planes


def decode_q2_k(blocks: Tensor) -> Tensor:
    """Weights are d s q - dmin m, 4 bits each for s and m of 16 weights."""
    scales = blocks[:, :16]
    return _affine(planes(blocks[:, 16:80], 32, 2), scales & 15, scales >> 4, half(blocks, 80), half(blocks, 82))


def decode_q3_k(blocks: Tensor) -> Tensor:
    """Weights are d (s - 32) (q - 4), q of 3 bits, s of 6 bits for 16 weights."""
    high = planes(blocks[:, :32], 32, 1)
    scales = planes(blocks[:, 96:104], 8, 4) | (planes(blocks[:, 104:108], 4, 2) << 4)
    return _symmetric(planes(blocks[:, 32:96], 32, 2) | (high << 2), 4, scales.float().sub_(32), half(blocks, 108))


def decode_q4_k(blocks: Tensor) -> Tensor:
    """Weights are d s q - dmin m, 6 bits each for s and m of 32 weights."""
    scales, minima = _six_bits(blocks[:, 4:16])
    return _affine(planes(blocks[:, 16:], 32, 4), scales, minima, half(blocks, 0), half(blocks, 2))


def decode_q5_k(blocks: Tensor) -> Tensor:
    """Weights as those of Q4_K, with a fifth bit: the groups' in turn, from the lowest bit of 32 bytes up."""
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = planes(blocks[:, 48:], 32, 4) | (planes(blocks[:, 16:48], 32, 1) << 4)
    return _affine(codes, scales, minima, half(blocks, 0), half(blocks, 2))


def decode_q6_k(blocks: Tensor) -> Tensor:
    """Weights are d s (q - 32), s of 8 bits for 16 weights."""
    codes = planes(blocks[:, :128], 64, 4) | (planes(blocks[:, 128:192], 32, 2) << 4)
    return _symmetric(codes, 32, blocks[:, 192:208].view(torch.int8).float(), half(blocks, 208))


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of 8 groups, 6 bits each, out of 12 bytes.

    Four scales and four minima have the low 6 bits of a byte each; of the other four, the last four bytes have the low
    4 bits (scales below minima) and the bytes before them, in the two bits left over, the high ones.
    """
    first, second, last = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), 1)
    return scales, minima


def _affine(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    grouped = codes.float().view(*scales.shape, -1)
    return grouped.mul_((d * scales.float())[..., None]).sub_((dmin * minima.float())[..., None]).flatten(1)


def _symmetric(codes: Tensor, zero: int, scales: Tensor, d: Tensor) -> Tensor:
    grouped = codes.float().sub_(zero).view(*scales.shape, -1)
    return grouped.mul_((d * scales)[..., None]).flatten(1)
