"""Causal attention over whole sequences, differentiable: what training on a CPU spends most of its time in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
# Probabilities are kept for the backward pass, S^2 / 2 of them a head: past this length torch's flash path recomputes.
LONGEST_KEPT = 2048


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every token reads itself and the tokens before it.

    In bf16 on a CPU, torch's flash attention spends most of its time outside matrix products; keeping the
    probabilities of blocks of rows for the backward pass saves much of that.

    Args:
        q: [B, S, H, Dq].
        k: [B, S, H, Dq].
        v: [B, S, H, Dv].
        scale: softmax scale.
        selected: [B, S, S] bool, which tokens (last) each token reads; none after it. None: all.
        sinks: [H], see `ops.sink_heads`; None: there are none.

    Returns:
        [B, S, H, Dv] in q's dtype.
    """
    if sinks is not None:
        return _attend_with_sinks(q, k, v, scale, selected, sinks)
    kept = torch.is_grad_enabled() and q.device.type == "cpu" and q.dtype == torch.bfloat16
    if kept and selected is None and q.shape[1] <= LONGEST_KEPT:
        return _BlockedCausal.apply(q, k, v, scale)  # pyright: ignore[reportReturnType]
    width, value_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    # torch's flash path wants one width; zeros change neither scores nor values.
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    mask = None if selected is None else selected[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)[..., :value_dim]


def _attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, scale: float, selected: Tensor | None, sinks: Tensor) -> Tensor:
    """With a token before all others whose score is the head's sink, and whose value is zero."""
    batch, length = q.shape[:2]
    # One more dimension, 1 in queries and 0 in keys, in which the sink's key has the score.
    k, q = F.pad(k, (0, 1)), F.pad(q, (0, 1), value=1.0)
    sink = F.pad((sinks / scale).to(k.dtype)[None, None, :, None], (k.shape[-1] - 1, 0)).expand(batch, 1, -1, -1)
    k, v = torch.cat([sink, k], dim=1), torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
    if selected is None:
        selected = torch.ones(1, length, length, dtype=torch.bool, device=q.device).tril()
    mask = F.pad(selected, (1, 0), value=True)[:, None]
    width, value_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)[..., :value_dim]


class _BlockedCausal(torch.autograd.Function):
    """Row block i reads keys 0 .. end of i; softmax of bf16 scores, sums over blocks in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, length, heads, _ = q.shape
        q, k, v = (_merge_heads(x) for x in (q, k, v))
        out = torch.empty_like(v)
        blocks: list[Tensor] = []
        hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            rows = end - begin
            mask = F.pad(hidden[:rows, :rows], (begin, 0))
            scores = torch.baddbmm(mask, q[:, begin:end], k[:, :end].mT, alpha=scale)
            blocks.append(torch.softmax(scores, -1))
            out[:, begin:end] = torch.bmm(blocks[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.scale, ctx.shape = scale, (batch, heads)
        return _split_heads(out, batch, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *blocks = ctx.saved_tensors
        grad = _merge_heads(grad)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        begin = 0
        for weights in blocks:
            end = weights.shape[2]
            d_weights = torch.bmm(grad[:, begin:end], v[:, :end].mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            grad_q[:, begin:end] = torch.bmm(d_scores, k[:, :end])
            grad_v[:, :end] += torch.bmm(weights.mT, grad[:, begin:end])
            grad_k[:, :end] += torch.bmm(d_scores.mT, q[:, begin:end])
            begin = end
        grads = (grad_q * ctx.scale, (grad_k * ctx.scale).to(k.dtype), grad_v.to(v.dtype))
        dq, dk, dv = (_split_heads(x, *ctx.shape) for x in grads)
        return dq, dk, dv, None


def _merge_heads(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B H, S, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _split_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B H, S, D] -> [B, S, H, D]."""
    return x.unflatten(0, (batch, heads)).transpose(1, 2)
