"""Sums of several processes through memory that they share: `csrc/shared_sum.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkv.checks import require
from latentkv.kernels import DTYPE_CODES, extension

PLACE_FLOATS = 1 << 16
"""Numbers that are added up at a time: so many of a few processes stay in a second-level cache."""

_SUMMED = (torch.float32, torch.bfloat16)


class SharedSum:
    """One of `count` processes that make the same calls in the same order, in steps from `begin` to `end`.

    A call raises `process_lost()` where another process has ended or all was abandoned, and `process_failed()` where
    another one cannot do its part of this step, or does something else; `culprit` says which.

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

    def end(self) -> None:
        """End the step once all others do: none of them can fail it any more."""
        self._group.end()

    def broadcast(self, numbers: Tensor) -> None:
        """Make the others' numbers, contiguous and as many, those of the first process."""
        require(numbers.is_contiguous(), "what is broadcast is contiguous")
        self._group.broadcast(numbers.data_ptr(), numbers.nbytes)

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """All processes' parts added up in their order, and the residual, rounded once to `dtype`.

        Args:
            part: float32, of the same sizes in all of them.
            residual: of these sizes, or None.
            dtype: of the result.

        Raises:
            OpError: a part is not float32, or the residual of other sizes.
        """
        require(part.dtype == torch.float32, f"parts of sums are float32, not {part.dtype}")
        require(residual is None or residual.shape == part.shape, "a residual is of the sizes of the sum")
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
        """All processes' own [T, widths[r]] float32 side by side, where that is wanted: [T, their sum].

        Raises:
            OpError: it is not float32.
        """
        require(own.dtype == torch.float32, f"what is gathered is float32, not {own.dtype}")
        own = own.contiguous()
        out = own.new_empty(len(own), sum(widths)) if wanted else None
        self._group.gather(own.data_ptr(), len(own), list(widths), 0 if out is None else out.data_ptr())
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


def process_lost() -> type[Exception]:
    """What is raised where another process is gone."""
    return extension.ProcessLost


def process_failed() -> type[Exception]:
    """What is raised where another process cannot do its part of a step."""
    return extension.ProcessFailed
