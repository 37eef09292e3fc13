"""Expanded attention over new tokens on Triton's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.triton import prefill_kernels as kernels
from latentkv.ops.triton.blocks import LEAST_BLOCK, SharedMemory, block_size, prefill_blocks, shared_memory_of
from latentkv.ops.triton.launch import Launch
from latentkv.ops.triton.numerics import DTYPES
from latentkv.ops.triton.ragged import most_tiles

_LOG2_E = 1.4426950408889634


def attend_new_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    shared: SharedMemory | None = None,
) -> Launch:
    """What fills out [T, H, Dv] and lse [T, H], see `prefill.mla_prefill`; shapes are checked.

    Args:
        q: [T, H, Dq]; its last dimension contiguous, like those of k, v and out.
        k: [S, H, Dq].
        v: [S, H, Dv].
        q_start: [B + 1] int32 on q's device.
        kv_start: likewise.
        out: where the output goes.
        lse: where the log-sum-exp goes.
        scale: softmax scale.
        causal: aligned to the end.
        shared: what a program may use; None: what this device gives.

    Raises:
        OpError: no block of these shapes fits into the GPU's shared memory.
    """
    rows, heads, dim = q.shape
    value_dim, batch = v.shape[2], q_start.shape[0] - 1
    compute = q.dtype if q.dtype == k.dtype == v.dtype else torch.float32
    first = max(LEAST_BLOCK, 1 << (dim.bit_length() - 1))
    rest = max(LEAST_BLOCK, block_size(max(0, dim - first)))
    width = first + rest, block_size(value_dim)
    blocks = prefill_blocks(width[0], width[1], compute, shared or shared_memory_of(q.device))
    return Launch(
        kernels.prefill_kernel,
        (most_tiles(rows, batch, blocks.rows), heads),
        (
            *(q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], q_start, kv_start, batch),
            *(out, *out.stride()[:2], lse, scale * _LOG2_E),
        ),
        {
            "HEADS": heads,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": first,
            "BLOCK_E": rest,
            "BLOCK_V": width[1],
            "BLOCK_M": blocks.rows,
            "BLOCK_N": blocks.tokens,
            "CAUSAL": causal,
            "COMPUTE": DTYPES[compute],
        },
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
