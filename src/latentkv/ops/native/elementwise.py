"""RMS norm, rotary embedding, gated activation: the C++ kernels, or None where torch is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for

MAX_ROW = 16384
"""Numbers of a rotated or cached row at most, as in `csrc/elementwise.h`."""

_LARGEST_RANK = 1024  # csrc/elementwise.h


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See `elementwise.rms_norm`; x [..., D] contiguous, or [T, D] with rows at any distance."""
    isa = isa_for(x, weight)
    if isa is None or x.ndim == 0:
        return None
    dim = stride = x.shape[-1]
    if dim == 0 or weight.shape != (dim,) or not weight.is_contiguous():
        return None
    if x.is_contiguous():
        out = torch.empty_like(x)
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
    """See `elementwise.apply_rope`; x and out [T, R] or [T, H, R] with whole rows, angles of one each for a token."""
    isa = isa_for(x, cos, sin) if out is None else isa_for(x, cos, sin, out)
    if isa is None:
        return None
    shape = x.shape
    if len(shape) == 3:
        tokens, heads, dim = shape
        angles = (tokens, 1, dim // 2)
    elif len(shape) == 2:
        (tokens, dim), heads = shape, 1
        angles = (tokens, dim // 2)
    else:
        return None
    if (
        dim % 2
        or not 0 < dim <= MAX_ROW
        or cos.shape != angles
        or sin.shape != angles
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    elif out.dtype is not x.dtype or out.shape != shape:
        return None
    strides, out_strides = x.stride(), out.stride()
    if strides[-1] != 1 or out_strides[-1] != 1:
        return None
    extension.rope(
        isa,
        x.data_ptr(),
        strides[0],
        strides[-2],
        DTYPE_CODES[x.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
        out.data_ptr(),
        out_strides[0],
        out_strides[-2],
        tokens,
        heads,
        dim // 2,
    )
    return out


def gate_heads(x: Tensor, gate: Tensor) -> Tensor | None:
    """See `elementwise.gate_heads`; x [T, H, D] with whole heads, all shapes fit. It is changed in place."""
    isa = isa_for(x, gate)
    if isa is None or x.ndim != 3 or x.stride(2) != 1 or gate.stride(-1) != 1:
        return None
    tokens, heads, dim = x.shape
    each = gate.ndim == 3 or gate.shape[1] != heads
    gate_head = gate.stride(1) if gate.ndim == 3 else dim if each else 1
    places = x.data_ptr(), x.stride(0), x.stride(1), DTYPE_CODES[x.dtype], gate.data_ptr(), gate.stride(0), gate_head
    extension.gate_heads(isa, *places, DTYPE_CODES[gate.dtype], each, tokens, heads, dim)
    return x


def norm_beside(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See `elementwise.norm_beside`; x [T, D]."""
    isa = isa_for(x, weight)
    if isa is None or x.ndim != 2 or x.stride(1) != 1 or weight.shape != x.shape[1:] or not weight.is_contiguous():
        return None
    tokens, dim = x.shape
    out = x.new_empty((tokens, 2 * dim))
    dtypes = DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype]
    extension.norm_beside(
        isa, x.data_ptr(), x.stride(0), dtypes[0], weight.data_ptr(), dtypes[1], eps, out.data_ptr(), tokens, dim
    )
    return out


def gated_rms_norm(x: Tensor, weight: Tensor, eps: float, down: Tensor, up: Tensor) -> Tensor | None:
    """See `elementwise.gated_rms_norm`; x [T, D], the weights of one dtype."""
    weights = weight, down, up
    isa = isa_for(x, *weights)
    if isa is None or x.ndim != 2 or x.stride(1) != 1 or not all(t.is_contiguous() for t in weights):
        return None
    (tokens, dim), rank = x.shape, down.shape[0]
    if rank > _LARGEST_RANK or len({t.dtype for t in weights}) != 1:
        return None
    out = x.new_empty((tokens, dim))
    places = [t.data_ptr() for t in weights]
    extension.gated_rms_norm(
        isa,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        *places,
        DTYPE_CODES[weight.dtype],
        eps,
        rank,
        out.data_ptr(),
        tokens,
        dim,
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor | None:
    """See `elementwise.silu_mul`; gate_up [..., 2I] contiguous."""
    isa = isa_for(gate_up)
    if isa is None or not gate_up.is_contiguous():
        return None
    *rows, width = gate_up.shape
    if width % 2:
        return None
    inner = width // 2
    out = gate_up.new_empty((*rows, inner))
    tokens = out.numel() // inner if inner else 0
    extension.silu_mul(isa, gate_up.data_ptr(), width, DTYPE_CODES[gate_up.dtype], out.data_ptr(), tokens, inner)
    return out
