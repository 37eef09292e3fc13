"""Memory that recorded calls write their results to, the same for all recordings of which one runs at a time."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 64
_BLOCK = 1 << 20


class Arena:
    """Blocks of memory; each `Lease` gives them out anew, from their beginning."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(len(block) for block in self._blocks)

    def grow(self, nbytes: int) -> NDArray[np.uint8]:
        """A further block, of `nbytes` at least, that begins at a cache line.

        It is as large as all before it, so that steps that grow one after the other need few, and no more than a few
        times what the largest does.
        """
        size = max(nbytes, _BLOCK, self.nbytes)
        raw = np.empty(size + _ALIGNED, np.uint8)
        block = raw[-raw.ctypes.data % _ALIGNED :][:size]
        self._blocks.append(block)
        return block

    def lease(self) -> Lease:
        """All of the memory, to be given out; what another lease has given out counts for nothing."""
        return Lease(self, self._blocks)


class Lease:
    """Gives memory out, and out again once the tensor that had it and all of its views are gone.

    Args:
        arena: whose memory.
        blocks: that it has so far.
    """

    def __init__(self, arena: Arena, blocks: list[NDArray[np.uint8]]) -> None:
        self._arena = arena
        self._blocks = list(blocks)
        self._free = [(number, 0, len(block)) for number, block in enumerate(self._blocks)]  # in order
        self._given_back: deque[tuple[int, int, int]] = deque()

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same sizes, strides and dtype; what it holds is undefined."""
        nbytes = tensor.untyped_storage().nbytes()
        if nbytes == 0:
            return tensor
        size = -(-nbytes // _ALIGNED) * _ALIGNED
        number, first = self._take(size)
        memory = self._blocks[number][first : first + nbytes]
        # Torch holds on to `memory` as long as a tensor lies in it.
        # A collection of garbage may come at any moment: what it gives back is noted, and joined to the rest later.
        weakref.finalize(memory, self._given_back.append, (number, first, first + size)).atexit = False
        flat: Any = torch.from_numpy(memory).view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride())

    def _take(self, size: int) -> tuple[int, int]:
        self._join()
        for i, (number, first, end) in enumerate(self._free):
            if end - first >= size:
                self._free[i] = number, first + size, end
                return number, first
        block = self._arena.grow(size)
        self._blocks.append(block)
        self._free.append((len(self._blocks) - 1, size, len(block)))
        return len(self._blocks) - 1, 0

    def _join(self) -> None:
        """Make what was given back free, in one piece with what is free beside it."""
        while self._given_back:
            self._free.append(self._given_back.popleft())
        joined: list[tuple[int, int, int]] = []
        for part in sorted(self._free):
            if joined and joined[-1][0] == part[0] and joined[-1][2] == part[1]:
                joined[-1] = part[0], joined[-1][1], part[2]
            elif part[1] < part[2]:
                joined.append(part)
        self._free = joined
