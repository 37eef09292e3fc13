"""Bits of GGUF's blocks, [blocks, bytes] of uint8: numbers of a few bits beside one another, and wider numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def planes(data: Tensor, run: int, bits: int) -> Tensor:
    """Numbers of a few bits: the lowest of `run` bytes, then those above them, and so on; then the next `run` bytes.

    Args:
        data: uint8 [B, k * run].
        run: bytes that are read side by side; with 1, each byte's numbers follow one another.
        bits: of a number: 1, 2 or 4.

    Returns:
        uint8 [B, k * 8 / bits * run].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((data.reshape(len(data), -1, 1, run) >> shifts) & ((1 << bits) - 1)).flatten(1)


def packed_planes(numbers: Tensor, run: int, bits: int) -> Tensor:
    """The mirror of `planes`: uint8 [B, k * 8 / bits * run] of numbers to uint8 [B, k * run]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (numbers.reshape(len(numbers), -1, len(shifts), run) << shifts).sum(2, dtype=torch.uint8).flatten(1)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [B, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def words(data: Tensor, nbytes: int) -> Tensor:
    """Little-endian words of 2 or 4 bytes, as int32 [B, k]; words of 4 bytes keep their bits, not their values."""
    own = data.clone(memory_format=torch.contiguous_format)  # a single block's lie where words may not begin
    return own.view(torch.int32) if nbytes == 4 else own.view(torch.int16).int() & 0xFFFF


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of a table [N, ...] by codes [B, k] of any integer dtype: [B, k, ...]."""
    return table.index_select(0, codes.flatten().int()).view(*codes.shape, *table.shape[1:])
