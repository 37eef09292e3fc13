"""Attention over pages in fixed chunks of tokens, and the merging of chunks in their order.

A *tile* is BLOCK_M consecutive (row, head) pairs of one sequence, a *chunk* CHUNK tokens counted from the sequence's
first one, an *item* one tile over one chunk. Items are numbered sequence by sequence, chunk by chunk, tile by tile, so
that the tiles that read the same tokens run side by side. What an item computes depends on its own rows and tokens
alone; merging adds the chunks of a row one by one. So no bit of a sequence's result depends on the rest of the batch.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.triton.latent_tile import load_latents, load_rope
from latentkv.ops.triton.numerics import operand, rounded
from latentkv.ops.triton.ragged import owner

FAR = tl.constexpr(2147483647)
ALL_MINUS_INFINITY = tl.constexpr(-3.0e38)
"""Stands for the log-sum-exp of a row that reads tokens, all with a score of -inf: its output is NaN, not 0."""
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _own_rows(q_start, b, row_low, row_high):
    """Rows of sequence b among row_low .. row_high - 1: the first, and one past the last."""
    first = tl.minimum(tl.maximum(tl.load(q_start + b), row_low), row_high)
    last = tl.minimum(tl.maximum(tl.load(q_start + b + 1), row_low), row_high)
    return first, last


@triton.jit(
    do_not_specialize=["row_low", "row_high", "capacity"], do_not_specialize_on_alignment=["q_start", "start", "stop"]
)
def plan_kernel(
    q_start,
    row_low,
    row_high,
    start,
    stop,
    first_chunk,
    items,
    capacity,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence: the first chunk that its rows read, and how many items they make."""
    b = tl.program_id(0)
    first_row, last_row = _own_rows(q_start, b, row_low, row_high)
    lows = tl.full((BLOCK,), FAR, tl.int32)
    highs = tl.zeros((BLOCK,), tl.int32)
    for row in range(first_row, last_row, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        valid = rows < last_row
        row_stop = tl.minimum(tl.load(stop + rows, mask=valid, other=0), capacity)
        row_start = tl.zeros((BLOCK,), tl.int32)
        if HAS_START:
            row_start = tl.maximum(tl.load(start + rows, mask=valid, other=0), 0)
        reads = row_start < row_stop
        lows = tl.minimum(lows, tl.where(reads, row_start, FAR))
        highs = tl.maximum(highs, tl.where(reads, row_stop, 0))
    low, high = tl.min(lows, 0), tl.max(highs, 0)
    chunks = tl.where(low < high, (high + CHUNK - 1) // CHUNK - low // CHUNK, 0)
    tiles = ((last_row - first_row) * HEADS + BLOCK_M - 1) // BLOCK_M
    tl.store(first_chunk + b, tl.where(low < high, low // CHUNK, 0))
    tl.store(items + b, tiles * chunks)


@triton.jit(do_not_specialize=["batch"])
def number_items_kernel(items, item_start, batch, BLOCK: tl.constexpr):
    """One program: the number of each sequence's first item, and in the end how many there are."""
    before = batch * 0
    tl.store(item_start, before)
    for first in range(0, batch, BLOCK):
        b = first + tl.arange(0, BLOCK)
        counts = tl.load(items + b, mask=b < batch, other=0)
        tl.store(item_start + 1 + b, before + tl.cumsum(counts, 0), mask=b < batch)
        before += tl.sum(counts, 0)


# Numbers that change from step to step are no reason to compile anew.
@triton.jit(
    do_not_specialize=["table_row", "row_low", "row_high", "capacity", "batch"],
    do_not_specialize_on_alignment=["table", "q_start", "start", "stop"],
)
def attend_kernel(
    q,
    q_row,
    q_head,
    pages,
    page_row,
    table,
    table_row,
    q_start,
    row_low,
    row_high,
    start,
    stop,
    capacity,
    first_chunk,
    item_start,
    batch,
    partial_out,
    partial_lse,
    score_scale,
    HEADS: tl.constexpr,
    HEAD_NUMBERS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_HOLES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Each program takes an equal run of all items, and writes each item's output and log2-sum-exp2.

    The second axis is the key/value head, each with HEADS query heads: its key lies HEAD_NUMBERS after the one before,
    its value VALUE_OFFSET after its key (0: the value is the key's first LATENT numbers).
    """
    kv_head = tl.program_id(1)
    q += kv_head * HEADS * q_head
    pages += kv_head * HEAD_NUMBERS
    total = tl.load(item_start + batch).to(tl.int64)
    first_item = (total * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
    last_item = (total * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
    for item in range(first_item, last_item):
        b = owner(item_start, batch, item)
        first_row, last_row = _own_rows(q_start, b, row_low, row_high)
        pairs = (last_row - first_row) * HEADS
        tiles = (pairs + BLOCK_M - 1) // BLOCK_M
        local = item - tl.load(item_start + b)
        begin = (tl.load(first_chunk + b) + local // tiles) * CHUNK
        pair = local % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = pair < pairs
        rows = first_row + pair // HEADS
        row_stop = tl.minimum(tl.load(stop + rows, mask=valid, other=0), capacity)
        row_start = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_START:
            row_start = tl.maximum(tl.load(start + rows, mask=valid, other=0), 0)
        reads = row_start < row_stop

        # int64: q of a long prompt may have more than 2^31 numbers, and pages surely have.
        own_q = q + rows.to(tl.int64) * q_row + pair % HEADS * q_head
        columns = tl.arange(0, BLOCK_L)
        own = valid[:, None] & (columns < LATENT)[None, :]
        q_latent = operand(tl.load(own_q[:, None] + columns[None, :], mask=own, other=0.0), COMPUTE)
        q_rope = q_latent
        if ROPE > 0:
            columns_rope = tl.arange(0, BLOCK_R)
            own = valid[:, None] & (columns_rope < ROPE)[None, :]
            q_rope = operand(tl.load(own_q[:, None] + LATENT + columns_rope[None, :], mask=own, other=0.0), COMPUTE)

        # Tokens of this chunk that some row of the tile reads, and those among them that every row reads.
        end = tl.minimum(begin + CHUNK, tl.max(tl.where(reads, row_stop, 0), 0))
        low = tl.maximum(begin, tl.min(tl.where(reads, row_start, FAR), 0) // BLOCK_N * BLOCK_N)
        common_low, common_end = low, low
        if not HAS_HOLES:
            common_low = tl.max(tl.where(valid, row_start, 0), 0)
            common_low = tl.minimum(
                tl.maximum(low, (common_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N), tl.maximum(low, end)
            )
            common_end = tl.minimum(end, tl.min(tl.where(valid, row_stop, FAR), 0))
            common_end = tl.maximum(common_low, common_end // BLOCK_N * BLOCK_N)

        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total_weight = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
        own_table = table + b.to(tl.int64) * table_row
        if HAS_START:
            acc, peak, total_weight = _attend_blocks(
                acc, peak, total_weight, q_latent, q_rope, pages, page_row, own_table, low, common_low, row_start,
                row_stop, score_scale, VALUE_OFFSET, PAGE, FORMAT, LATENT, ROPE, BLOCK_L, BLOCK_R, BLOCK_N, True,
                False, COMPUTE,
            )  # fmt: skip
        if not HAS_HOLES:
            acc, peak, total_weight = _attend_blocks(
                acc, peak, total_weight, q_latent, q_rope, pages, page_row, own_table, common_low, common_end,
                row_start, row_stop, score_scale, VALUE_OFFSET, PAGE, FORMAT, LATENT, ROPE, BLOCK_L, BLOCK_R, BLOCK_N,
                False, False, COMPUTE,
            )  # fmt: skip
        acc, peak, total_weight = _attend_blocks(
            acc, peak, total_weight, q_latent, q_rope, pages, page_row, own_table, common_end, end, row_start,
            row_stop, score_scale, VALUE_OFFSET, PAGE, FORMAT, LATENT, ROPE, BLOCK_L, BLOCK_R, BLOCK_N, True,
            HAS_HOLES, COMPUTE,
        )  # fmt: skip

        last_read = tl.minimum(row_stop, begin + CHUNK)
        if HAS_HOLES:
            token = begin + tl.arange(0, CHUNK)
            slots = tl.load(own_table + token, mask=token < tl.max(row_stop, 0), other=-1)
            last_read = tl.where(tl.max(slots, 0) < 0, 0, last_read)
        empty = tl.maximum(row_start, begin) >= last_read
        lse = peak + tl.log2(total_weight)
        lse = tl.where(lse == float("-inf"), ALL_MINUS_INFINITY, lse)
        slot = item * tl.num_programs(1) + kv_head
        lane = slot * tl.full((BLOCK_M,), BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)
        tl.store(partial_lse + lane, tl.where(empty, float("-inf"), lse))
        tl.store(
            partial_out + lane[:, None] * LATENT + columns[None, :],
            acc / total_weight[:, None],
            mask=(valid & ~empty)[:, None] & (columns < LATENT)[None, :],
        )


@triton.jit
def _attend_blocks(
    acc,
    peak,
    total_weight,
    q_latent,
    q_rope,
    pages,
    page_row,
    own_table,
    begin,
    end,
    row_start,
    row_stop,
    score_scale,
    VALUE_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_HOLES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Online softmax (arXiv 1805.02867) over tokens begin .. end - 1; not MASKED: every row reads all of them."""
    # Counted from 0: with another lower bound Triton (3.9) does not see that rows are aligned, and reads word by word.
    for block in range(0, (end - begin + BLOCK_N - 1) // BLOCK_N):
        first = begin + block * BLOCK_N
        tokens = first + tl.arange(0, BLOCK_N)
        read = tokens < end
        reads = (tokens[None, :] >= row_start[:, None]) & (tokens[None, :] < row_stop[:, None])
        if MASKED:
            # What no row reads may be NaN, and 0 * NaN is NaN: it is not loaded.
            read = read & (tl.max(reads.to(tl.int32), 0) > 0)
        if PAGE % BLOCK_N == 0:
            # One page holds the block, and its rows follow each other: one page number, and far fewer addresses.
            page = tl.load(own_table + first // PAGE)
            cached = pages + (page.to(tl.int64) * PAGE + first % PAGE) * page_row
            cached += tl.arange(0, BLOCK_N) * page_row
        else:
            page = tl.load(own_table + tokens // PAGE, mask=read, other=0)
            cached = pages + (page.to(tl.int64) * PAGE + tokens % PAGE) * page_row
            if HAS_HOLES:
                read = read & (page >= 0)
        latents = load_latents(cached, read, COMPUTE, FORMAT, LATENT, ROPE, BLOCK_L, MASKED)
        scores = tl.dot(q_latent, tl.trans(latents), input_precision="ieee")
        if ROPE > 0:
            k_rope = load_rope(cached, read, COMPUTE, FORMAT, LATENT, ROPE, BLOCK_R, MASKED)
            scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
        scores *= score_scale
        if MASKED:
            scores = tl.where(reads & read[None, :], scores, float("-inf"))
        values = latents
        if VALUE_OFFSET != 0:
            at_values = cached + VALUE_OFFSET
            values = load_latents(at_values, read, COMPUTE, FORMAT, LATENT, ROPE, BLOCK_L, MASKED)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite_peak[:, None])
        rescale = tl.exp2(peak - finite_peak)
        total_weight = total_weight * rescale + tl.sum(weights, 1)
        acc = tl.dot(operand(weights, COMPUTE), values, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total_weight


@triton.jit(do_not_specialize=["row_low", "row_high", "batch"], do_not_specialize_on_alignment=["q_start"])
def merge_chunks_kernel(
    partial_out,
    partial_lse,
    q_start,
    row_low,
    row_high,
    item_start,
    batch,
    out,
    out_row,
    out_head,
    lse,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a row and BLOCK_H heads of a key/value head, the third axis: their chunks, added in their order."""
    kv_head = tl.program_id(2)
    out += kv_head * HEADS * out_head
    row = row_low + tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b = owner(q_start, batch, row)
    first_row, last_row = _own_rows(q_start, b, row_low, row_high)
    pairs = (row - first_row) * HEADS + heads
    tiles = ((last_row - first_row) * HEADS + BLOCK_M - 1) // BLOCK_M
    first_item = tl.load(item_start + b)
    chunks = (tl.load(item_start + b + 1) - first_item) // tiles
    columns = tl.arange(0, BLOCK_L)[None, :]
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
    for chunk in range(0, chunks):
        items = first_item + chunk * tiles + pairs // BLOCK_M
        slots = items * tl.num_programs(2) + kv_head
        lanes = slots.to(tl.int64) * BLOCK_M + pairs % BLOCK_M
        chunk_lse = tl.load(partial_lse + lanes, mask=heads < HEADS, other=float("-inf"))
        new_peak = tl.maximum(peak, chunk_lse)
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(chunk_lse - finite_peak)
        rescale = tl.exp2(peak - finite_peak)
        written = weight != 0.0  # a chunk that the row does not read was not
        own_chunk = partial_out + lanes[:, None] * LATENT + columns
        values = tl.load(own_chunk, mask=written[:, None] & (columns < LATENT), other=0.0)
        acc = acc * rescale[:, None] + values * weight[:, None]
        total_weight = total_weight * rescale + weight
        peak = new_peak
    empty = (peak == float("-inf")) & (total_weight == 0.0)  # a NaN sum is one, too
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total_weight)[:, None])
    own_lse = tl.where(peak == ALL_MINUS_INFINITY, float("-inf"), peak + tl.log2(total_weight)) * LN_2
    own_heads = (row.to(tl.int64) * tl.num_programs(2) + kv_head) * HEADS + heads
    tl.store(lse + own_heads, own_lse, mask=heads < HEADS)
    own_out = out + row.to(tl.int64) * out_row + heads[:, None] * out_head + columns
    tl.store(own_out, rounded(acc, out.dtype.element_ty), mask=(heads < HEADS)[:, None] & (columns < LATENT))
