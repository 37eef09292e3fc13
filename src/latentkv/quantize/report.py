"""What quantising did to a model: error and bytes by layer and kind of weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentkv.saved_values import as_saved
from latentkv.weights.weight import QuantizedWeight

_NUMBERS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class ReportRow:
    """All weights of one layer and kind that are stored in one format.

    Attributes:
        layer: None for weights outside the layers.
        kind: "attention", "routed experts", ...
        format: "int4, groups of 128", "int8, rows", "bfloat16", ...
        tensors, parameters: how many.
        bytes_before, bytes_after: in the files, scales included.
        squared_error: sum of (w - quantised w)^2; 0 where weights stay as they are.
        squared_norm: sum of w^2 of the quantised weights.
    """

    layer: int | None
    kind: str
    format: str
    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: int
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """||w - quantised w|| / ||w||."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits in the files, scales included."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a whole checkpoint, in rows that differ in layer, kind or format."""

    rows: tuple[ReportRow, ...]

    @classmethod
    def of(cls, rows: Iterable[ReportRow]) -> QuantizationReport:
        """Of rows in any order and of any fineness."""
        joined = _joined(rows, lambda row: (row.layer, row.kind, row.format))
        return cls(tuple(sorted(joined, key=lambda row: (row.layer is not None, row.layer or 0, row.kind, row.format))))

    @property
    def by_kind(self) -> tuple[ReportRow, ...]:
        """All layers together, by kind and format."""
        joined = _joined(self.rows, lambda row: (None, row.kind, row.format))
        return tuple(sorted(joined, key=lambda row: -row.bytes_before))

    @property
    def total(self) -> ReportRow:
        """Everything together; its relative error is that of the quantised weights."""
        return _joined(self.rows, lambda _: (None, "all", "all"))[0]

    @property
    def layer_errors(self) -> dict[int, dict[str, float]]:
        """Relative error of the quantised weights of each layer, by kind."""
        errors: dict[int, dict[str, float]] = {}
        for row in _joined((row for row in self.rows if row.squared_norm), lambda row: (row.layer, row.kind, "")):
            if row.layer is not None:
                errors.setdefault(row.layer, {})[row.kind] = row.relative_error
        return dict(sorted(errors.items()))

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "total": _row_as_json(self.total),
            "by_kind": [_row_as_json(row) for row in self.by_kind],
            "by_layer": [_row_as_json(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> QuantizationReport:
        """Of what `as_json` gave; a `ValueError` or `KeyError` names what it cannot be."""
        fields = ReportRow.__dataclass_fields__
        report = as_saved(cls, {"rows": [{key: row[key] for key in fields} for row in content["by_layer"]]})
        if not report.rows:
            raise ValueError("it has no rows")
        return report


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Sums of (w - quantised w)^2 and of w^2 over a weight [O, D], a few rows at a time."""
    error = norm = 0.0
    step = max(1, _NUMBERS_AT_A_TIME // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = replace(quantized, codes=quantized.codes[rows], scales=quantized.scales[rows])
        exact = weight[rows].float()
        norm += torch.linalg.vector_norm(exact).item() ** 2
        error += torch.linalg.vector_norm(part.dequantize().sub_(exact)).item() ** 2
    return error, norm


def _row_as_json(row: ReportRow) -> dict[str, Any]:
    return asdict(row) | {"relative_error": row.relative_error, "bits_per_weight": row.bits_per_weight}


def _joined(rows: Iterable[ReportRow], key: Callable[[ReportRow], tuple[int | None, str, str]]) -> list[ReportRow]:
    groups: dict[tuple[int | None, str, str], list[ReportRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [
        ReportRow(
            *named,
            tensors=sum(row.tensors for row in group),
            parameters=sum(row.parameters for row in group),
            bytes_before=sum(row.bytes_before for row in group),
            bytes_after=sum(row.bytes_after for row in group),
            squared_error=math.fsum(row.squared_error for row in group),
            squared_norm=math.fsum(row.squared_norm for row in group),
        )
        for named, group in groups.items()
    ]
