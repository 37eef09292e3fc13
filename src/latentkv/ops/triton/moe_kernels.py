"""Products of each expert with its own tokens (grouped GEMM), the tokens in the order of their experts."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.triton.numerics import operand, rounded
from latentkv.ops.triton.ragged import tile_of


@triton.jit
def gate_up_kernel(
    x,
    x_row,
    order,
    expert_start,
    gate_up,
    inner,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIM: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`silu(gate x) * up x` of BLOCK_M choices of one expert and BLOCK_N of its inner numbers."""
    expert, first = tile_of(expert_start, tl.full((), EXPERTS, tl.int32), tl.program_id(0), BLOCK_M)
    begin, end = tl.load(expert_start + expert), tl.load(expert_start + expert + 1)
    if begin + first < end:
        place = begin + first + tl.arange(0, BLOCK_M)
        known = place < end
        token = tl.load(order + place, mask=known, other=0).to(tl.int64) // CHOSEN
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = gate_up + expert.to(tl.int64) * (2 * INNER * DIM) + columns[None, :] * DIM
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DIM, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            own_x = tl.load(
                x + token[:, None] * x_row + depth[None, :], mask=known[:, None] & (depth < DIM)[None, :], other=0.0
            )
            left = operand(own_x, COMPUTE)
            inside = (columns < INNER)[None, :] & (depth < DIM)[:, None]
            right = operand(tl.load(weight + depth[:, None], mask=inside, other=0.0), COMPUTE)
            gate = tl.dot(left, right, gate, input_precision="ieee")
            right = operand(tl.load(weight + INNER * DIM + depth[:, None], mask=inside, other=0.0), COMPUTE)
            up = tl.dot(left, right, up, input_precision="ieee")
        values = gate / (1.0 + tl.exp(-gate)) * up
        at = place.to(tl.int64)[:, None] * INNER + columns[None, :]
        tl.store(inner + at, rounded(values, inner.dtype.element_ty), mask=known[:, None] & (columns < INNER)[None, :])


@triton.jit
def down_kernel(
    inner,
    order,
    expert_start,
    down,
    weights,
    out,
    EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`weight * down inner` of BLOCK_M choices of one expert and BLOCK_N outputs, put back in the order of choices."""
    expert, first = tile_of(expert_start, tl.full((), EXPERTS, tl.int32), tl.program_id(0), BLOCK_M)
    begin, end = tl.load(expert_start + expert), tl.load(expert_start + expert + 1)
    if begin + first < end:
        place = begin + first + tl.arange(0, BLOCK_M)
        known = place < end
        choice = tl.load(order + place, mask=known, other=0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = down + expert.to(tl.int64) * (DIM * INNER) + columns[None, :] * INNER
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, INNER, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            at = place.to(tl.int64)[:, None] * INNER + depth[None, :]
            left = operand(tl.load(inner + at, mask=known[:, None] & (depth < INNER)[None, :], other=0.0), COMPUTE)
            inside = (columns < DIM)[None, :] & (depth < INNER)[:, None]
            right = operand(tl.load(weight + depth[:, None], mask=inside, other=0.0), COMPUTE)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        scale = tl.load(weights + choice, mask=known, other=0.0).to(tl.float32)
        at = choice[:, None] * DIM + columns[None, :]
        tl.store(out + at, acc * scale[:, None], mask=known[:, None] & (columns < DIM)[None, :])


@triton.jit
def add_choices_kernel(
    parts,
    x,
    x_row,
    expert_ids,
    weights,
    residual,
    out,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ZERO_EXPERTS: tl.constexpr,
):
    """BLOCK numbers of one token: its choices in their order (of zero experts: the token), then the residual."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < DIM
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, CHOSEN):
        choice = token * CHOSEN + k
        computes = True
        if HAS_ZERO_EXPERTS:
            computes = tl.load(expert_ids + choice) < EXPERTS
        if computes:
            total += tl.load(parts + choice * DIM + columns, mask=known, other=0.0)
        else:
            own_x = tl.load(x + token * x_row + columns, mask=known, other=0.0).to(tl.float32)
            total += own_x * tl.load(weights + choice).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * DIM + columns, mask=known, other=0.0).to(tl.float32)
    tl.store(out + token * DIM + columns, rounded(total, out.dtype.element_ty), mask=known)
