"""Kimi Delta Attention on `csrc/kda.cpp`; None where torch is to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentkv.checks import as_int32
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for

if TYPE_CHECKING:
    from latentkv.ops.kda import KDAState, KDAWeights


def kda_attend(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    weights: KDAWeights,
    state: KDAState,
    indices: tuple[Tensor, ...],
) -> tuple[Tensor, int] | None:
    """See `kda.kda_attend`; all shapes fit. The result, and the first sequence whose numbers do not, or -1."""
    floats = weights.taps, weights.log_rate, weights.gate_bias
    isa = isa_for(qkv, gate, beta, output_gate, weights.norm, *floats, *state)
    if isa is None or any(tensor.dtype is not torch.float32 or not tensor.is_contiguous() for tensor in floats):
        return None
    if not weights.norm.is_contiguous() or not all(tensor.is_cpu for tensor in indices):
        return None
    whole = [as_int32(tensor) for tensor in indices]
    if any(tensor is None for tensor in whole):
        return None
    numbers = [tensor for tensor in whole if tensor is not None]
    rows = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (qkv, gate, beta, output_gate)]
    heads, dim = weights.log_rate.shape[0], weights.norm.shape[0]
    out = qkv.new_empty((qkv.shape[0], heads * dim))
    bad = extension.kda_attend(
        isa,
        *(number for tensor in rows for number in (tensor.data_ptr(), tensor.stride(0))),
        DTYPE_CODES[qkv.dtype],
        *(tensor.data_ptr() for tensor in floats),
        weights.norm.data_ptr(),
        DTYPE_CODES[weights.norm.dtype],
        weights.norm_eps,
        weights.lower_bound is not None,
        weights.lower_bound or 0.0,
        *(tensor.data_ptr() for tensor in state),
        state.matrices.shape[0],
        state.pending_qkv.shape[1],
        *(tensor.data_ptr() for tensor in numbers),
        numbers[2].shape[0],
        out.data_ptr(),
        qkv.shape[0],
        heads,
        dim,
    )
    return out, bad
