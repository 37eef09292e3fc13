"""Attention over the paged cache: native kernels on a CPU, Triton's on a GPU, else plain torch, which takes everything.

Native kernels and torch read lengths on the host once a call; Triton's never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_integers, require_shape, row_bounds
from latentkv.errors import OpError
from latentkv.ops.backends import why_no_int8_products
from latentkv.ops.kv_formats import KVFormat
from latentkv.ops.native import attention as native
from latentkv.ops.online_softmax import CHUNK_TOKENS, attend, compute_dtype
from latentkv.ops.pages import check_latent_pages, decode_rows, gather_tokens
from latentkv.ops.triton import calls as triton

KeysAndValues = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cached rows [n, ...] -> keys [G, n, D] and values [G, n, Dv] to compute with."""


def mla_attend(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    latent_dim: int,
    scale: float,
    kv_format: KVFormat | None = None,
    start: Tensor | None = None,
    slots: Tensor | None = None,
    only_longer_ranges: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    int8_products: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA: every head attends to the one cached latent a token (arXiv 2405.04434, section 2.1.2).

    Row t of sequence b reads tokens start[t] <= s < stop[t] of that sequence: the score of token s is
    `scale * q . [c_s ; k_rope_s]`, its value c_s.

    Args:
        q: [T, H, L + R] absorbed queries of all sequences, ragged: sequence b owns rows q_start[b] : q_start[b + 1].
        kv_pages: [N, P, row]; new tokens are written before the call. What no row of a sequence reads may be NaN.
        block_table: [B, M] page numbers; entries past a sequence's pages may hold anything.
        q_start: [B + 1] int, from 0 to T.
        stop: [T] int.
        latent_dim: L.
        scale: softmax scale.
        kv_format: layout of uint8 pages; None = numbers of the pages' own dtype.
        start: [T] int, None = 0.
        slots: [T, K] int, explicit cache slots (page * P + offset, -1 unused) that row t reads instead of the range.
        only_longer_ranges: rows whose range holds no more than K tokens read the range: `select_slots` has chosen them
            all, and attention gives the bits of attention without slots.
        out: [T, H, L] to write the output to.
        out_dtype: of the output, None = q's (or that of `out`).
        int8_products: quantise queries and softmax weights too, and multiply bytes: faster over int8 pages, and less
            exact (docs/attention.md says by how much).

    Returns:
        out [T, H, L]; lse [T, H] float32 (float64 for float64 q), natural log of sum exp(score). A row that reads
        nothing gives 0 and -inf.

    Raises:
        OpError: shapes or dtypes do not fit, the pages do not cover a range, a page or slot that is read is none of
            the cache's (page numbers on a GPU are not looked at), or there are no int8 products here.
    """
    if q.ndim != 3:
        require_shape("q", q, (None, None, None))
    rows, heads, width = q.shape
    if not 1 <= latent_dim <= width:
        raise OpError(f"latent_dim is {latent_dim}, but q has only {width} numbers a head")
    check_latent_pages(kv_pages, latent_dim, width - latent_dim, kv_format)
    _check_rows(q, block_table, q_start, start, stop)
    if slots is not None:
        require_shape("slots", slots, (rows, None))
        require_integers("slots", slots)
    dtype = compute_dtype(q)
    out = _output(out, (rows, heads, latent_dim), out_dtype or q.dtype, q.device)
    lse = torch.empty(rows, heads, dtype=dtype, device=q.device)
    isa = native.isa_for(q, kv_pages, out)
    if int8_products:
        _require_int8_products(kv_format, isa, q)
    if isa is not None and native.attend_pages(
        isa,
        q,
        kv_pages,
        block_table,
        q_start,
        start,
        stop,
        slots,
        out,
        lse,
        kv_heads=1,
        head_numbers=0,
        value_offset=0,
        scale=scale,
        kv_format=kv_format,
        longer_ranges=only_longer_ranges,
        int8_products=int8_products,
    ):
        return out, lse

    if slots is not None and only_longer_ranges:
        longer: list[bool] = ((stop if start is None else stop - start) > slots.shape[1]).tolist()
        if any(longer) and not all(longer):
            for b, own in _runs(row_bounds(q_start, q.shape[0]), longer):
                _, lse[own] = mla_attend(
                    q[own],
                    kv_pages,
                    block_table[b : b + 1],
                    q_start.new_tensor([0, own.stop - own.start]),
                    stop[own],
                    latent_dim=latent_dim,
                    scale=scale,
                    kv_format=kv_format,
                    start=None if start is None else start[own],
                    slots=slots[own] if longer[own.start] else None,
                    out=out[own],
                )
            return out, lse
        slots = slots if any(longer) else None

    if triton.attend_pages(
        q, kv_pages, block_table, q_start, start, stop, slots, out, lse, scale=scale, kv_format=kv_format
    ):
        return out, lse

    def keys_and_values(cached: Tensor) -> tuple[Tensor, Tensor]:
        latents = _aligned(decode_rows(cached, latent_dim, width - latent_dim, kv_format, dtype)).unsqueeze(0)
        return latents, latents[..., :latent_dim]

    if slots is not None:
        row_bounds(q_start, q.shape[0])
        _attend_slots(q, kv_pages, slots, keys_and_values, out, lse, scale=scale)
    else:
        _attend_ranges(
            q, kv_pages, block_table, q_start, start, stop, keys_and_values, out, lse, kv_heads=1, scale=scale
        )
    return out, lse


def gqa_attend(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention over paged keys and values (arXiv 2305.13245; G = H is MHA, G = 1 MQA).

    Args:
        q: [T, H, D] rotated queries, ragged as in `mla_attend`.
        kv_pages: [N, P, 2, G, D] keys, then values.
        block_table: [B, M] page numbers.
        q_start: [B + 1] int.
        stop: [T] int; row t reads tokens start[t] <= s < stop[t].
        scale: softmax scale.
        start: [T] int, None = 0 (a sliding window sets it).
        out_dtype: of the output, None = q's.

    Returns:
        out [T, H, D]; lse [T, H] float32 (float64 for float64 q).

    Raises:
        OpError: shapes or dtypes do not fit, or the pages do not cover a range.
    """
    require_shape("q", q, (None, None, None))
    rows, heads, dim = q.shape
    require_shape("kv_pages", kv_pages, (None, None, 2, None, dim))
    require(
        kv_pages.is_contiguous() and kv_pages.is_floating_point() and kv_pages.dtype.itemsize >= 2,
        f"kv_pages must be contiguous fp32, bf16 or fp16, not {kv_pages.dtype} with strides {kv_pages.stride()}",
    )
    kv_heads = kv_pages.shape[3]
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
    )
    _check_rows(q, block_table, q_start, start, stop)
    dtype = compute_dtype(q)
    out = _output(None, (rows, heads, dim), out_dtype or q.dtype, q.device)
    lse = torch.empty(rows, heads, dtype=dtype, device=q.device)
    isa = native.isa_for(q, kv_pages, out)
    if isa is not None and native.attend_pages(
        isa,
        q,
        kv_pages,
        block_table,
        q_start,
        start,
        stop,
        None,
        out,
        lse,
        kv_heads=kv_heads,
        head_numbers=dim,
        value_offset=kv_heads * dim,
        scale=scale,
    ):
        return out, lse

    if triton.attend_pages(q, kv_pages, block_table, q_start, start, stop, None, out, lse, scale=scale):
        return out, lse

    def keys_and_values(cached: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = _aligned(cached).permute(1, 2, 0, 3).to(dtype, memory_format=torch.contiguous_format).unbind()
        return keys, values

    _attend_ranges(
        q, kv_pages, block_table, q_start, start, stop, keys_and_values, out, lse, kv_heads=kv_heads, scale=scale
    )
    return out, lse


def mla_decode(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    *,
    latent_dim: int,
    scale: float,
    causal: bool = True,
    kv_format: KVFormat | None = None,
    int8_products: bool = False,
) -> tuple[Tensor, Tensor]:
    """`mla_attend` in FlashMLA's manner: S new tokens a sequence, which are the last of its kv_lens cached ones.

    Args:
        q: [B, S, H, L + R] absorbed queries.
        kv_pages: [N, P, row].
        block_table: [B, M] page numbers.
        kv_lens: [B] int, cached tokens of each sequence, the S new ones included.
        latent_dim: L.
        scale: softmax scale.
        causal: new token i does not read those after it.
        kv_format: layout of uint8 pages; None = numbers of the pages' own dtype.
        int8_products: as `mla_attend`.

    Returns:
        out [B, S, H, L] in q's dtype; lse [B, H, S] float32 (float64 for float64 q).

    Raises:
        OpError: as `mla_attend`.
    """
    require_shape("q", q, (None, None, None, None))
    batch, steps, heads, _ = q.shape
    require_shape("kv_lens", kv_lens, (batch,))
    require_integers("kv_lens", kv_lens)
    stop = kv_lens.to(torch.promote_types(kv_lens.dtype, torch.int32))
    if steps != 1:
        stop = stop[:, None].expand(batch, steps)
        if causal:  # a length below 0 is nothing to read, and less than that may not be a number
            stop = stop.clamp(min=0) - torch.arange(steps - 1, -1, -1, dtype=stop.dtype, device=stop.device)
        stop = stop.reshape(-1)
    q_start = torch.arange(batch + 1, dtype=torch.int32, device=q.device).mul_(steps)
    out, lse = mla_attend(
        q.flatten(0, 1),
        kv_pages,
        block_table,
        q_start,
        stop,
        latent_dim=latent_dim,
        scale=scale,
        kv_format=kv_format,
        int8_products=int8_products,
    )
    return out.view(batch, steps, heads, latent_dim), lse.view(batch, steps, heads).transpose(1, 2)


def _runs(bounds: list[int], kinds: list[bool]) -> Iterator[tuple[int, slice]]:
    """Runs of rows of one sequence and one kind, and which sequence it is."""
    for b, (first, last) in enumerate(pairwise(bounds)):
        for _, rows in groupby(range(first, last), key=kinds.__getitem__):
            run = list(rows)
            yield b, slice(run[0], run[-1] + 1)


def _attend_ranges(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    start: Tensor | None,
    stop: Tensor,
    keys_and_values: KeysAndValues,
    out: Tensor,
    lse: Tensor,
    *,
    kv_heads: int,
    scale: float,
) -> None:
    """Fill out and lse, one sequence after the other, each from its own pages."""
    bounds = row_bounds(q_start, q.shape[0])
    start = torch.zeros_like(stop) if start is None else start
    for b, (first_row, last_row) in enumerate(pairwise(bounds)):
        own = slice(first_row, last_row)
        out[own], lse[own] = attend(
            q[own],
            lambda first, last, b=b: keys_and_values(gather_tokens(kv_pages, block_table[b], first, last)),
            start[own],
            stop[own],
            num_kv_heads=kv_heads,
            value_dim=out.shape[-1],
            scale=scale,
            chunk_tokens=max(1, CHUNK_TOKENS // kv_pages.shape[1]) * kv_pages.shape[1],
        )


def _attend_slots(
    q: Tensor,
    kv_pages: Tensor,
    slots: Tensor,
    keys_and_values: KeysAndValues,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
) -> None:
    """Fill out and lse row by row, each from the cache slots that it names."""
    flat = kv_pages.view(-1, kv_pages.shape[2])
    for t in range(q.shape[0]):
        used = slots[t][slots[t] >= 0].to(torch.int64)
        require(
            used.numel() == 0 or int(used.max()) < flat.shape[0],
            f"row {t} names a cache slot past the last, {flat.shape[0] - 1}",
        )
        out[t : t + 1], lse[t : t + 1] = attend(
            q[t : t + 1],
            lambda first, last, used=used: keys_and_values(flat[used[first:last]]),
            used.new_zeros(1),
            used.new_tensor([used.numel()]),
            num_kv_heads=1,
            value_dim=out.shape[-1],
            scale=scale,
        )


def _check_rows(q: Tensor, block_table: Tensor, q_start: Tensor, start: Tensor | None, stop: Tensor) -> None:
    """Raise `OpError` unless the tensors of a ragged layout fit together."""
    rows = q.shape[0]
    require_floats(q=q)
    if block_table.ndim != 2 or q_start.shape != (block_table.shape[0] + 1,) or stop.shape != (rows,):
        require_shape("block_table", block_table, (None, None))
        require_shape("q_start", q_start, (block_table.shape[0] + 1,))
        require_shape("stop", stop, (rows,))
    require_integers("block_table", block_table)
    require_integers("q_start", q_start)
    require_integers("stop", stop)
    if start is not None:
        require_shape("start", start, (rows,))
        require_integers("start", start)


def _require_int8_products(kv_format: KVFormat | None, isa: object, q: Tensor) -> None:
    require(kv_format == "int8", f"int8_products multiplies int8 pages, not those of kv_format={kv_format!r}")
    reason = why_no_int8_products(q.device)
    if reason is None and isa is None:
        reason = "q and out must be bf16, fp16 or fp32, without gradients, their last dimension contiguous"
    require(reason is None, f"int8_products cannot be had here: {reason}")


def _output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        require_shape("out", out, shape)
    require_floats(out=out)
    return out


def _aligned(values: Tensor) -> Tensor:
    """Copied if it does not start on a cache line: BLAS may round differently by alignment."""
    return values if values.data_ptr() % 64 == 0 else values.clone()
