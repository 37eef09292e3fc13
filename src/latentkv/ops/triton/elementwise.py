"""Row by row on Triton's kernels: each function gives the launch that fills `out`."""

from __future__ import annotations

from torch import Tensor

from latentkv.ops.triton import elementwise_kernels as kernels
from latentkv.ops.triton.launch import Launch

_BLOCK_NUMBERS = 4096
"""Numbers that a program holds, where it may choose."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """See `elementwise.rms_norm`: x [T, D] with rows at any distance, out [T, D] contiguous."""
    rows, dim = x.shape
    block = power_of_two(dim)
    constants = {"DIM": dim, "BLOCK": block}
    return Launch(
        kernels.rms_norm_kernel, (rows,), (x, x.stride(0), weight, eps, out), constants, num_warps=warps_for(block)
    )


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, interleaved: bool) -> Launch:
    """See `elementwise.apply_rope`: x and out [T, H, R] with whole rows, cos and sin contiguous [T, ..., R / 2]."""
    rows, heads, width = x.shape
    block = power_of_two(width // 2)
    block_heads = min(power_of_two(heads), max(1, _BLOCK_NUMBERS // block))
    strides, out_strides = x.stride()[:2], out.stride()[:2]
    return Launch(
        kernels.rope_kernel,
        (rows, -(-heads // block_heads)),
        (x, *strides, cos, sin, out, *out_strides),
        {
            "HEADS": heads,
            "HALF": width // 2,
            "BLOCK_H": block_heads,
            "BLOCK": block,
            "INTERLEAVED": interleaved,
        },
    )


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """See `states.merge_states`: all contiguous, outputs [..., D]."""
    rows, dim = lse.numel(), out.shape[-1]
    block = power_of_two(dim)
    block_rows = max(1, _BLOCK_NUMBERS // block)
    return Launch(
        kernels.merge_states_kernel,
        (-(-rows // block_rows),),
        (out_a, lse_a, out_b, lse_b, out, lse, rows),
        {"DIM": dim, "BLOCK": block, "BLOCK_ROWS": block_rows},
    )


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << max(0, size - 1).bit_length()


def warps_for(block: int) -> int:
    """Warps of a program that holds a vector of so many numbers."""
    return min(16, max(1, block // 512))
