"""Rounding inside kernels. Triton's interpreter has no bf16 arithmetic: it is emulated there, in float32."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Element types as kernels name them."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter (of triton 3.9) multiplies the bits of bf16 as integers, and cuts where it should round."""


@triton.jit
def operand(x, dtype: tl.constexpr):
    """`x` as a matrix product takes it: in `dtype`, or where bf16 is emulated in float32 with the same values."""
    return rounded(x, dtype) if INTERPRETED and dtype == tl.bfloat16 else x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in float32, rounded to `dtype`, to the nearest and to even where two are as near."""
    wide = x.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(wide == wide, nearest.to(tl.float32, bitcast=True), wide)
    else:
        values = wide.to(dtype).to(tl.float32)
    return values
