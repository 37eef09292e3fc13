"""The experts that a router chose, on Triton's kernels: three launches for all experts, none waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.triton import moe_kernels as kernels
from latentkv.ops.triton.blocks import LEAST_BLOCK, TileBlocks
from latentkv.ops.triton.elementwise import power_of_two
from latentkv.ops.triton.launch import Launch
from latentkv.ops.triton.numerics import DTYPES
from latentkv.ops.triton.ragged import most_tiles

_DEPTH = 32
_ADDED_NUMBERS = 1024


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    num_zero_experts: int = 0,
) -> list[Launch]:
    """What fills out [T, D], to be run in order; see `moe.moe_experts`. Shapes are checked, expert ids are not.

    The inner numbers are rounded to x's type, sums are taken in float32. Everything but x is contiguous.
    """
    tokens, dim = x.shape
    chosen, experts, inner_dim = expert_ids.shape[1], down.shape[0], down.shape[2]
    choices = tokens * chosen
    # Clamped first: an id beyond int32 must not become one that there is.
    sorted_ids, order = torch.sort(
        expert_ids.reshape(-1).to(torch.int64).clamp(-1, experts).to(torch.int32), stable=True
    )
    numbers = torch.arange(experts + 1, dtype=torch.int32, device=x.device)
    expert_start = torch.searchsorted(sorted_ids, numbers, out_int32=True)
    inner = torch.empty(choices, inner_dim, dtype=x.dtype, device=x.device)
    parts = torch.empty(choices, dim, dtype=torch.float32, device=x.device)
    blocks = moe_blocks(choices, experts)
    tiles = most_tiles(choices, experts, blocks.rows)
    sizes = {"EXPERTS": experts, "DIM": dim, "INNER": inner_dim, "COMPUTE": DTYPES[x.dtype]}
    block = {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.tokens, "BLOCK_K": _DEPTH}
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    added = min(_ADDED_NUMBERS, power_of_two(dim))
    return [
        Launch(
            kernels.gate_up_kernel,
            (tiles, -(-inner_dim // blocks.tokens)),
            (x, x.stride(0), order, expert_start, gate_up, inner),
            {**sizes, **block, "CHOSEN": chosen},
            **options,
        ),
        Launch(
            kernels.down_kernel,
            (tiles, -(-dim // blocks.tokens)),
            (inner, order, expert_start, down, weights, parts),
            {**sizes, **block},
            **options,
        ),
        Launch(
            kernels.add_choices_kernel,
            (tokens, -(-dim // added)),
            (parts, x, x.stride(0), expert_ids.contiguous(), weights, out if residual is None else residual, out),
            {
                "EXPERTS": experts,
                "CHOSEN": chosen,
                "DIM": dim,
                "BLOCK": added,
                "HAS_RESIDUAL": residual is not None,
                "HAS_ZERO_EXPERTS": num_zero_experts > 0,
            },
        ),
    ]


def moe_blocks(choices: int, experts: int) -> TileBlocks:
    """As many rows as an expert has tokens on average; 32 KiB of shared memory in bf16, 64 in float32."""
    rows = min(64, max(LEAST_BLOCK, power_of_two(choices // experts)))
    return TileBlocks(rows, tokens=64, num_warps=4, num_stages=2)
