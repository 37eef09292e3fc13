"""Gated MLPs of packed weights on `csrc/moe.cpp`; None where torch is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for
from latentkv.ops.native.linear import format_code
from latentkv.ops.swiglu_limit import SwigluLimit
from latentkv.weights.layout import PackedWeight

X_DTYPES = (torch.bfloat16, torch.float32)
"""What the kernels multiply packed weights by."""


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    residual: Tensor | None,
    limit: SwigluLimit | None,
    num_zero_experts: int,
    out_dtype: torch.dtype,
) -> Tensor | None:
    """See `moe.moe_experts`; all shapes fit."""
    isa = isa_for(x, weights) if residual is None else isa_for(x, weights, residual)
    if isa is None or x.dtype not in X_DTYPES or out_dtype not in X_DTYPES or not expert_ids.is_cpu:
        return None
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    expert_ids, weights = expert_ids.to(torch.int64).contiguous(), weights.float().contiguous()
    tokens, dim = x.shape
    out = torch.empty((tokens, dim), dtype=out_dtype)
    bad = extension.moe_experts(
        isa,
        *_memory(gate_up),
        *_memory(down),
        gate_up.count,
        num_zero_experts,
        dim,
        down.in_features,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        tokens,
        expert_ids.data_ptr(),
        weights.data_ptr(),
        expert_ids.shape[1],
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        *_residual(residual),
        *_limit(limit),
    )
    if bad >= 0:
        raise_unknown_expert(int(expert_ids.view(-1)[bad]), gate_up.count + num_zero_experts)
    return out


def gated_mlp(
    x: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    residual: Tensor | None,
    limit: SwigluLimit | None,
    out_dtype: torch.dtype,
) -> Tensor | None:
    """See `moe.gated_mlp`, for x [T, D]; all shapes fit."""
    isa = isa_for(x) if residual is None else isa_for(x, residual)
    if isa is None or x.dtype not in X_DTYPES or out_dtype not in X_DTYPES:
        return None
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    tokens, dim = x.shape
    out = torch.empty((tokens, down.out_features), dtype=out_dtype)
    extension.gated_mlp(
        isa,
        *_memory(gate_up),
        *_memory(down),
        down.out_features,
        dim,
        down.in_features,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        tokens,
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        *_residual(residual),
        *_limit(limit),
    )
    return out


def raise_unknown_expert(expert: int, num_experts: int) -> None:
    """Say which expert there is not."""
    if expert < 0:
        raise OpError(f"expert_ids name expert {expert}; experts count from 0")
    raise OpError(f"expert_ids name expert {expert} of only {num_experts}")


def _memory(weight: PackedWeight) -> tuple[int, int, int]:
    return weight.data.data_ptr(), format_code(weight), weight.group


def _limit(limit: SwigluLimit | None) -> tuple[float, bool]:
    return (0.0, False) if limit is None else (limit.value, limit.bounds_gate)


def _residual(residual: Tensor | None) -> tuple[int, int]:
    return (0, 0) if residual is None else (residual.data_ptr(), DTYPE_CODES[residual.dtype])
