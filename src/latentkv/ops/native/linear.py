"""Products with packed weights: `csrc/linear.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentkv.kernels import DTYPE_CODES, extension
from latentkv.weights.formats import KERNEL_NUMBERS
from latentkv.weights.layout import PackedWeight

_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_FORMATS, _KINDS_OF_SCALES = 16, 4


def format_code(weight: PackedWeight) -> int:
    """How a weight is packed, as `csrc/linear.h` numbers it."""
    kind = _SCALES.index(weight.scales) + _KINDS_OF_SCALES * weight.rounds_input
    return KERNEL_NUMBERS[weight.format] + _FORMATS * kind


def linear(
    isa: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x W^T + bias + residual`, see `ops.linear.linear`."""
    out_features = weight.out_features
    x, x_stride = _rows(x)
    bias = None if bias is None else bias.contiguous()
    residual, residual_stride = (None, 0) if residual is None else _rows(residual)
    out = torch.empty(*x.shape[:-1], out_features, dtype=out_dtype)
    extension.linear(
        isa,
        weight.data.data_ptr(),
        format_code(weight),
        out_features,
        weight.in_features,
        weight.group,
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        out.numel() // out_features,
        x_stride,
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else DTYPE_CODES[residual.dtype],
        residual_stride,
    )
    return out


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are each contiguous and a fixed number of elements apart, and that number."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    x = x.contiguous()
    return x, x.shape[-1]
