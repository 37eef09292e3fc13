"""Weights -> a GGUF type's blocks: the types that are written, and how rows become bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentkv.checks import require
from latentkv.weights.gguf.k_encoding import to_q4_k, to_q6_k
from latentkv.weights.gguf.simple_encoding import to_mxfp4, to_q4_0, to_q5_0, to_q8_0
from latentkv.weights.gguf.types import TYPES, TensorType

_CHUNK_WEIGHTS = 1 << 17

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ENCODERS: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "Q8_0": to_q8_0,
    "Q4_0": to_q4_0,
    "Q5_0": to_q5_0,
    "Q4_K": to_q4_k,
    "Q6_K": to_q6_k,
    "MXFP4": to_mxfp4,
}
WRITTEN: Mapping[str, TensorType] = {
    kind.name: kind for kind in TYPES.values() if kind.name in _PLAIN or kind.name in _ENCODERS
}
"""The types that `encode` makes, by name."""


def encode(weights: Tensor, kind: TensorType, importance: Tensor | None = None) -> Tensor:
    """Rows of weights as blocks of a type, whose scales leave the least squared error of those tried.

    `types.dequantize` gives back what they stand for. Temporaries are those of about a hundred thousand weights.

    Args:
        weights: [R, D] of any float dtype, finite; D a multiple of the type's block.
        kind: one of `WRITTEN`.
        importance: what the squared error of each column counts, [D], at least 0; None: all the same. Plain types
            round each number by itself.

    Returns:
        uint8 [R, bytes of a row].

    Raises:
        OpError: NaN, infinite, or too large for the type; or the shapes do not fit.
    """
    require(
        kind.name in WRITTEN and weights.ndim == 2 and weights.shape[1] % kind.weights == 0,
        f"rows of {kind.name} take [rows, a multiple of {kind.weights}], not {list(weights.shape)}",
    )
    require(
        importance is None or tuple(importance.shape) == (weights.shape[1],),
        f"importance is one number a column, [{weights.shape[1]}]",
    )
    if kind.name in _PLAIN:
        plain = weights.to(_PLAIN[kind.name]).contiguous()
        _require_finite(bool(torch.isfinite(plain).all()), kind)
        return plain.view(torch.uint8).view(len(weights), -1)
    encoder, row_bytes = _ENCODERS[kind.name], weights.shape[1] // kind.weights * kind.nbytes
    found = torch.empty(len(weights), row_bytes, dtype=torch.uint8)
    columns = None if importance is None else importance.float().view(-1, kind.weights)
    step = max(1, _CHUNK_WEIGHTS // weights.shape[1])
    largest = 65504.0 if kind.name != "MXFP4" else torch.finfo(torch.float32).max
    for start in range(0, len(weights), step):
        rows = weights[start : start + step].float()
        # A block's scale is float16, and one of its weights has the magnitude of several of it.
        _require_finite(bool((rows.abs() <= largest).all()), kind)
        counted = None if columns is None else columns.repeat(len(rows), 1)
        found[start : start + step] = encoder(rows.reshape(-1, kind.weights), counted).view(len(rows), -1)
    return found


def _require_finite(is_finite: bool, kind: TensorType) -> None:
    require(is_finite, f"the weight holds NaN or infinite values, or some too large for {kind.name}")
