"""GGUF's IQ1, IQ2 and IQ3 types: 256 weights as codes of runs of 4 or 8 (`grids.py`), with signs and scales.

Runs stand for few integers, so they become integers of 5, 6 or 8 bits with the file's scales: the same weights, in more
bits than the file has. Each function takes blocks [B, bytes] of uint8 and returns those codes and scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.formats import INT5, INT6, INT8, CodeFormat
from latentkv.weights.gguf.bits import half, lookup, planes, words
from latentkv.weights.gguf.coded_blocks import CodedBlocks
from latentkv.weights.gguf.grids import even_signs, grid

_IQ1_STEPS = 8
"""Levels of a run of IQ1 lie an eighth above or below -1, 0 and 1: at odd numbers of such steps."""


def iq2_xxs(blocks: Tensor) -> CodedBlocks:
    """8 groups of 8 bytes: 4 codes, then a word of 4 x 7 bits of signs and 4 bits of scale."""
    groups = blocks[:, 2:].reshape(len(blocks), 8, 8)
    signs, scales = _signs_and_scale(words(groups[:, :, 4:].flatten(1), 4))
    return _signed(INT8, lookup(grid("IQ2_XXS"), groups[:, :, :4].flatten(1)), signs, half(blocks, 0) * scales * 0.25)


def iq2_xs(blocks: Tensor) -> CodedBlocks:
    """32 words of a code's 9 bits and 7 bits of signs; scales of 4 bits for 16 weights."""
    codes = words(blocks[:, 2:66], 2)
    scales = planes(blocks[:, 66:], 1, 4).float().add_(0.5)
    weights = lookup(grid("IQ2_XS"), codes & 511)
    return _signed(INT8, weights, lookup(even_signs(), codes >> 9), half(blocks, 0) * scales * 0.25)


def iq2_s(blocks: Tensor) -> CodedBlocks:
    """32 codes of 10 bits (8, and 2 apart), 32 bytes of signs, scales of 4 bits for 16 weights."""
    codes = blocks[:, 2:34].short() | (planes(blocks[:, 66:74], 1, 2).short() << 8)
    scales = planes(blocks[:, 74:], 1, 4).float().add_(0.5)
    return _signed(INT8, lookup(grid("IQ2_S"), codes), _plain_signs(blocks[:, 34:66]), half(blocks, 0) * scales * 0.25)


def iq3_xxs(blocks: Tensor) -> CodedBlocks:
    """64 codes of 4 weights each, even numbers up to 62; 8 words of 4 x 7 bits of signs and 4 bits of scale."""
    signs, scales = _signs_and_scale(words(blocks[:, 66:], 4))
    return _signed(INT6, lookup(grid("IQ3_XXS"), blocks[:, 2:66]) / 2, signs, half(blocks, 0) * scales)


def iq3_s(blocks: Tensor) -> CodedBlocks:
    """64 codes of 9 bits (8, and 1 apart) of 4 weights each, 32 bytes of signs, scales of 4 bits for 32 weights."""
    codes = blocks[:, 2:66].short() | (planes(blocks[:, 66:74], 1, 1).short() << 8)
    scales = planes(blocks[:, 106:], 1, 4).float().mul_(2).add_(1)
    return _signed(INT5, lookup(grid("IQ3_S"), codes), _plain_signs(blocks[:, 74:106]), half(blocks, 0) * scales)


def iq1_s(blocks: Tensor) -> CodedBlocks:
    """32 codes of 11 bits, of which 8 words hold 4 x 3 high ones, 3 bits of scale and the shift's sign."""
    high = words(blocks[:, 34:], 2)
    codes = blocks[:, 2:34].int() | (_threes(high) << 8)
    scales = ((high >> 12) & 7).float().mul_(2).add_(1)
    return _shifted(INT5, codes, (high >> 15).repeat_interleave(4, 1), half(blocks, 0) * scales)


def iq1_m(blocks: Tensor) -> CodedBlocks:
    """32 codes of 11 bits, each with its shift's sign; 4 words of 4 x 3 bits of scale and 4 bits of the block's own."""
    high = planes(blocks[:, 32:48], 1, 4)
    scales = words(blocks[:, 48:], 2)
    d = ((scales >> 12) << torch.arange(0, 16, 4)).sum(1, keepdim=True).short().view(torch.float16).float()
    codes = blocks[:, :32].int() | ((high & 7).int() << 8)
    return _shifted(INT6, codes, high >> 3, d * _threes(scales).float().mul_(2).add_(1))


def _signed(form: CodeFormat, runs: Tensor, signs: Tensor, scales: Tensor) -> CodedBlocks:
    """Magnitudes of runs [B, k, 4 or 8] with signs [B, 32, 8], in equal groups of scales [B, G]."""
    return CodedBlocks(runs.view(signs.shape).mul_(signs).flatten(1).to(torch.int8), scales, form)


def _shifted(form: CodeFormat, codes: Tensor, below: Tensor, scales: Tensor) -> CodedBlocks:
    """Runs of IQ1, shifted up or down, in equal groups of scales.

    Args:
        form: of the steps; kernels take 5 bits for groups of 32 alone.
        codes: integers [B, 32].
        below: 1 where a run's levels are shifted down, 0 where up, [B, 32].
        scales: float32 [B, G].
    """
    shift = below.float().mul_(-2).add_(1)
    steps = lookup(grid("IQ1"), codes).mul_(_IQ1_STEPS).add_(shift[..., None])
    return CodedBlocks(steps.flatten(1).to(torch.int8), scales / _IQ1_STEPS, form)


def _signs_and_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Signs [B, 32, 8] and scales plus a half [B, 8] out of 8 words [B, 8]."""
    codes = (packed[..., None] >> torch.arange(0, 28, 7)) & 127
    return lookup(even_signs(), codes.flatten(1)), ((packed >> 28) & 15).float().add_(0.5)


def _plain_signs(data: Tensor) -> Tensor:
    """Signs [B, 32, 8], one bit each."""
    return planes(data, 1, 1).float().mul_(-2).add_(1).view(len(data), -1, 8)


def _threes(packed: Tensor) -> Tensor:
    """The four numbers of 3 bits at the bottom of each word [B, k], one after another: [B, 4 k]."""
    return ((packed[..., None] >> torch.arange(0, 12, 3)) & 7).flatten(1)
