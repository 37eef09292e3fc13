"""`Tensors`: what a model's files hold, whatever kind of files they are."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from latentkv.checkpoint.gguf.tensors import GGUFTensors, is_gguf
from latentkv.checkpoint.reader import CheckpointReader
from latentkv.weights.weight import QuantizedWeight


class Tensors(Protocol):
    """The tensors of a model by the names that they were published under, read one by one.

    Attributes:
        folder: where they lie, for errors.
        nests_text_model: the model's config describes the text model inside a larger one.
    """

    folder: Path
    nests_text_model: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order in which they are read best."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the files is not honoured, or not kept as it is; a sentence each."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in; of quantised weights one that models run in."""
        ...

    def shown_dtype(self, name: str) -> str:
        """How a tensor is stored, for people."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files."""
        ...

    def why_unreadable(self, name: str) -> str | None:
        """Why `read` cannot give a tensor's weights; None where it can."""
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether `quantized` gives a weight."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, cast to `dtype`; None: as it is stored, float32 where it is quantised."""
        ...

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A weight's integers and scales as they are stored; None where it is stored in another way."""
        ...

    def reopened(self) -> Tensors:
        """The same, of the files that have these names now."""
        ...


def open_tensors(path: Path) -> Tensors:
    """The tensors of a model that `checkpoint.source.resolve_model` found; headers alone are read.

    Raises:
        CheckpointError: they are missing, damaged, or of a kind that is not read.
    """
    return GGUFTensors(path) if is_gguf(path) else CheckpointReader(path)
