"""RMS norm, rotary embedding, gated activation: the C++ kernels, or None where torch is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.native.core import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for

MAX_ROW = 4096
"""Numbers of a rotated or cached row at most, as in `csrc/elementwise.h`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See `basic.rms_norm`; x [..., D] contiguous, or [T, D] with rows at any distance."""
    isa = isa_for(x, weight)
    dim = x.shape[-1]
    if isa is None or dim == 0 or not weight.is_contiguous():
        return None
    if x.is_contiguous():
        stride, out = dim, torch.empty_like(x)
    elif x.ndim == 2 and x.stride(1) == 1:
        stride, out = x.stride(0), x.new_empty(x.shape)
    else:
        return None
    dtypes = DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype]
    tokens = x.numel() // dim
    extension.rms_norm(
        isa, x.data_ptr(), stride, dtypes[0], weight.data_ptr(), dtypes[1], eps, out.data_ptr(), tokens, dim
    )
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, out: Tensor | None) -> Tensor | None:
    """See `basic.apply_rope`; x and out [T, R] or [T, H, R] with whole rows, angles of one each for a token."""
    isa = isa_for(x, cos, sin)
    shape = x.shape
    if isa is None or cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return None
    if not (len(shape) in (2, 3) and 0 < shape[-1] <= MAX_ROW and cos.is_contiguous() and sin.is_contiguous()):
        return None
    if cos.shape[0] != shape[0] or cos.ndim != len(shape) or (cos.ndim == 3 and cos.shape[1] != 1):
        return None
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    elif isa_for(out) is None or out.dtype is not x.dtype:
        return None
    x_strides, out_strides = x.stride(), out.stride()
    if x_strides[-1] != 1 or out_strides[-1] != 1:
        return None
    heads = 1 if len(shape) == 2 else shape[1]
    extension.rope(
        isa,
        x.data_ptr(),
        x_strides[0],
        x_strides[-2],
        DTYPE_CODES[x.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
        out.data_ptr(),
        out_strides[0],
        out_strides[-2],
        shape[0],
        heads,
        shape[-1] // 2,
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor | None:
    """See `basic.silu_mul`; gate_up [..., 2I] contiguous."""
    isa = isa_for(gate_up)
    if isa is None or not gate_up.is_contiguous():
        return None
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], inner))
    tokens = out.numel() // inner if inner else 0
    extension.silu_mul(isa, gate_up.data_ptr(), 2 * inner, DTYPE_CODES[gate_up.dtype], out.data_ptr(), tokens, inner)
    return out
