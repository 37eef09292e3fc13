"""Ordinary attention over ragged new tokens, one program a tile of rows of one sequence and head."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.triton.numerics import operand, rounded
from latentkv.ops.triton.ragged import tile_of

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["batch"])
def prefill_kernel(
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    q_start,
    kv_start,
    batch,
    out,
    out_row,
    out_head,
    lse,
    score_scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Keys are read as their first BLOCK_D numbers and BLOCK_E further ones: 192 is 128 + 64, not 256."""
    head = tl.program_id(1)
    b, first = tile_of(q_start, batch, tl.program_id(0), BLOCK_M)
    first_row, first_key = tl.load(q_start + b), tl.load(kv_start + b)
    num_rows, num_keys = tl.load(q_start + b + 1) - first_row, tl.load(kv_start + b + 1) - first_key
    if first < num_rows:
        local = first + tl.arange(0, BLOCK_M)
        valid = local < num_rows
        # Causal is aligned to the end: the last row reads every key, the one before all but the last.
        stop = tl.where(valid, num_keys, 0)
        if CAUSAL:
            stop = tl.where(valid, tl.maximum(num_keys - num_rows + 1 + local, 0), 0)
        rows = (first_row + local).to(tl.int64)
        own_q = q + rows[:, None] * q_row + head * q_head
        d, e, c = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
        q_d = operand(tl.load(own_q + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0), COMPUTE)
        q_e = operand(tl.load(own_q + e[None, :], mask=valid[:, None] & (e < DIM)[None, :], other=0.0), COMPUTE)
        own_k = k + first_key.to(tl.int64) * k_row + head * k_head
        own_v = v + first_key.to(tl.int64) * v_row + head * v_head
        end = tl.max(stop, 0)
        common_end = tl.min(tl.where(valid, stop, end), 0) // BLOCK_N * BLOCK_N
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total_weight = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        acc, peak, total_weight = _attend_keys(
            acc, peak, total_weight, q_d, q_e, own_k, k_row, own_v, v_row, d, e, c, 0, common_end, stop, score_scale,
            DIM, VALUE_DIM, BLOCK_N, False, COMPUTE,
        )  # fmt: skip
        acc, peak, total_weight = _attend_keys(
            acc, peak, total_weight, q_d, q_e, own_k, k_row, own_v, v_row, d, e, c, common_end, end, stop, score_scale,
            DIM, VALUE_DIM, BLOCK_N, True, COMPUTE,
        )  # fmt: skip
        empty = stop <= 0
        acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total_weight)[:, None])
        own_lse = tl.where(empty, float("-inf"), (peak + tl.log2(total_weight)) * LN_2)
        tl.store(lse + rows * HEADS + head, own_lse, mask=valid)
        own_out = out + rows[:, None] * out_row + head * out_head + c[None, :]
        tl.store(own_out, rounded(acc, out.dtype.element_ty), mask=valid[:, None] & (c < VALUE_DIM)[None, :])


@triton.jit
def _attend_keys(
    acc,
    peak,
    total_weight,
    q_d,
    q_e,
    k,
    k_row,
    v,
    v_row,
    d,
    e,
    c,
    begin,
    end,
    stop,
    score_scale,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Online softmax over keys begin .. end - 1; not MASKED: every row reads all of them, whole blocks."""
    # Counted from 0: with another lower bound Triton (3.9) does not see that rows are aligned, and reads word by word.
    for block in range(0, (end - begin + BLOCK_N - 1) // BLOCK_N):
        first = begin + block * BLOCK_N
        keys = first + tl.arange(0, BLOCK_N)
        own_k, own_v = k + keys.to(tl.int64)[:, None] * k_row, v + keys.to(tl.int64)[:, None] * v_row
        read_d, read_e, read_c = (d < DIM)[None, :], (e < DIM)[None, :], (c < VALUE_DIM)[None, :]
        if MASKED:
            inside = (keys < end)[:, None]
            read_d, read_e, read_c = read_d & inside, read_e & inside, read_c & inside
        k_d = operand(tl.load(own_k + d[None, :], mask=read_d, other=0.0), COMPUTE)
        k_e = operand(tl.load(own_k + e[None, :], mask=read_e, other=0.0), COMPUTE)
        values = operand(tl.load(own_v + c[None, :], mask=read_c, other=0.0), COMPUTE)
        scores = tl.dot(q_d, tl.trans(k_d), input_precision="ieee")
        scores = tl.dot(q_e, tl.trans(k_e), scores, input_precision="ieee") * score_scale
        if MASKED:
            scores = tl.where(keys[None, :] < stop[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite_peak[:, None])
        rescale = tl.exp2(peak - finite_peak)
        total_weight = total_weight * rescale + tl.sum(weights, 1)
        acc = tl.dot(operand(weights, COMPUTE), values, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total_weight
