"""Products of single heads with packed weights on `csrc/headwise.cpp`; None where torch is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for
from latentkv.ops.native.linear import format_code
from latentkv.ops.native.moe import X_DTYPES
from latentkv.weights.layout import PackedWeight


def headwise_linear(x: Tensor, weight: PackedWeight, out: Tensor | None) -> Tensor | None:
    """See `headwise.headwise_linear`; all shapes fit."""
    isa = isa_for(x) if out is None else isa_for(x, out)
    if isa is None or x.dtype not in X_DTYPES:
        return None
    tokens, heads, _ = x.shape
    if out is None:
        out = torch.empty((tokens, heads, weight.out_features), dtype=x.dtype)
    x_strides, out_strides = x.stride(), out.stride()
    if x_strides[2] != 1 or out_strides[2] != 1:
        return None
    extension.headwise_linear(
        isa,
        weight.data.data_ptr(),
        format_code(weight),
        heads,
        weight.out_features,
        weight.in_features,
        weight.group,
        x.data_ptr(),
        x_strides[0],
        x_strides[1],
        DTYPE_CODES[x.dtype],
        out.data_ptr(),
        out_strides[0],
        out_strides[1],
        DTYPE_CODES[out.dtype],
        tokens,
    )
    return out
