"""Lightning attention on `csrc/lightning.cpp`; None where torch is to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentkv.checks import as_int32
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for

if TYPE_CHECKING:
    from latentkv.ops.lightning import LightningState, LightningWeights


def lightning_attend(
    qkv: Tensor,
    output_gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: LightningWeights,
    state: LightningState,
    indices: tuple[Tensor, ...],
) -> tuple[Tensor, int] | None:
    """See `lightning.lightning_attend`, shapes fit. The result, and the first sequence whose numbers do not, or -1."""
    floats = cos, sin, weights.log_decay
    norms = weights.query_norm, weights.key_norm, weights.output_norm
    isa = isa_for(qkv, output_gate, *floats, *norms, *state)
    if isa is None or any(tensor.dtype is not torch.float32 for tensor in floats):
        return None
    if not all(tensor.is_contiguous() for tensor in (*floats, *norms)) or not all(t.is_cpu for t in indices):
        return None
    whole = [as_int32(tensor) for tensor in indices]
    numbers = [tensor for tensor in whole if tensor is not None]
    if len(numbers) < len(whole):
        return None
    rows = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (qkv, output_gate)]
    heads, dim = weights.log_decay.shape[0], weights.query_norm.shape[0]
    given = qkv.new_empty((qkv.shape[0], heads * dim), dtype=torch.float32)
    out = qkv.new_empty((qkv.shape[0], heads * dim))
    bad = extension.lightning_attend(
        isa,
        *(number for tensor in rows for number in (tensor.data_ptr(), tensor.stride(0))),
        DTYPE_CODES[qkv.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        weights.log_decay.data_ptr(),
        *(tensor.data_ptr() for tensor in norms),
        DTYPE_CODES[weights.query_norm.dtype],
        weights.norm_eps,
        weights.num_groups,
        *(tensor.data_ptr() for tensor in state),
        state.matrices.shape[0],
        state.waiting.shape[1],
        *(tensor.data_ptr() for tensor in numbers),
        numbers[2].shape[0],
        given.data_ptr(),
        out.data_ptr(),
        qkv.shape[0],
        heads,
        dim,
    )
    return out, bad
