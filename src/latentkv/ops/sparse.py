"""Which tokens sparse attention reads (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): those of the best index scores.

Native kernels on a CPU, else torch. Scores are computed a row at a time: what a row selects does not depend, bit for
bit, on what else is in the batch or on where its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_integers, require_shape, row_bounds
from latentkv.ops.index_keys import check_key_pages, decode_keys, hadamard
from latentkv.ops.native import sparse as native
from latentkv.ops.online_softmax import compute_dtype
from latentkv.ops.pages import gather_tokens

CHUNK_TOKENS = 4096
"""Cached keys that are widened at a time."""

SCORE_NUMBERS = 1 << 22
"""Scores that exist at a time, 16 MiB of them."""


def weigh_heads(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """What each head's scores count for each token: `scale * weight x`, in float32 whatever x's dtype.

    Args:
        x: [T, hidden].
        weight: [H, hidden] float32 or float64.
        scale: of the result.

    Returns:
        [T, H] in weight's dtype; each row depends on its token alone, bit for bit.
    """
    fast = native.weigh_heads(x, weight, scale)
    if fast is not None:
        return fast
    with torch.autocast(x.device.type, enabled=False):
        # Row by row: of a product of matrices each row's rounding depends on how many there are; and copied, because
        # BLAS may round differently by alignment.
        rows = [torch.mv(weight, row.to(weight.dtype, copy=True)) for row in x]
        return torch.stack(rows) * scale if rows else weight.new_empty(0, len(weight))


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, stop: Sequence[int]) -> Tensor:
    """`sum_h weights[t, h] ReLU(D^-1/2 q[t, h] . keys[s])` for the tokens s < stop[t], -inf for the others.

    Args:
        q: [T, H, D] rotated index queries.
        weights: [T, H] float32, of each row's heads.
        keys: [S, D] rotated index keys, one for all heads.
        stop: T of them; below 0 is 0, above S is S.

    Returns:
        [T, S] float32 (float64 for float64 q).
    """
    dtype, count = compute_dtype(q), keys.shape[0]
    keys = keys.to(dtype, copy=True)  # fresh and so aligned: BLAS may round differently by alignment
    scores = torch.full((q.shape[0], count), float("-inf"), dtype=dtype, device=q.device)
    for t, end in enumerate(stop):
        if end > 0:
            query = q[t].to(dtype) * q.shape[2] ** -0.5
            scores[t, :end] = (keys[:end] @ query.T).relu_() @ weights[t].to(dtype)
    return scores


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Which `count` scores [..., S] of each row are the highest, of equal ones those of lower position: bool [..., S].

    NaN counts as the highest.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def select_slots(
    q: Tensor,
    weights: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    topk: int,
    start: Tensor | None = None,
    pool: int = 1,
    open_pool: bool = True,
) -> Tensor:
    """The cache slots of the `topk` tokens of the highest index score among those that each row sees.

    Row t of sequence b sees tokens start[t] <= s < stop[t] of that sequence; where they are `topk` or fewer it selects
    all of them, and nothing is scored. Rows are laid out as in `mla_attend`, which takes the result as its `slots`.

    Where a key stands for a pool of G tokens (GLM-5.3-Flash), token s is in pool s // G of its sequence. A row selects
    all tokens of the `topk` / G best of the pools that it sees whole, and those after them where `open_pool` says so.

    Args:
        q: [T, H, D] rotated index queries.
        weights: [T, H] float32, of each row's heads.
        key_pages: [N, P, D] or int8 [N, P, D + 4], as `write_index_keys` leaves them, or of pools [N, P / G, ...], as
            `write_pooled_keys` does; new tokens are written before the call. What no row sees may hold anything.
        block_table: [B, M] page numbers; entries past a sequence's pages may hold anything.
        q_start: [B + 1] int, from 0 to T.
        stop: [T] int.
        topk: K, a multiple of G.
        start: [T] int, None = 0, which it is for pools.
        pool: G.
        open_pool: whether a row reads the tokens after the last pool that it sees whole.

    Returns:
        [T, K] int32 in order of position, or [T, K + G - 1] of pools with those that are open; as many are -1 as a row
        sees too few tokens for.

    Raises:
        OpError: shapes or dtypes do not fit, or the pages do not cover what a row sees.
    """
    require_shape("q", q, (None, None, None))
    rows, heads, dim = q.shape
    require_shape("weights", weights, (rows, heads))
    check_key_pages(key_pages, dim)
    require_shape("block_table", block_table, (None, None))
    require_shape("q_start", q_start, (block_table.shape[0] + 1,))
    require_shape("stop", stop, (rows,))
    require_floats(q=q, weights=weights)
    for name, numbers in (("block_table", block_table), ("q_start", q_start), ("stop", stop)):
        require_integers(name, numbers)
    require(topk > 0, f"select_slots selects one token or more, not topk={topk}")
    require(topk % pool == 0, f"select_slots selects whole pools of {pool} tokens, not topk={topk}")
    if start is not None:
        require_shape("start", start, (rows,))
        require_integers("start", start)
        require(pool == 1, "pools are counted from a sequence's first token: leave start out")
    fast = native.select_slots(q, weights, key_pages, block_table, q_start, start, stop, topk, pool, open_pool)
    if fast is not None:
        return fast
    if key_pages.dtype == torch.int8:
        q = hadamard(q).to(q.dtype)
    stops: list[int] = stop.tolist()
    starts: list[int] = [0] * rows if start is None else start.tolist()
    seen = [(begin, end // pool) for begin, end in zip(starts, stops, strict=True)]
    slots = torch.full((rows, topk // pool), -1, dtype=torch.int32, device=q.device)
    for b, (first, last) in enumerate(pairwise(row_bounds(q_start, rows))):
        block = max(1, SCORE_NUMBERS // max([1, *stops[first:last]]))
        for begin in range(first, last, block):
            own = slice(begin, min(begin + block, last))
            selected = _select(q[own], weights[own], key_pages, block_table[b], seen[own], topk // pool)
            slots[own, : selected.shape[1]] = selected
    return slots if pool == 1 else _expand_pools(slots, key_pages, block_table, q_start, stop, pool, open_pool)


def _expand_pools(
    pools: Tensor, key_pages: Tensor, block_table: Tensor, q_start: Tensor, stop: Tensor, pool: int, open_pool: bool
) -> Tensor:
    """Slots [T, K + G - 1] of the tokens of pools [T, K / G], and of those after the last whole one."""
    page_size, each = key_pages.shape[1] * pool, torch.arange(pool, device=pools.device)
    tokens = (pools[..., None] * pool + each).masked_fill(pools[..., None] < 0, -1).flatten(1)
    if open_pool:
        owner = torch.repeat_interleave(torch.arange(len(block_table), device=pools.device), q_start.long().diff())
        last = stop.long()[:, None] // pool * pool + each[:-1]
        is_open = last < stop[:, None]
        pages = block_table.long()[owner[:, None], torch.where(is_open, last // page_size, 0)]
        tokens = torch.cat([tokens, torch.where(is_open, pages * page_size + last % page_size, -1)], dim=1)
    order = (tokens < 0).sort(dim=1, stable=True).indices
    return tokens.gather(1, order).int()


def _select(
    q: Tensor, weights: Tensor, key_pages: Tensor, pages: Tensor, seen: Sequence[tuple[int, int]], topk: int
) -> Tensor:
    """Slots [T, K or fewer] of some rows of one sequence, which see tokens from .. to."""
    page_size, total = key_pages.shape[1], max(0, *(end for _, end in seen))
    require(total <= len(pages) * page_size, f"{len(pages)} pages of {page_size} tokens do not hold {total} tokens")
    scored = [end if end - begin > topk else 0 for begin, end in seen]
    chunk = max(1, CHUNK_TOKENS // page_size) * page_size
    scores = torch.full((len(seen), total), float("-inf"), dtype=compute_dtype(q), device=q.device)
    for first in range(0, max(scored), chunk):
        keys = decode_keys(gather_tokens(key_pages, pages, first, min(first + chunk, max(scored))), scores.dtype)
        scores[:, first : first + len(keys)] = index_scores(q, weights, keys, [end - first for end in scored])
    for t, (begin, end) in enumerate(seen):
        scores[t, :begin] = float("-inf")
        if not scored[t]:
            scores[t, begin:end] = 0
    chosen = best_tokens(scores, min(topk, total)).nonzero()[:, 1].view(len(seen), -1)
    places = pages.long()[chosen // page_size] * page_size + chosen % page_size
    begin, end = torch.tensor(seen, device=q.device).T[:, :, None]
    return places.masked_fill((chosen < begin) | (chosen >= end), -1).int()
