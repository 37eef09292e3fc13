"""The choice of experts on `csrc/router.cpp`; None where torch is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.kernels import extension
from latentkv.ops.native.eligible import isa_for


def select_experts(
    logits: Tensor,
    chosen: int,
    softmax: bool,
    bias: Tensor | None,
    groups: int,
    kept_groups: int,
    excluded: float,
    group_max: bool,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor] | None:
    """See `routing.select_experts`; groups 0: none."""
    isa = isa_for(logits) if bias is None else isa_for(logits, bias)
    if isa is None or logits.dtype is not torch.float32 or not logits.is_contiguous():
        return None
    if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
        return None
    tokens, experts = logits.shape
    ids = torch.empty((tokens, chosen), dtype=torch.int64)
    weights = torch.empty((tokens, chosen), dtype=torch.float32)
    extension.select_experts(
        logits.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        tokens,
        experts,
        chosen,
        softmax,
        groups,
        kept_groups,
        excluded,
        group_max,
        normalize,
        scaling,
        ids.data_ptr(),
        weights.data_ptr(),
    )
    return ids, weights
