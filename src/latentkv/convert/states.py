"""The calibration text's hidden states between two layers: a file that is read and written piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.files import write_whole

_TOKENS_AT_ONCE = 1024


class HiddenStates:
    """[sequences, length, hidden] float32 in a file, so that memory holds a piece of it only.

    Args:
        path: of the file, which is whole or not there.
        shape: (sequences, length, hidden).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape
        self._rows = max(1, _TOKENS_AT_ONCE // shape[1])

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """[some, length, hidden] of the sequences from `first` to before `last`."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != 4 * math.prod(self.shape):
            raise CheckpointError(
                f"{self.path} is damaged ({size:,} bytes, not {4 * math.prod(self.shape):,}): remove the folder of the "
                "converted model and convert again."
            )
        stored = np.memmap(self.path, dtype=np.float32, mode="r", shape=self.shape)
        last = self.shape[0] if last is None else last
        for start in range(first, last, self._rows):
            yield torch.from_numpy(np.array(stored[start : min(start + self._rows, last)]))

    def write(self, pieces: Iterator[Tensor]) -> None:
        """Write all of it."""

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece.float().contiguous().numpy().tobytes())

        write_whole(self.path, fill)

    def relative_error(self, wanted: HiddenStates, first: int) -> float:
        """|these - wanted|^2 / |wanted|^2 of each token, mean over those of the sequences from `first`."""
        error, tokens = 0.0, 0
        for piece, other in zip(self.pieces(first), wanted.pieces(first), strict=True):
            shares = (piece - other).double().square().sum(-1) / other.double().square().sum(-1)
            error, tokens = error + float(shares.sum()), tokens + shares.numel()
        return error / tokens

    def mapped(self, path: Path, function: Callable[[Tensor], Tensor]) -> HiddenStates:
        """The states that `function` makes of each piece, in a file of their own."""
        states = HiddenStates(path, self.shape)
        with torch.no_grad():
            states.write(function(piece) for piece in self.pieces())
        return states
