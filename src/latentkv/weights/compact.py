"""bfloat16 weights in 12 bits each, without loss: a decode step reads a quarter less.

The exponents of a trained matrix lie close together: sixteen that follow each other, the matrix' window, hold all but
about one in ten thousand weights. DFloat11 (arXiv 2504.11651) gives exponents codes of different lengths; one length
suits a CPU's vectors.

The layout, the same on every machine. A window begins with an even exponent. A weight is its lower byte as it is (the
exponent's last bit and the mantissa), and a code of 4 bits: the sign, and which pair of exponents of the window. Eight
weights of an output take three 32-bit words. Each half of word i (the low half first) holds weight 2 i or 2 i + 1: the
lower byte in bits 0-7, the code in bits 8-11. Bits 12-15 of the three words' halves hold weight 6 or 7: the code; the
lower byte's bits 0-3; its bits 4-7.

The words lie in blocks as `weights/layout.py` says. Each block ends with whole cache
lines of 32-bit words: the window's first exponent; the number of exceptions; and for each of them, a weight whose
exponent is outside the window, its column, and its output in the block (low half) with its bits (high half). Among the
words the window's first power of two stands for it, from which kernels know what to take away again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.kernels import extension

WORDS, WEIGHTS = 3, 8
"""Words that hold so many weights of one output."""

_LINE_WORDS = 16
_LARGEST_END = 1 / 32
"""Of a block's words: exceptions take time, and with more of them there is little to gain."""


def find_windows(weight: Tensor, block_outs: int) -> tuple[list[int], int] | None:
    """Each matrix' window, and the most exceptions that a block has; None where there are too many, or no extension.

    Args:
        weight: [E, O, D] bfloat16, contiguous.
        block_outs: outputs of a block.
    """
    if extension is None:
        return None
    found = [extension.compact_window(*_memory(matrix), block_outs) for matrix in weight]
    most = max(exceptions for _, exceptions in found)
    words = eights(weight.shape[2]) * WORDS * block_outs
    return ([first for first, _ in found], most) if end_words(most) <= max(_LINE_WORDS, words * _LARGEST_END) else None


def eights(in_features: int) -> int:
    """Eights of weights in a row; the last is filled up."""
    return -(-in_features // WEIGHTS)


def end_words(exceptions: int) -> int:
    """32-bit words at the end of a block that has room for so many exceptions."""
    return -(-(2 + 2 * exceptions) // _LINE_WORDS) * _LINE_WORDS


def pack_matrix(matrix: Tensor, window: int, exceptions: int, block_outs: int, words: Tensor) -> None:
    """Pack one matrix [O, D] bfloat16, contiguous, into its words [n] int32, which are zero."""
    extension.pack_compact(*_memory(matrix), window, exceptions, block_outs, words.data_ptr())


def unpack_matrix(words: Tensor, block_outs: int, in_features: int) -> Tensor:
    """The weights [blocks * block_outs, in_features] bfloat16 of one matrix, from its words [blocks, n] int32."""
    blocks, length = len(words), eights(in_features) * WORDS * block_outs
    packed, end = words[:, :length].view(blocks, -1, WORDS, block_outs), words[:, length:]
    halves = torch.stack([packed & 0xFFFF, packed >> 16 & 0xFFFF], dim=-1)
    thirds = halves >> 12
    code = torch.cat([halves >> 8 & 15, thirds[:, :, :1]], dim=2)  # [blocks, eights, 4, block_outs, 2]
    low = torch.cat([halves & 255, thirds[:, :, 1:2] | thirds[:, :, 2:] << 4], dim=2)
    bits = code >> 3 << 15 | (code & 7) + int(end[0, 0]) // 2 << 8 | low
    bits = bits.permute(0, 3, 1, 2, 4).reshape(blocks * block_outs, -1)
    for block, (_, count, *exceptions) in enumerate(end.tolist()):
        for column, place in zip(exceptions[: 2 * count : 2], exceptions[1 : 2 * count : 2], strict=True):
            bits[block * block_outs + (place & 0xFFFF), column] = place >> 16 & 0xFFFF
    return bits[:, :in_features].to(torch.int16).view(torch.bfloat16)


def _memory(matrix: Tensor) -> tuple[int, int, int]:
    outs, ins = matrix.shape
    return matrix.data_ptr(), outs, ins
