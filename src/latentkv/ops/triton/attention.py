"""Attention over pages on Triton's kernels. Lengths stay on the GPU: grids and memory come from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentkv.checks import as_int32
from latentkv.ops.kv_formats import KVFormat
from latentkv.ops.triton import attention_kernels as kernels
from latentkv.ops.triton.blocks import AttendBlocks, AttendShape, block_size
from latentkv.ops.triton.latent_tile import format_code
from latentkv.ops.triton.launch import Launch, parts_of
from latentkv.ops.triton.numerics import DTYPES
from latentkv.ops.triton.tuned import blocks_for

WORKSPACE_BYTES = 512 << 20
"""Of partial results that exist at once: more rows than that are attended to in several passes."""

LONGEST = 1 << 30
"""Tokens that a block table may reach: counting them in chunks stays within int32."""

_LOG2_E = 1.4426950408889634
_LANES = 128
_MERGED_HEADS = 16


@dataclass(frozen=True)
class Rows:
    """Which tokens the rows of q read, as `mla_attend` says it.

    Attributes:
        block_table: [B, M] page numbers.
        q_start: [B + 1].
        start: [T], None = 0.
        stop: [T].
        page_size: tokens a page.
        has_holes: entries of the block table may be -1.
    """

    block_table: Tensor
    q_start: Tensor
    start: Tensor | None
    stop: Tensor
    page_size: int
    has_holes: bool = False

    @classmethod
    def of_slots(cls, slots: Tensor) -> Rows:
        """Every row [T] is a sequence of its own, whose pages of one token are its slots [T, K]."""
        rows, most = slots.shape
        q_start = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        stop = torch.full((rows,), most, dtype=torch.int32, device=slots.device)
        return cls(slots, q_start, None, stop, page_size=1, has_holes=True)

    def as_int32(self) -> Rows | None:
        """With numbers as the kernels read them; None where one is beyond int32, or a range may be."""
        table, q_start, stop = as_int32(self.block_table), as_int32(self.q_start), as_int32(self.stop)
        start = None if self.start is None else as_int32(self.start)
        if table is None or q_start is None or stop is None or (start is None) != (self.start is None):
            return None
        if table.shape[1] * self.page_size > LONGEST:
            return None
        return Rows(table, q_start, start, stop, self.page_size, self.has_holes)


def attend_pages(
    q: Tensor,
    kv_pages: Tensor,
    rows: Rows,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    kv_format: KVFormat | None = None,
    blocks: AttendBlocks | None = None,
) -> list[Launch]:
    """What fills out and lse, to be run in order; see `attention`, where shapes are checked.

    Lengths are not checked: a row never reads past its block table, but the pages that it names must exist.

    Args:
        q: [T, H, L + R].
        kv_pages: [N, P, row] of latents, or [N, P, 2, G, D] of keys and values (L = D, R = 0).
        rows: what they read, as `Rows.as_int32` gives it.
        out: [T, H, L], the last dimension contiguous.
        lse: [T, H].
        scale: softmax scale.
        kv_format: None = numbers of the pages' own dtype.
        blocks: None = those for this shape on this GPU.

    Raises:
        OpError: no block of these shapes fits into the GPU's shared memory.
    """
    num_rows, num_heads, width = q.shape
    dim = out.shape[2]
    kv_heads = kv_pages.shape[3] if kv_pages.ndim == 5 else 1
    heads = num_heads // kv_heads
    grouped = kv_pages.ndim == 5
    q = q if q.stride(2) == 1 else q.contiguous()
    quantised = kv_pages.dtype == torch.uint8
    compute = q.dtype if quantised or kv_pages.dtype == q.dtype else torch.float32
    # A value of its own takes as much room as the key before it.
    shape = AttendShape(heads, dim, dim if grouped else width - dim, kv_pages.dtype, compute)
    blocks = blocks or blocks_for(shape, q.device)

    batch, most_tokens = rows.block_table.shape[0], rows.block_table.shape[1] * rows.page_size
    chunks = -(-most_tokens // blocks.chunk)
    rows_at_once = _rows_at_once(num_rows, batch, chunks * kv_heads, heads, dim, blocks)
    most_items = _most_tiles(rows_at_once, batch, heads, blocks) * chunks
    first_chunk, items = torch.empty(2, batch, dtype=torch.int32, device=q.device)
    item_start = torch.empty(batch + 1, dtype=torch.int32, device=q.device)
    partial_out = torch.empty(most_items, kv_heads, blocks.rows, dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(most_items, kv_heads, blocks.rows, dtype=torch.float32, device=q.device)

    tile = {"HEADS": heads, "BLOCK_M": blocks.rows}
    latent = {"LATENT": dim, "BLOCK_L": block_size(dim)}
    ranges = {"CHUNK": blocks.chunk, "HAS_START": rows.start is not None}
    read: dict[str, Any] = {
        "HEAD_NUMBERS": dim if grouped else 0,
        "VALUE_OFFSET": kv_heads * dim if grouped else 0,
        "PAGE": rows.page_size,
        "FORMAT": format_code(kv_format if quantised else None),
        "ROPE": width - dim,
        "BLOCK_R": block_size(width - dim),
        "BLOCK_N": blocks.tokens,
        "HAS_HOLES": rows.has_holes,
        "COMPUTE": DTYPES[compute],
    }
    start = rows.q_start if rows.start is None else rows.start  # without HAS_START it is not read
    merged_heads = min(_MERGED_HEADS, block_size(heads))
    launches: list[Launch] = []
    for low in range(0, num_rows, rows_at_once):
        own = low, min(low + rows_at_once, num_rows)
        launches += [
            Launch(
                kernels.plan_kernel,
                (batch,),
                (rows.q_start, *own, start, rows.stop, first_chunk, items, most_tokens),
                {**tile, **ranges, "BLOCK": _LANES},
            ),
            Launch(kernels.number_items_kernel, (1,), (items, item_start, batch), {"BLOCK": _LANES}),
            Launch(
                kernels.attend_kernel,
                (min(-(-parts_of(q.device) // kv_heads), most_items), kv_heads),
                (
                    *(q, *q.stride()[:2], kv_pages, kv_pages.stride(1)),
                    *(rows.block_table, rows.block_table.stride(0), rows.q_start, *own, start, rows.stop),
                    *(most_tokens, first_chunk, item_start, batch, partial_out, partial_lse, scale * _LOG2_E),
                ),
                {**tile, **latent, **ranges, **read},
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            ),
            Launch(
                kernels.merge_chunks_kernel,
                (own[1] - own[0], -(-heads // merged_heads), kv_heads),
                (partial_out, partial_lse, rows.q_start, *own, item_start, batch, out, *out.stride()[:2], lse),
                {**tile, **latent, "BLOCK_H": merged_heads},
            ),
        ]
    return launches


def _most_tiles(rows: int, batch: int, heads: int, blocks: AttendBlocks) -> int:
    """Tiles that so many rows can make: each sequence may end in one that is not full, unless heads fill them all."""
    return -(-rows * heads // blocks.rows) + (min(batch, rows) if heads % blocks.rows else 0)


def _rows_at_once(rows: int, batch: int, chunks: int, heads: int, dim: int, blocks: AttendBlocks) -> int:
    """So many rows that their partial results fit into `WORKSPACE_BYTES`, one at least."""
    tile_bytes = max(1, chunks) * blocks.rows * (dim + 1) * 4
    if _most_tiles(rows, batch, heads, blocks) * tile_bytes <= WORKSPACE_BYTES:
        return max(1, rows)
    return max(1, WORKSPACE_BYTES // (tile_bytes * _most_tiles(1, batch, heads, blocks)))
