"""Products with packed weights: `csrc/linear.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentkv.ops.native.core import DTYPE_CODES, extension
from latentkv.ops.packed import PackedWeight

FORMAT_CODES = {"bf16": 0, "int8": 1, "int4": 2}
"""Weight formats as `csrc/linear.h` numbers them."""


def linear(
    isa: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x W^T + bias + residual` for x [rows, D] (rows may be strided), residual [rows, O]."""
    out_features = weight.out_features
    out = torch.empty((x.shape[0], out_features), dtype=out_dtype)
    extension.linear(
        isa,
        weight.data.data_ptr(),
        FORMAT_CODES[weight.format],
        out_features,
        weight.in_features,
        weight.group,
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[0],
        x.stride(0),
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else DTYPE_CODES[residual.dtype],
        0 if residual is None else residual.stride(0),
    )
    return out
