"""Sums of several processes through memory that they share: `csrc/shared_sum.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkv.kernels import DTYPE_CODES, extension

PLACE_FLOATS = 1 << 16
"""Numbers that are added up at a time: so many of a few processes stay in a second-level cache."""

_SUMMED = (torch.float32, torch.bfloat16)


class SharedSum:
    """One of `count` processes that make the same calls in the same order.

    A call raises `errors()`'s first where another process has ended or all was abandoned, and its second where another
    one could not do its part of this step; `culprit` says which.

    Args:
        file: descriptor of memory, of `shared_bytes`, that all of them have.
        rank: this process.
        count: of all.
        ended: of each process a descriptor that is readable once it has ended; -1: nobody knows.
    """

    def __init__(self, file: int, rank: int, count: int, ended: Sequence[int]) -> None:
        self._group = extension.SharedSum(file, rank, count, PLACE_FLOATS, list(ended))

    def begin(self) -> None:
        """Begin the next step once all others do, however long that takes."""
        self._group.begin()

    def broadcast(self, numbers: Tensor) -> None:
        """Make the others' numbers, contiguous and as many, those of the first process."""
        self._group.broadcast(numbers.data_ptr(), numbers.nbytes)

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """All processes' parts added up in their order, and the residual, rounded once to `dtype`.

        Args:
            part: float32, of the same sizes in all of them.
            residual: of these sizes, or None.
            dtype: of the result.
        """
        if dtype not in _SUMMED or (residual is not None and residual.dtype not in _SUMMED):
            whole = self.sum(part, None, torch.float32)
            return (whole if residual is None else whole + residual).to(dtype)
        part, residual = part.contiguous(), None if residual is None else residual.contiguous()
        out = torch.empty(part.shape, dtype=dtype)
        extension.shared_sum(
            self._group.address,
            part.data_ptr(),
            part.numel(),
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else DTYPE_CODES[residual.dtype],
            out.data_ptr(),
            DTYPE_CODES[dtype],
        )
        return out

    def gather(self, own: Tensor, widths: Sequence[int], *, wanted: bool) -> Tensor | None:
        """All processes' own [T, widths[r]] float32 side by side, where that is wanted: [T, their sum]."""
        out = own.new_empty(len(own), sum(widths)) if wanted else None
        self._group.gather(own.contiguous().data_ptr(), len(own), list(widths), 0 if out is None else out.data_ptr())
        return out

    @property
    def culprit(self) -> int:
        """The process that an error was last raised about."""
        return self._group.culprit

    def fail(self, cause: int) -> None:
        """Let the others know that this process will do no more of this step, because of itself or another process."""
        self._group.fail(cause)

    def abandon(self) -> None:
        """Have all that wait, in whatever process and thread, wait no more."""
        self._group.abandon()


def shared_bytes(count: int) -> int:
    """Of memory that `count` processes share."""
    return extension.SharedSum.bytes(count, PLACE_FLOATS)


def errors() -> tuple[type[Exception], type[Exception]]:
    """What a call raises where another process is lost, and where it failed."""
    return extension.ProcessLost, extension.ProcessFailed
