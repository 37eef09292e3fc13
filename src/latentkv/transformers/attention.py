"""`latent_attention`: what transformers calls instead of its own attention, with latents where others have keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latentkv import ops
from latentkv.models.config import MLAConfig
from latentkv.models.forms import choose_form
from latentkv.models.mla import chunk_bounds
from latentkv.state.spec import PAGE_SIZE
from latentkv.transformers.cache_layer import rows_of

NAME, SPARSE_NAME = "latentkv", "latentkv_sparse"
"""Under which transformers finds it (`config._attn_implementation`), and for models that select tokens."""

_EXPANDED_AT_ONCE = 4096
"""Tokens of context whose keys and values are there at once."""


def latent_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a step, as transformers asks for it: which tokens are padding, or all of it where that is not all.

    Args:
        batch_size: B.
        q_length: S, new tokens.
        kv_length: T.
        q_offset: tokens before the new ones.
        mask_function: which pairs may see each other.
        attention_mask: [B, T] bool, False where a token is padding.
        kwargs: as `sdpa_mask` takes them.

    Returns:
        None: causal, and no token is padding; [B, T] bool: causal, without padding; [B, 1, S, T] bool otherwise.
    """
    told: dict[str, Any] = {
        **kwargs,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
    }
    seen = kv_length if attention_mask is None else attention_mask.shape[1]
    # A cache of fixed length gives more keys than there are tokens.
    if mask_function is causal_mask_function and seen == kv_length and int(q_offset) + q_length == kv_length:
        return flash_attention_mask(**told)
    return whole_mask(**told)


def whole_mask(**told: Any) -> Tensor:
    """The whole mask [B, 1, S, T] of a step, of which the layers that select tokens select."""
    told["allow_is_causal_skip"] = False
    mask: Any = sdpa_mask(**told)
    return mask


def latent_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens to all that are cached.

    Args:
        module: transformers' attention, whose `expand_kv` leaves latents as they are.
        query: [B, H, S, Dn + R], rotated.
        key: [B, 1, T, R], shared keys, rotated.
        value: [B, 1, T, L], latents.
        attention_mask: see `latent_mask`, or float numbers [B, 1, S, T] to add to scores.
        scaling: softmax scale.
        dropout: of attention weights, where gradients are needed.
        indices: [B, S, K], the tokens that each new one reads of those that its mask lets it see; None: all of them.
        kwargs: for transformers' own attention, likewise.

    Returns:
        [B, S, H, Dv], and no attention weights.
    """
    k_rope, latents = key, value
    padding = _left_padding(attention_mask, latents)
    batch, heads, new, _ = query.shape
    total = latents.shape[2]
    if indices is not None and indices.shape[-1] >= total:
        indices = None
    if padding is None or (torch.is_grad_enabled() and (query.requires_grad or latents.requires_grad)):
        mask = _whole(attention_mask, batch, new, total)
        if indices is not None:
            selected = torch.zeros(batch, 1, new, total, dtype=torch.bool).scatter_(-1, indices.long()[:, None], True)
            mask = mask & selected if mask.dtype == torch.bool else mask.masked_fill(~selected, -torch.inf)
        return _attend_as_transformers(module, query, k_rope, latents, mask, scaling, dropout, **kwargs), None
    if indices is not None:
        return _attend_absorbed(module, query, k_rope, latents, padding, scaling, indices), None
    if choose_form(_config(module), new, total - min(padding)) == "absorbed":
        return _attend_absorbed(module, query, k_rope, latents, padding, scaling), None
    out = query.new_zeros(batch, new, heads, module.v_head_dim)
    for b, begin in enumerate(padding):
        own = max(begin - (total - new), 0)
        if own < new:
            _attend_expanded(
                module, query[b, :, own:], k_rope[b, 0, begin:], latents[b, 0, begin:], scaling, out[b, own:]
            )
    return out, None


def _left_padding(mask: Tensor | None, latents: Tensor) -> list[int] | None:
    """Tokens of padding before each sequence, where a mask is causal but for these; None: it is of another kind."""
    batch, _, total, _ = latents.shape
    if mask is None:
        return [0] * batch
    if mask.dtype != torch.bool:
        return None
    seen = mask if mask.ndim == 2 else mask[:, 0, -1]
    padding = total - seen.sum(1)
    tokens = torch.arange(total)
    if not torch.equal(seen, (tokens >= padding[:, None]).expand_as(seen)):
        return None
    if mask.ndim == 4:
        new = tokens[total - mask.shape[2] :]
        causal = (tokens <= new[:, None]) & (tokens >= padding[:, None, None])
        is_token = (new >= padding[:, None])[..., None]  # what padding itself sees is of no importance
        if not torch.equal(mask[:, 0] & is_token, causal & is_token):
            return None
    return padding.expand(batch).tolist()


def _whole(mask: Tensor | None, batch: int, new: int, total: int) -> Tensor:
    """[B, 1, S, T] of any mask that `latent_mask` gives; padding sees itself, for of nothing there is no mean."""
    if mask is None or mask.ndim == 2:
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        itself = torch.eye(new, total, dtype=torch.bool).roll(total - new, 1)
        mask = causal if mask is None else causal & mask[:, None, None].bool() | itself
    return mask.expand(batch, 1, new, total)


def _attend_absorbed(
    module: Any,
    query: Tensor,
    k_rope: Tensor,
    latents: Tensor,
    padding: list[int],
    scale: float,
    indices: Tensor | None = None,
) -> Tensor:
    """On the latents themselves, of all tokens or of those of the indices."""
    batch, heads, new, _ = query.shape
    total, latent_dim = latents.shape[2:]
    w_uk, w_uv = _up_projections(module)
    q_nope, q_rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    q = torch.cat([q_nope @ w_uk, q_rope], dim=-1).transpose(1, 2).reshape(batch * new, heads, -1)
    rows = rows_of(latents, k_rope)
    pages = rows.view(-1, PAGE_SIZE, rows.shape[-1])
    ends = torch.arange(total - new + 1, total + 1, dtype=torch.int32)
    slots = None
    if indices is not None:
        seen = (indices < ends[:, None]) & (indices >= torch.tensor(padding)[:, None, None])
        slots = indices + torch.arange(batch)[:, None, None] * rows.shape[1]
        slots = slots.masked_fill(~seen, -1).flatten(0, 1).int()
    attended, _ = ops.mla_attend(
        q,
        pages,
        torch.arange(len(pages), dtype=torch.int32).view(batch, -1),
        torch.arange(0, batch * new + 1, new, dtype=torch.int32),
        ends.repeat(batch),
        start=torch.tensor(padding, dtype=torch.int32).repeat_interleave(new) if any(padding) else None,
        slots=slots,
        latent_dim=latent_dim,
        scale=scale,
    )
    attended = attended.view(batch, new, heads, latent_dim).transpose(1, 2)
    return (attended @ w_uv.transpose(1, 2)).transpose(1, 2)


def _attend_expanded(module: Any, query: Tensor, k_rope: Tensor, latents: Tensor, scale: float, out: Tensor) -> None:
    """One sequence, into out [S, H, Dv]: keys and values of a chunk of context at a time, merged by log-sum-exp."""
    q, total = query.transpose(0, 1), len(latents)
    past = total - len(q)
    partial = torch.promote_types(q.dtype, torch.float32)
    merged = lse = None
    for begin, end in chunk_bounds(0, past, total, _EXPANDED_AT_ONCE):
        keys, values = (
            each[0].transpose(0, 1).contiguous()
            for each in type(module).expand_kv(module, latents[None, None, begin:end], k_rope[None, None, begin:end])
        )
        first = max(begin - past, 0)
        # Rows of new tokens see a chunk of them causally, the rows after it whole.
        inside = end - begin if begin >= past else 0
        for rows, causal in ((slice(first, first + inside), True), (slice(first + inside, None), False)):
            own = q[rows]
            if not len(own):
                continue
            bounds = [torch.tensor([0, len(each)], dtype=torch.int32) for each in (own, keys)]
            part = ops.mla_prefill(own, keys, values, *bounds, scale=scale, causal=causal, out_dtype=partial)
            if merged is None or lse is None:
                merged, lse = (each.new_zeros(len(q), *each.shape[1:]) for each in part)
                lse.fill_(-torch.inf)
            merged[rows], lse[rows] = ops.merge_states(merged[rows], lse[rows], *part)
    if merged is not None:
        out.copy_(merged)


def _attend_as_transformers(
    module: Any,
    query: Tensor,
    k_rope: Tensor,
    latents: Tensor,
    mask: Tensor,
    scale: float,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    """As transformers would: for gradients, and for masks that are not causal."""
    keys, values = type(module).expand_kv(module, latents, k_rope)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, keys, values, mask, scaling=scale, dropout=dropout, is_causal=False, **kwargs
    )
    return out


def _up_projections(module: Any) -> tuple[Tensor, Tensor]:
    """W_UK [H, Dn, L] and W_UV [H, Dv, L], views of kv_b_proj's weight."""
    weight = module.kv_b_proj.weight
    return weight.view(module.num_heads, -1, weight.shape[1]).split([module.qk_nope_head_dim, module.v_head_dim], dim=1)


def _config(module: Any) -> MLAConfig:
    return MLAConfig(
        q_lora_rank=None,
        kv_lora_rank=module.kv_lora_rank,
        qk_nope_head_dim=module.qk_nope_head_dim,
        qk_rope_head_dim=module.qk_rope_head_dim,
        v_head_dim=module.v_head_dim,
    )
