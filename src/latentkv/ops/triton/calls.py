"""The ops' calls of Triton's kernels: each says whether it computed. Triton is imported with the first that does."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.kv_formats import KVFormat
from latentkv.ops.triton.eligible import takes

MOST_NUMBERS = 16384
"""Of a row that one program holds."""


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
    kv_format: KVFormat | None = None,
) -> bool:
    """See `attention.mla_attend` and `attention.gqa_attend`; shapes are checked."""
    numbers = (q, out) if kv_pages.dtype is torch.uint8 else (q, out, kv_pages)
    indices = [t for t in (kv_pages, block_table, q_start, start, stop, slots) if t is not None]
    if not takes(*numbers) or any(t.device != q.device for t in indices) or out.stride(2) != 1:
        return False
    if not _reads_words(kv_pages):
        return False
    from latentkv.ops.triton import attention

    rows = attention.Rows(block_table, q_start, start, stop, kv_pages.shape[1])
    if slots is not None:
        rows = attention.Rows.of_slots(slots)
    rows = rows.as_int32()
    if rows is None:
        return False
    for launch in attention.attend_pages(q, kv_pages, rows, out, lse, scale=scale, kv_format=kv_format):
        launch.run()
    return True


def attend_new_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
) -> bool:
    """See `prefill.mla_prefill`; shapes are checked."""
    if not takes(q, k, v, out) or any(t.stride(2) != 1 for t in (q, k, v, out)):
        return False
    from latentkv.ops.triton import prefill

    first, first_key = (t.to(q.device, torch.int32, non_blocking=True).contiguous() for t in (q_start, kv_start))
    prefill.attend_new_tokens(q, k, v, first, first_key, out, lse, scale=scale, causal=causal).run()
    return True


def write_latents(kv_pages: Tensor, slots: Tensor, latents: Tensor, k_rope: Tensor, kv_format: KVFormat | None) -> bool:
    """See `pages.write_latents`; shapes are checked."""
    if not _writes(kv_pages, slots, latents, k_rope):
        return False
    from latentkv.ops.triton import write

    write.write_latents(kv_pages, slots, latents, k_rope, kv_format).run()
    return True


def norm_rope_write(
    kv_pages: Tensor,
    slots: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    kv_format: KVFormat | None,
) -> bool:
    """See `pages.norm_rope_write`; shapes are checked."""
    latents, k_rope = kv_a.split([norm_weight.shape[0], kv_a.shape[1] - norm_weight.shape[0]], dim=1)
    contiguous = norm_weight.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    if not contiguous or not takes(norm_weight, cos, sin) or not _writes(kv_pages, slots, latents, k_rope):
        return False
    from latentkv.ops.triton import write

    step = write.NormRope(norm_weight, eps, cos, sin, interleaved)
    write.write_latents(kv_pages, slots, latents, k_rope, kv_format, step).run()
    return True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See `elementwise.rms_norm`; shapes are checked. None: not computed."""
    dim = x.shape[-1]
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, dim) if x.is_contiguous() else None
    if rows is None or not 0 < dim <= MOST_NUMBERS or not weight.is_contiguous() or not takes(x, weight):
        return None
    from latentkv.ops.triton import elementwise

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elementwise.rms_norm(rows, weight, eps, out).run()
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, out: Tensor | None) -> Tensor | None:
    """See `elementwise.apply_rope`, for x [T, R] or [T, H, R]; shapes are checked. None: not computed."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    one_each = x.ndim in (2, 3) and cos.shape == (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1] // 2)
    if not one_each or not 0 < x.shape[-1] <= MOST_NUMBERS or x.stride(-1) != 1 or out.stride(-1) != 1:
        return None
    if not cos.is_contiguous() or not sin.is_contiguous() or not takes(x, cos, sin, out):
        return None
    from latentkv.ops.triton import elementwise

    rows, own = (t if t.ndim == 3 else t.unsqueeze(1) for t in (x, out))
    elementwise.apply_rope(rows, cos, sin, own, interleaved=interleaved).run()
    return out


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor] | None:
    """See `states.merge_states`; shapes are checked. None: not computed."""
    if not 0 < out_a.shape[-1] <= MOST_NUMBERS or not takes(out_a, lse_a, out_b, lse_b):
        return None
    from latentkv.ops.triton import elementwise

    out = torch.empty(out_a.shape, dtype=torch.float32, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    a, b = (out_a.contiguous(), lse_a.contiguous()), (out_b.contiguous(), lse_b.contiguous())
    elementwise.merge_states(*a, *b, out, lse).run()
    return out, lse


def _reads_words(kv_pages: Tensor) -> bool:
    """Whether the scales in quantised rows lie where a GPU can read them in one go."""
    return kv_pages.dtype is not torch.uint8 or kv_pages.stride(1) % 4 == 0


def _writes(kv_pages: Tensor, slots: Tensor, latents: Tensor, k_rope: Tensor) -> bool:
    numbers = (latents, k_rope) if kv_pages.dtype is torch.uint8 else (latents, k_rope, kv_pages)
    return (
        takes(*numbers)
        and _reads_words(kv_pages)
        and kv_pages.device == slots.device == latents.device
        and slots.is_contiguous()
        and latents.stride(1) == 1
        and (k_rope.shape[1] == 0 or k_rope.stride(1) == 1)
        and latents.shape[1] + k_rope.shape[1] <= MOST_NUMBERS
    )


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None,
    num_zero_experts: int,
) -> Tensor | None:
    """See `moe.moe_experts`; shapes are checked, and expert ids on a CPU. None: not computed."""
    numbers = (x, gate_up, down) if residual is None else (x, gate_up, down, residual)
    if len({t.dtype for t in (x, gate_up, down)}) > 1:
        return None
    if not takes(*numbers, weights) or expert_ids.device != x.device or x.stride(1) != 1:
        return None
    if not gate_up.is_contiguous() or not down.is_contiguous():
        return None
    from latentkv.ops.triton import moe

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    for launch in moe.moe_experts(
        x, expert_ids, weights.contiguous(), gate_up, down, residual, out, num_zero_experts=num_zero_experts
    ):
        launch.run()
    return out
