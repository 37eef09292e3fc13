"""Memory that the processes which share layers out have in common: all heads read the same latents and index keys."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from latentkv.state.spec import LayerSpec, common_page_bytes, page_bytes, sequence_bytes

_ALIGN = 64  # bytes that a cache line has
_TENSORS = 2  # of a layer: latents and index keys


class CommonMemory:
    """Zeroed memory of a file that several processes map, given out by each in the same order.

    The processes write the same bytes to the same places, and each reads what it has written itself or what all had
    written before. None is a step ahead of another, nor a layer, for they wait for each other's sums after each block.

    Args:
        file: its descriptor, of `common_bytes` at least; it may be closed afterwards.
        num_bytes: of it.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        self._memory = mmap.mmap(file, num_bytes)
        self._given = 0

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """See `spec.Zeros`."""
        begin, count = self._given, math.prod(size)
        self._given += _aligned(count * dtype.itemsize)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(tuple(size))


def common_bytes(layers: Sequence[LayerSpec], num_pages: int, page_size: int) -> int:
    """Bytes of the file for what processes have in common of these layers."""
    return num_pages * common_page_bytes(layers, page_size) + _TENSORS * _ALIGN * len(layers)


def share_bytes(layers: Sequence[LayerSpec], num_pages: int, num_slots: int, page_size: int, sharers: int) -> int:
    """Bytes of these layers' pages and slots; what `sharers` processes have in common of them counts in equal parts."""
    common = num_pages * common_page_bytes(layers, page_size)
    own = num_pages * page_bytes(layers, page_size) - common + num_slots * sequence_bytes(layers)
    return own + -(-common // sharers)


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGN
