"""Attention over pages on Triton's kernels. Lengths stay on the GPU: grids and memory come from shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.kv_formats import KVFormat
from latentkv.ops.triton import attention_kernels as kernels
from latentkv.ops.triton.blocks import AttendBlocks, AttendShape, block_size
from latentkv.ops.triton.latent_tile import format_code
from latentkv.ops.triton.launch import Launch, parts_of
from latentkv.ops.triton.numerics import DTYPES
from latentkv.ops.triton.tuned import blocks_for

WORKSPACE_BYTES = 512 << 20
"""Of partial results that exist at once: more rows than that are attended to in several passes."""

_LOG2_E = 1.4426950408889634
_LANES = 128
_MERGED_HEADS = 16


def attend_pages(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    start: Tensor | None,
    stop: Tensor,
    slots: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    kv_format: KVFormat | None,
    blocks: AttendBlocks | None = None,
) -> list[Launch]:
    """What fills out [T, H, L] and lse [T, H], to be run in order; see `attention.mla_attend`, which checks shapes.

    Lengths are not checked: a row never reads past its block table, but the pages that it names must exist.

    Args:
        q: as `mla_attend`, as are the others.
        kv_pages: its last dimension contiguous, like out's.
        block_table: any integers.
        q_start: any integers.
        start: any integers.
        stop: any integers.
        slots: any integers.
        out: where the output goes.
        lse: where the log-sum-exp goes.
        scale: softmax scale.
        kv_format: None = numbers of the pages' own dtype.
        blocks: None = those for this shape on this GPU.
    """
    rows, heads, width = q.shape
    latent_dim = out.shape[2]
    page_size = kv_pages.shape[1]
    if slots is not None:
        # Every row a sequence of its own, whose pages of one token are the slots.
        block_table, page_size, start = slots, 1, None
        q_start = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
        stop = torch.full((rows,), slots.shape[1], dtype=torch.int32, device=q.device)
    q = q if q.stride(2) == 1 else q.contiguous()
    table, q_start, stop = _int32(block_table), _int32(q_start), _int32(stop)
    start = None if start is None else _int32(start)
    quantised = kv_pages.dtype == torch.uint8
    compute = q.dtype if quantised or kv_pages.dtype == q.dtype else torch.float32
    shape = AttendShape(heads, latent_dim, width - latent_dim, kv_pages.dtype, compute)
    blocks = blocks or blocks_for(shape, q.device)

    batch, capacity = table.shape[0], table.shape[1] * page_size
    chunks = -(-capacity // blocks.chunk)
    rows_at_once = _rows_at_once(rows, batch, chunks, heads, latent_dim, blocks)
    most_items = _most_items(rows_at_once, batch, heads, blocks) * chunks
    first_chunk, items = torch.empty(2, batch, dtype=torch.int32, device=q.device)
    item_start = torch.empty(batch + 1, dtype=torch.int32, device=q.device)
    partial_out = torch.empty(most_items, blocks.rows, latent_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(most_items, blocks.rows, dtype=torch.float32, device=q.device)

    tile = {"HEADS": heads, "BLOCK_M": blocks.rows}
    latent = {"LATENT": latent_dim, "BLOCK_L": block_size(latent_dim)}
    ranges = {"CHUNK": blocks.chunk, "HAS_START": start is not None}
    page_row, q_strides, out_strides = kv_pages.stride(1), q.stride()[:2], out.stride()[:2]
    begin = q_start if start is None else start  # not read
    merged_heads = min(_MERGED_HEADS, block_size(heads))
    launches: list[Launch] = []
    for low in range(0, rows, rows_at_once):
        own = low, min(low + rows_at_once, rows)
        launches += [
            Launch(
                kernels.plan_kernel,
                (batch,),
                (q_start, *own, begin, stop, first_chunk, items, capacity),
                {**tile, **ranges, "BLOCK": _LANES},
            ),
            Launch(kernels.number_items_kernel, (1,), (items, item_start, batch), {"BLOCK": _LANES}),
            Launch(
                kernels.attend_kernel,
                (min(parts_of(q.device), most_items),),
                (
                    *(q, *q_strides, kv_pages, page_row, table, table.stride(0), q_start, *own, begin, stop),
                    *(first_chunk, item_start, batch, partial_out, partial_lse, scale * _LOG2_E),
                ),
                {
                    **tile,
                    **latent,
                    **ranges,
                    "PAGE": page_size,
                    "FORMAT": format_code(kv_format if quantised else None),
                    "ROPE": shape.rope_dim,
                    "BLOCK_R": block_size(shape.rope_dim),
                    "BLOCK_N": blocks.tokens,
                    "HAS_HOLES": slots is not None,
                    "COMPUTE": DTYPES[compute],
                },
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            ),
            Launch(
                kernels.merge_chunks_kernel,
                (own[1] - own[0], -(-heads // merged_heads)),
                (partial_out, partial_lse, q_start, *own, item_start, batch, out, *out_strides, lse),
                {**tile, **latent, "BLOCK_H": merged_heads},
            ),
        ]
    return launches


def _most_items(rows: int, batch: int, heads: int, blocks: AttendBlocks) -> int:
    """Tiles that so many rows can make at most: each sequence may end in a tile that is not full."""
    return -(-rows * heads // blocks.rows) + min(batch, rows)


def _rows_at_once(rows: int, batch: int, chunks: int, heads: int, latent_dim: int, blocks: AttendBlocks) -> int:
    """So many rows that their partial results fit into `WORKSPACE_BYTES`, one at least."""
    item = blocks.rows * (latent_dim + 1) * 4 * max(1, chunks)
    if _most_items(rows, batch, heads, blocks) * item <= WORKSPACE_BYTES:
        return max(1, rows)
    return max(1, WORKSPACE_BYTES // (item * _most_items(1, batch, heads, blocks)))


def _int32(numbers: Tensor) -> Tensor:
    """As the kernels read them: int32, the last dimension without gaps."""
    if numbers.dtype is torch.int32 and numbers.stride(-1) == 1:
        return numbers
    return numbers.to(torch.int32).contiguous()
