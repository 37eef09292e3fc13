"""The one attention loop of the torch backend: blocks of query rows over chunks of keys, bounded memory.

A chunk is counted from the sequence's first token and chunks are merged in order (online softmax, arXiv 1805.02867), so
the result of a sequence does not depend, bit for bit, on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_TOKENS = 1024
BLOCK_QUERIES = 4096

KeyValues = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first, last) -> keys [G, n, D] and values [G, n, Dv] of tokens first <= s < last, n = last - first."""


def compute_dtype(q: Tensor) -> torch.dtype:
    """Attention is computed in float32, or in float64 for float64 queries."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def attend(
    q: Tensor,
    load: KeyValues,
    start: Tensor,
    stop: Tensor,
    *,
    num_kv_heads: int,
    value_dim: int,
    scale: float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Rows of one sequence over its own tokens.

    Args:
        q: [T, H, D]; head h reads key/value head h // (H / G).
        load: reads tokens; called only for ranges within [min start, max stop).
        start: [T] first token that each row reads, on the host's side already validated.
        stop: [T] one past the last.
        num_kv_heads: G.
        value_dim: Dv.
        scale: multiplies the scores.
        chunk_tokens: tokens a chunk.

    Returns:
        out [T, H, Dv] and lse [T, H] in `compute_dtype(q)`; 0 and -inf for a row that reads nothing.
    """
    rows, heads, dim = q.shape
    dtype = compute_dtype(q)
    # Grouped as [G, T, H/G, D]: the rows that share a key/value head lie together. Always a fresh, aligned tensor.
    grouped = q.view(rows, num_kv_heads, heads // num_kv_heads, dim).transpose(0, 1).to(dtype) * scale
    block = max(1, BLOCK_QUERIES // heads)
    parts = [
        _attend_block(
            grouped[:, i : i + block], load, start[i : i + block], stop[i : i + block], value_dim, chunk_tokens
        )
        for i in range(0, rows, block)
    ]
    if not parts:
        return q.new_zeros(0, heads, value_dim, dtype=dtype), q.new_zeros(0, heads, dtype=dtype)
    out = torch.cat([part[0] for part in parts], dim=1) if len(parts) > 1 else parts[0][0]
    lse = torch.cat([part[1] for part in parts], dim=1) if len(parts) > 1 else parts[0][1]
    return out.transpose(0, 1).reshape(rows, heads, value_dim), lse.transpose(0, 1).reshape(rows, heads)


def _attend_block(
    q: Tensor, load: KeyValues, start: Tensor, stop: Tensor, value_dim: int, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Online softmax for one block of rows: q [G, T, Hg, D] -> out [G, T, Hg, Dv], lse [G, T, Hg]."""
    groups, rows, heads, dim = q.shape
    flat = q.reshape(groups, rows * heads, dim)
    peak = flat.new_full((groups, rows * heads), float("-inf"))
    total = torch.zeros_like(peak)
    out = flat.new_zeros(groups, rows * heads, value_dim)
    reads = _Reads(start, stop)
    for chunk in range(reads.first // chunk_tokens * chunk_tokens, reads.last, chunk_tokens):
        first, last = max(chunk, reads.first), min(chunk + chunk_tokens, reads.last)
        keys, values = load(first, last)
        mask = reads.mask(first, last)
        if mask is not None:
            # What no row reads may be stale or NaN, and 0 * NaN is NaN.
            unread = ~mask.any(dim=0)
            keys, values = (t.masked_fill(unread[None, :, None], 0) for t in (keys, values))
        scores = torch.bmm(flat, keys.transpose(1, 2))
        if mask is not None:
            scores.view(groups, rows, heads, -1).masked_fill_(~mask[None, :, None, :], float("-inf"))
        # The peak only keeps exp in range; its gradient would cancel.
        new_peak = torch.maximum(peak, scores.detach().amax(dim=-1))
        finite_peak = torch.where(torch.isneginf(new_peak), 0.0, new_peak)  # -inf - -inf would be NaN
        weights = scores.sub_(finite_peak.unsqueeze(-1)).exp()
        rescale = torch.exp(peak - finite_peak)
        total = total * rescale + weights.sum(dim=-1)
        out = torch.baddbmm(out * rescale.unsqueeze(-1), weights, values)
        peak = new_peak
    # Only a row that reads nothing may have no weights; where all its scores are -inf, 0 / 0 shows it as NaN.
    empty = (start >= stop).repeat_interleave(heads).to(total.device)
    out = out / torch.where(empty, 1.0, total).unsqueeze(-1)
    lse = peak + total.log()
    return out.view(groups, rows, heads, value_dim), lse.view(groups, rows, heads)


class _Reads:
    """Which tokens the rows of a block read: row t those of start[t] <= s < stop[t]."""

    def __init__(self, start: Tensor, stop: Tensor) -> None:
        self.start, self.stop = start, stop
        ranges = [(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True) if a < b]
        self.first = min((a for a, _ in ranges), default=0)
        self.last = max((b for _, b in ranges), default=0)
        every_row = len(ranges) == start.shape[0]
        self._common = (max(a for a, _ in ranges), min(b for _, b in ranges)) if every_row and ranges else (0, 0)

    def mask(self, first: int, last: int) -> Tensor | None:
        """[T, last - first] bool of what each row reads, or None where every row reads all."""
        if self._common[0] <= first and last <= self._common[1]:
            return None
        tokens = torch.arange(first, last, device=self.start.device)
        return (tokens >= self.start[:, None]) & (tokens < self.stop[:, None])
