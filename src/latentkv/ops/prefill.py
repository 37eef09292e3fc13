"""Expanded attention over new tokens: keys and values per head, ragged, causal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentkv.checks import require, require_floats, require_integers, require_shape
from latentkv.ops.backends import prefill_backend
from latentkv.ops.native import attention as native
from latentkv.ops.online_softmax import attend, compute_dtype
from latentkv.ops.states import merge_states
from latentkv.ops.triton import calls as triton

FLASH_NUMBERS = 2**24
"""How many numbers of q, k or v are converted to float32 at a time (64 MiB)."""


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    *,
    scale: float,
    causal: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Ordinary attention of B ragged sequences, with the log-sum-exp that merging needs.

    Computed in float32 (float64 for float64 q), with products of bf16 where the CPU multiplies bf16. Scores are never
    held for a whole sequence, nor float32 copies of all heads of a long one. Differentiable in out where all keys are
    new; lse carries no gradient.

    Args:
        q: [T, H, Dq]; sequence b owns rows q_start[b] : q_start[b + 1].
        k: [S, H, Dq]; sequence b owns rows kv_start[b] : kv_start[b + 1].
        v: [S, H, Dv].
        q_start: [B + 1] int, from 0 to T.
        kv_start: [B + 1] int, from 0 to S.
        scale: softmax scale.
        causal: aligned to the end: a sequence's last query reads all its keys, the one before all but the last.
        out_dtype: of the output, None = q's; float32 for partial results.

    Returns:
        out [T, H, Dv]; lse [T, H] float32 (float64 for float64 q); 0 and -inf for a row that reads nothing.

    Raises:
        OpError: shapes do not fit together.
    """
    require_shape("q", q, (None, None, None))
    require_shape("k", k, (None, q.shape[1], q.shape[2]))
    require_shape("v", v, (k.shape[0], q.shape[1], None))
    require_floats(q=q, k=k, v=v)
    require_shape("q_start", q_start, (None,))
    require(q_start.shape == kv_start.shape, "q_start and kv_start must name the same number of sequences")
    require_integers("q_start", q_start)
    require_integers("kv_start", kv_start)
    starts = q_start, kv_start, q.shape[0], k.shape[0]
    # Those on a GPU are not waited for, where its kernels compute.
    bounds = _bounds(*starts) if q_start.is_cpu and kv_start.is_cpu else None
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=out_dtype or q.dtype, device=q.device)
    require_floats(out=out)
    isa = native.isa_for(q, k, v, out) if k.dtype == v.dtype else None
    if prefill_backend(q.device, q.dtype) == "native" and isa is not None and bounds is not None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        native.attend_new_tokens(isa, q, k, v, q_start, kv_start, out, lse, scale=scale, causal=causal)
        return out, lse
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if triton.attend_new_tokens(q, k, v, q_start, kv_start, out, lse, scale=scale, causal=causal):
        return out, lse
    q_bounds, kv_bounds = bounds or _bounds(*starts)
    parts = [
        _one_sequence(q[a:b], k[c:d], v[c:d], scale, causal)
        for a, b, c, d in zip(q_bounds, q_bounds[1:], kv_bounds, kv_bounds[1:], strict=False)
    ]
    return torch.cat([part[0].to(out.dtype) for part in parts]), torch.cat([part[1] for part in parts])


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Cut the context into a part that every row reads and a square causal part, then merge."""
    past = k.shape[0] - q.shape[0] if causal else k.shape[0]
    if past < 0:  # the first rows come before the first key
        out, lse = _one_sequence(q[-past:], k, v, scale, causal)
        return F.pad(out, (0, 0, 0, 0, -past, 0)), F.pad(lse, (0, 0, -past, 0), value=float("-inf"))
    if past == k.shape[0]:
        return _attend(q, k, v, scale, causal=False)
    new = _attend(q, k[past:], v[past:], scale, causal=True)
    return merge_states(*_attend(q, k[:past], v[:past], scale, causal=False), *new) if past else new


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend: q [T, H, Dq], k [S, H, Dq], v [S, H, Dv] -> out [T, H, Dv], lse [T, H]; causal needs T = S."""
    if prefill_backend(q.device, q.dtype) != "blocks" and q.shape[0] and k.shape[0]:
        return _flash_cpu(q, k, v, scale, causal)
    stop = torch.full((q.shape[0],), k.shape[0], device=q.device)
    if causal:
        stop = torch.arange(1, q.shape[0] + 1, device=q.device)
    keys, values = (t.to(compute_dtype(q)).transpose(0, 1) for t in (k, v))
    return attend(
        q,
        lambda first, last: (keys[:, first:last], values[:, first:last]),
        torch.zeros_like(stop),
        stop,
        num_kv_heads=q.shape[1],
        value_dim=v.shape[2],
        scale=scale,
    )


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Use torch's flash attention for CPUs, some heads at a time.

    It wants keys and values of one width: zeros change neither. In bf16 its log-sum-exp misses our tolerance, and
    without matrix units it is no faster than in float32.
    """
    value_dim, width = v.shape[2], max(q.shape[2], v.shape[2])
    heads = max(1, FLASH_NUMBERS // (max(q.shape[0], k.shape[0]) * width))
    parts: list[tuple[Tensor, Tensor]] = []
    for group in zip(*(t.split(heads, dim=1) for t in (q, k, v)), strict=True):
        wide = [F.pad(t.float(), (0, width - t.shape[2])).transpose(0, 1).unsqueeze(0) for t in group]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal, scale=scale)
        parts.append((out[0, :, :, :value_dim].transpose(0, 1), lse[0].transpose(0, 1)))
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _bounds(q_start: Tensor, kv_start: Tensor, rows: int, keys: int) -> tuple[list[int], list[int]]:
    found: list[list[int]] = []
    for name, bounds, total in (("q_start", q_start, rows), ("kv_start", kv_start, keys)):
        values: list[int] = bounds.tolist()
        require(
            len(values) >= 2 and values[0] == 0 and values[-1] == total and values == sorted(values),
            f"{name} must rise from 0 to {total}, not {values[:8]}",
        )
        found.append(values)
    return found[0], found[1]
