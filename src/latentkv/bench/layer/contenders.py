"""The same decode step by each contender: LatentKV, transformers, and MHA that caches whole heads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.bench.ops.decode_case import NORM_EPS, DecodeCase, rope_of
from latentkv.bench.shapes import StepForm
from latentkv.models.batch import Batch
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.packing import choose_packing, pack_module
from latentkv.ops import write_latents
from latentkv.state import KVFormat, LatentSpec, LayerSpec, PagedCache

LATENTKV, TRANSFORMERS, MHA_SDPA, MHA_MATMUL = "LatentKV", "transformers", "MHA, SDPA", "MHA, matmul"


@dataclass(frozen=True)
class Entry:
    """One implementation, ready to decode.

    Attributes:
        form: whose arithmetic it does.
        step: one decode step, [1, hidden]; every call does the same work.
        prepare: untimed, before each step.
        cache_bytes: bytes that its cache has really allocated, after a step.
        planned_bytes: what `plan` says for the same cache.
    """

    form: StepForm
    step: Callable[[], Tensor]
    cache_bytes: Callable[[], int]
    planned_bytes: int
    prepare: Callable[[], object] | None = None


def latentkv_entry(case: DecodeCase, kv_format: KVFormat) -> Entry:
    """`MultiHeadLatentAttention` over a `PagedCache`, its pages in no order, as after hours of serving."""
    mla = case.shape.mla
    module = MultiHeadLatentAttention(
        case.shape.hidden_size,
        case.shape.num_heads,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        q_lora_rank=mla.q_lora_rank,
        rope=rope_of(case.shape),
        norm_eps=NORM_EPS,
        max_context=case.context,
    )
    module.to(torch.bfloat16).requires_grad_(False).load_state_dict(case.weights)
    packing = choose_packing(None, torch.bfloat16, torch.device("cpu"))
    if packing is not None:  # as a model is when it is loaded
        pack_module(module, packing)
    planned = case.shape.plan(case.context, kv_format).cache[0].cache_bytes
    cache = PagedCache.sized([LayerSpec(LatentSpec(mla.kv_lora_rank, mla.qk_rope_head_dim, kv_format))], planned)
    pages = cache.pool.allocate(cache.pages_for(case.context))
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).tolist()
    pages = [pages[i] for i in order]
    past = Batch.build([[0] * (case.context - 1)], [0], [pages], page_size=cache.page_size)
    write_latents(cache.view(0).pages, past.slots, case.latents, case.k_rope, kv_format=kv_format)
    batch = Batch.build([[0]], [case.context - 1], [pages], page_size=cache.page_size)
    return Entry(
        "absorbed",
        step=lambda: module.attend(case.x, case.positions, batch, cache.view(0)),
        cache_bytes=lambda: cache.allocated_bytes,
        planned_bytes=planned,
    )


def transformers_entry(case: DecodeCase, attention: str) -> Entry:
    """`DeepseekV2Attention` with its own `DynamicCache`, filled with the same latents and grown by one token a step.

    Args:
        case: what to compute.
        attention: transformers' `attn_implementation`: "sdpa" (its default) or "eager".

    Raises:
        ImportError: transformers is not installed.
    """
    modeling: Any = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")
    cache: Any = importlib.import_module("transformers.cache_utils").DynamicCache()
    mla = case.shape.mla
    config = modeling.DeepseekV2Config(
        hidden_size=case.shape.hidden_size,
        num_attention_heads=case.shape.num_heads,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        q_lora_rank=mla.q_lora_rank,
        max_position_embeddings=case.context,
        rms_norm_eps=NORM_EPS,
        attn_implementation=attention,
    )
    module = modeling.DeepseekV2Attention(config, layer_idx=0).eval()
    module.to(torch.bfloat16).load_state_dict(case.weights)
    angles = modeling.DeepseekV2RotaryEmbedding(config)(case.x, torch.tensor([[case.context - 1]]))
    cache.update(case.latents[None, None], case.k_rope[None, None], 0)

    def prepare() -> None:
        cache.crop(min(0, case.context - 1 - cache.get_seq_length()))

    def stored() -> int:
        return sum(part.untyped_storage().nbytes() for part in (cache.layers[0].keys, cache.layers[0].values))

    return Entry(
        "re-expanded",
        step=lambda: module(case.x[None], past_key_values=cache, position_embeddings=angles)[0][0],
        cache_bytes=stored,
        planned_bytes=case.context * case.shape.plan(case.context, "bf16").cache[0].bytes_per_token,
        prepare=prepare,
    )


def mha_entries(case: DecodeCase) -> Mapping[str, Entry]:
    """Multi-head attention of the same heads over cached bf16 keys and values: by torch's SDPA, and by two products.

    torch has no fused kernel for values narrower than keys. So for SDPA a token's row is [k_nope | k_rope | v]: the
    keys are its first Dn + R columns, the values its last Dn + R, of which the last Dv outputs are kept; nothing is
    stored twice or padded. The plain products read keys and values from tensors of their own.
    """
    mla, heads = case.shape.mla, case.shape.num_heads
    key_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    rows = torch.empty(1, heads, case.context, key_dim + mla.v_head_dim, dtype=torch.bfloat16)
    keys, values = torch.empty_like(rows[..., :key_dim]), torch.empty_like(rows[..., key_dim:])
    rows[0, :, :-1] = _expand(case, case.latents, case.k_rope)
    keys.copy_(rows[..., :key_dim])
    values.copy_(rows[..., key_dim:])
    output_weight = case.weights["o_proj.weight"]

    def sdpa_step() -> Tensor:
        query, new = _mha_projections(case)
        rows[0, :, -1:] = new
        attended = functional.scaled_dot_product_attention(
            query[None], rows[..., :key_dim], rows[..., -key_dim:], scale=case.scale
        )
        return functional.linear(attended[0, :, 0, -mla.v_head_dim :].reshape(1, -1), output_weight)

    def matmul_step() -> Tensor:
        query, new = _mha_projections(case)
        keys[0, :, -1:], values[0, :, -1:] = new[..., :key_dim], new[..., key_dim:]
        scores = (query @ keys[0].transpose(1, 2)).float() * case.scale
        attended = scores.softmax(-1).to(values.dtype) @ values[0]
        return functional.linear(attended.reshape(1, -1), output_weight)

    plan = case.shape.plan(case.context, "bf16")
    planned = case.context * next(row.bytes_per_token for row in plan.cache if row.attention == "MHA")
    return {
        MHA_SDPA: Entry("expanded cache", sdpa_step, lambda: rows.nbytes, planned),
        MHA_MATMUL: Entry("expanded cache", matmul_step, lambda: keys.nbytes + values.nbytes, planned),
    }


def _mha_projections(case: DecodeCase) -> tuple[Tensor, Tensor]:
    """The new token's query [H, 1, Dn + R] and its row to cache [H, 1, Dn + R + Dv]."""
    query = torch.cat(case.queries(), dim=-1).transpose(0, 1)
    return query, _expand(case, *case.new_latents())


def _expand(case: DecodeCase, latents: Tensor, k_rope: Tensor) -> Tensor:
    """Every head's key and value [H, n, Dn + R + Dv] of latents [n, L] and rotated keys [n, R]."""
    mla, heads = case.shape.mla, case.shape.num_heads
    expanded = functional.linear(latents, case.weights["kv_b_proj.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1)
    k_nope, v = expanded.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
    return torch.cat([k_nope, k_rope.expand(heads, -1, -1), v], dim=-1)
