"""The plan itself: bytes of the weights and of the cache, from the formula that the allocator uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from latentkv.dtype_names import short_dtype
from latentkv.errors import CacheError, RequestError
from latentkv.models.config import GQAConfig, MLAConfig, ModelConfig
from latentkv.models.parameters import (
    checkpoint_dtype,
    count_active_parameters,
    count_mtp_parameters,
    count_parameters,
    weight_bytes,
)
from latentkv.models.stored_config import stored_dtype
from latentkv.plan.machine import Memory
from latentkv.plan.source import StoredWeights
from latentkv.state.spec import PAGE_SIZE, KVFormat, bytes_per_token, mha_bytes_per_token, page_bytes, sequence_bytes

KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)


@dataclass(frozen=True)
class CacheRow:
    """What one kind of attention would cache; `ratio_to_mha` is against bf16 multi-head attention of the same model.

    `bytes_per_sequence`: what recurrent layers keep of a sequence, however long; `cache_bytes` counts it. `fits`: for
    each memory, whether weights and cache fit in it together; `longest_context`: tokens a sequence.
    """

    attention: str
    this_model: bool
    kv_heads: int | None
    kv_dtype: str
    bytes_per_token: int
    bytes_per_sequence: int
    cache_bytes: int
    ratio_to_mha: float
    fits: dict[str, bool]
    longest_context: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What a model needs, in bytes; `longest_context` is in tokens a sequence, 0 where the weights alone do not fit.

    `kv_dtypes` gives the bytes per token (all layers) of this model's own cache in each format it can be stored in,
    `mtp_cache_bytes` what drafts by multi-token prediction add to the cache.
    """

    model: str
    model_type: str
    num_layers: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    parameters: int
    active_parameters: int
    mtp_parameters: int
    weights_dtype: str
    weights_bytes: int
    max_context: int
    context: int
    batch: int
    page_size: int
    cache: tuple[CacheRow, ...]
    kv_dtypes: dict[str, int]
    mtp_cache_bytes: int
    memory: tuple[Memory, ...]


def make_plan(
    model: str,
    config: ModelConfig,
    *,
    memory: Sequence[Memory],
    context: int | None = None,
    batch: int = 1,
    kv_dtype: str = "bf16",
    weights_dtype: str | None = None,
    stored: StoredWeights | None = None,
) -> Plan:
    """Predict what `config` needs.

    Args:
        model: how to call it.
        config: its shape.
        memory: the memories to fit it into; what is free in each counts.
        context: tokens a sequence; None for the longest that the model was made for.
        batch: sequences at a time.
        kv_dtype: format of this model's cache (the attentions that it is compared with are counted in bf16).
        weights_dtype: fp32, bf16, fp16, fp8, int8 or int4; None for what the checkpoint stores.
        stored: what that is, where files say more than the config.

    Raises:
        RequestError: if the batch or the cache format is none that can be.
        CacheError: if this kind of cache cannot be stored in `kv_dtype`.
        ConfigError: if `weights_dtype` is unknown.
    """
    if batch < 1:
        raise RequestError(f"A batch of {batch} sequences cannot be planned; ask for 1 or more.")
    kv_format = as_kv_format(kv_dtype)
    context = context or config.max_positions
    weights_dtype = None if weights_dtype == "auto" else weights_dtype
    if weights_dtype is None and stored is not None:
        dtype, weights = stored.types, stored.nbytes
    else:
        dtype = short_dtype(weights_dtype) if weights_dtype else checkpoint_dtype(config)
        weights = weight_bytes(config, dtype)
    qk_dim, v_dim = _head_dims(config.cached_attention)
    mla = config.cached_attention if isinstance(config.cached_attention, MLAConfig) else None

    def row(
        attention: str,
        kv_heads: int | None,
        own: KVFormat | None,
        per_token: int,
        per_page: int | None = None,
        per_sequence: int = 0,
    ) -> CacheRow:
        page = per_token * PAGE_SIZE if per_page is None else per_page
        cache = batch * (-(-context // PAGE_SIZE) * page + per_sequence)
        room = {m.name: m.free - weights - batch * per_sequence for m in memory}
        return CacheRow(
            attention=attention,
            this_model=own is not None,
            kv_heads=kv_heads,
            kv_dtype=own or "bf16",
            bytes_per_token=per_token,
            bytes_per_sequence=per_sequence,
            cache_bytes=cache,
            ratio_to_mha=per_token / mha_bytes(config),
            fits={m.name: weights + cache <= m.free for m in memory},
            longest_context={name: _longest_context(free, batch, page) for name, free in room.items()},
        )

    specs = config.specs(kv_format)
    # Some pages keep more than their tokens.
    sizes = bytes_per_token(specs), page_bytes(specs), sequence_bytes(specs)
    rows = [row(*_own_attention(config), kv_format, *sizes)]
    for name, heads in _compared_with(config):
        rows.append(row(name, heads, None, mha_bytes_per_token(config.num_layers, heads, qk_dim, v_dim)))
    return Plan(
        model=model,
        model_type=config.model_type,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        qk_head_dim=qk_dim,
        v_head_dim=v_dim,
        kv_lora_rank=mla.kv_lora_rank if mla else None,
        qk_rope_head_dim=mla.qk_rope_head_dim if mla else None,
        parameters=count_parameters(config),
        active_parameters=count_active_parameters(config),
        mtp_parameters=count_mtp_parameters(config),
        weights_dtype=dtype,
        weights_bytes=weights,
        max_context=config.max_positions,
        context=context,
        batch=batch,
        page_size=PAGE_SIZE,
        cache=tuple(rows),
        kv_dtypes=_bytes_by_format(config),
        mtp_cache_bytes=batch * -(-context // PAGE_SIZE) * _mtp_page_bytes(config, kv_format),
        memory=tuple(memory),
    )


def as_kv_format(name: str) -> KVFormat:
    """The cache format called `name`.

    Raises:
        RequestError: if there is none.
    """
    for known in KV_FORMATS:
        if short_dtype(name) == known:
            return known
    raise RequestError(f"{name!r} is not a cache format; choose from {', '.join(KV_FORMATS)}.")


def mha_bytes(config: ModelConfig) -> int:
    """Bytes a token that bf16 multi-head attention of the same model would cache: 2 H (Dn + R + Dv) in each layer.

    In every layer: those that keep nothing of a token, too, would then be multi-head attention.
    """
    return mha_bytes_per_token(config.num_layers, config.num_heads, *_head_dims(config.cached_attention))


def _head_dims(attention: MLAConfig | GQAConfig) -> tuple[int, int]:
    """Width of a key and of a value of one head, if each head cached its own."""
    if isinstance(attention, MLAConfig):
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
    return attention.head_dim, attention.head_dim


def _own_attention(config: ModelConfig) -> tuple[str, int | None]:
    attention = config.cached_attention
    if isinstance(attention, MLAConfig):
        return f"{config.recurrent.short_name} and MLA" if config.recurrent else "MLA", None
    heads = attention.num_kv_heads
    return _grouped_name(heads, config.num_heads), heads


def _grouped_name(kv_heads: int, num_heads: int) -> str:
    if kv_heads == num_heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else f"GQA, {kv_heads} KV heads"


def _compared_with(config: ModelConfig) -> list[tuple[str, int]]:
    """MHA, GQA with 8 KV heads (where that is fewer than all) and MQA, less what the model has itself."""
    own = _own_attention(config)[1]
    grouped = [config.num_heads, *([8] if config.num_heads > 8 else []), *([1] if config.num_heads > 1 else [])]
    return [(_grouped_name(heads, config.num_heads), heads) for heads in grouped if heads != own]


def _own_bytes(config: ModelConfig, kv_dtype: KVFormat) -> int:
    return bytes_per_token(config.specs(kv_dtype))


def _bytes_by_format(config: ModelConfig) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for kv_dtype in KV_FORMATS:
        try:
            sizes[kv_dtype] = _own_bytes(config, kv_dtype)
        except CacheError:
            continue  # this kind of cache has no such format
    return sizes


def _mtp_page_bytes(config: ModelConfig, kv_dtype: KVFormat) -> int:
    """What drafts by multi-token prediction add to a page."""
    if not config.num_mtp_layers:
        return 0
    return page_bytes(config.specs(kv_dtype, mtp=stored_dtype(config))) - page_bytes(config.specs(kv_dtype))


def _longest_context(room: int, batch: int, page: int) -> int:
    """Tokens that each of `batch` sequences can have in `room` bytes, in whole pages of so many bytes."""
    return max(0, room // (batch * page)) * PAGE_SIZE
