"""`UnfusedTensors`: a model's tensors, one a projection, of files that stack several projections in one (Phi-3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from latentkv.checkpoint.tensors import Tensors
from latentkv.errors import CheckpointError
from latentkv.weights.weight import QuantizedWeight

Stack = Mapping[str, Mapping[str, int]]
"""{module whose weight is stacked: {module that it has the weight of: rows}}, top to bottom."""


def stacked(tensors: Iterable[tuple[str, Tensor]], stack: Stack) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a decoder's tensors as files have them whose projections are stacked; each stack once whole."""
    stack_of = {module: fused for fused, modules in stack.items() for module in modules}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        stem, dot, leaf = name.rpartition(".")
        module = next((module for module in stack_of if stem.endswith(f".{module}")), None)
        if module is None:
            yield name, tensor
            continue
        fused = stack_of[module]
        published = f"{stem.removesuffix(module)}{fused}{dot}{leaf}"
        parts = waiting.setdefault(published, {})
        parts[module] = tensor
        if len(parts) == len(stack[fused]):
            yield published, torch.cat([parts[each] for each in stack[fused]])
            del waiting[published]


@dataclass(frozen=True)
class _Rows:
    """Rows `begin` to `end` of a stored tensor."""

    stored: str
    begin: int
    end: int


class UnfusedTensors:
    """See `checkpoint.tensors.Tensors`: those of a model, stacked ones as what they are stacks of.

    Files that have the projections apart, as copies that were quantised here do, are read as they are.

    Args:
        base: the files' own.
        stack: what may be stacked.

    Attributes:
        folder: the model's.
        nests_text_model: as the model's.

    Raises:
        CheckpointError: a stacked tensor has another number of rows.
    """

    def __init__(self, base: Tensors, stack: Stack) -> None:
        self.folder: Path = base.folder
        self.nests_text_model: bool = base.nests_text_model
        self._base, self._stack = base, stack
        self._rows: dict[str, _Rows] = {}
        names: list[str] = []
        for name in base.names:
            parts = self._parts(name)
            self._rows |= parts
            names += parts or [name]
        self._names = tuple(names)

    def _parts(self, name: str) -> dict[str, _Rows]:
        """{name of a projection: its rows} of a stacked tensor; of another none."""
        stem, dot, leaf = name.rpartition(".")
        fused = next((module for module in self._stack if stem.endswith(f".{module}")), None)
        if fused is None:
            return {}
        found: dict[str, _Rows] = {}
        begin = 0
        for module, rows in self._stack[fused].items():
            found[f"{stem.removesuffix(fused)}{module}{dot}{leaf}"] = _Rows(name, begin, begin + rows)
            begin += rows
        stored = self._base.shape(name)
        if stored[:1] != (begin,):
            raise CheckpointError(
                f"{self.folder} does not fit its config.json: {name} has the shape {list(stored)}, and "
                f"{', '.join(self._stack[fused])} have {begin} rows together"
            )
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, projections apart."""
        return self._names

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's files."""
        return self._base.files

    @property
    def notes(self) -> tuple[str, ...]:
        """The files' notes."""
        return self._base.notes

    def __contains__(self, name: str) -> bool:
        return name in self._rows or (name in self._base and not self._parts(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        rows = self._rows.get(name)
        return self._base.shape(name) if rows is None else (rows.end - rows.begin, *self._base.shape(rows.stored)[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in."""
        return self._base.dtype(self._stored(name))

    def shown_dtype(self, name: str) -> str:
        """How a tensor is stored, for people."""
        return self._base.shown_dtype(self._stored(name))

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files, of a stacked one by its share of the rows."""
        rows = self._rows.get(name)
        if rows is None:
            return self._base.nbytes(name)
        whole = self._base.shape(rows.stored)[0]
        return self._base.nbytes(rows.stored) * rows.end // whole - self._base.nbytes(rows.stored) * rows.begin // whole

    def why_unreadable(self, name: str) -> str | None:
        """Why `read` cannot give a tensor's weights; None where it can."""
        return self._base.why_unreadable(self._stored(name))

    def is_quantized(self, name: str) -> bool:
        """Whether `quantized` gives a weight."""
        return self._base.is_quantized(self._stored(name))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, cast to `dtype`; None: as it is stored, float32 where it is quantised."""
        rows = self._rows.get(name)
        if rows is None:
            return self._base.read(name, dtype)
        part = self._base.read(rows.stored)[
            rows.begin : rows.end
        ]  # cast afterwards: of a mapped file only that is read
        return part if dtype is None else part.to(dtype)

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A weight's integers and scales as they are stored; None where it is stored in another way."""
        weight, rows = self._base.quantized(self._stored(name)), self._rows.get(name)
        if weight is None or rows is None:
            return weight
        own = slice(rows.begin, rows.end)
        minima = None if weight.minima is None else weight.minima[own]
        return replace(weight, codes=weight.codes[own], scales=weight.scales[own], minima=minima)

    def reopened(self) -> UnfusedTensors:
        """The same, of the files that have these names now."""
        return UnfusedTensors(self._base.reopened(), self._stack)

    def _stored(self, name: str) -> str:
        return self._rows[name].stored if name in self._rows else name
