"""RMS norm, rotary embedding and the merging of partial attention."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.triton.numerics import rounded


@triton.jit
def normed(x, weight, eps, DIM: tl.constexpr):
    """`weight * x / sqrt(mean(x^2) + eps)` in float32, rounded to x's type before and after the weight."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    return rounded(rounded(wide * scale, x.dtype) * weight.to(tl.float32), x.dtype)


@triton.jit
def rms_norm_kernel(x, x_row, weight, eps, out, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    known = columns < DIM
    values = tl.load(x + row * x_row + columns, mask=known, other=0.0)
    result = normed(values, tl.load(weight + columns, mask=known, other=0.0), eps, DIM)
    tl.store(out + row * DIM + columns, result, mask=known)


@triton.jit
def rope_kernel(
    x,
    x_row,
    x_head,
    cos,
    sin,
    out,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One program a token and BLOCK_H of its heads. A thread reads both numbers of a pair, so `out` may be `x`."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else first + HALF
    known = (pair < HALF) & (heads < HEADS)
    own = x + row * x_row + heads * x_head
    a = tl.load(own + first, mask=known, other=0.0)
    b = tl.load(own + second, mask=known, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + pair, mask=pair < HALF, other=0.0)
    s = tl.load(sin + row * HALF + pair, mask=pair < HALF, other=0.0)
    own_out = out + row * out_row + heads * out_head
    wide = a.to(tl.float32)
    tl.store(own_out + first, rounded(wide * c - b * s, a.dtype), mask=known)
    tl.store(own_out + second, rounded(b * c + wide * s, a.dtype), mask=known)


@triton.jit(do_not_specialize=["rows"])
def merge_states_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """BLOCK_ROWS outputs a program, all contiguous."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    first = tl.load(lse_a + row, mask=row < rows, other=float("-inf")).to(tl.float32)
    second = tl.load(lse_b + row, mask=row < rows, other=float("-inf")).to(tl.float32)
    peak = tl.maximum(first, second)
    finite_peak = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf would be NaN
    weight_a, weight_b = tl.exp(first - finite_peak), tl.exp(second - finite_peak)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    at = row.to(tl.int64)[:, None] * DIM + columns
    known = (row < rows)[:, None] & (columns < DIM)
    a = tl.load(out_a + at, mask=known, other=0.0).to(tl.float32)
    b = tl.load(out_b + at, mask=known, other=0.0).to(tl.float32)
    tl.store(out + at, a * (weight_a / divisor)[:, None] + b * (weight_b / divisor)[:, None], mask=known)
    tl.store(lse + row, finite_peak + tl.log(total), mask=row < rows)
