"""The layers of a model that mixes recurrent ones with latent attention: which are which, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latentkv.errors import ConfigError
from latentkv.models.config import KDAConfig, LayerConfig, LightningConfig, MoEConfig
from latentkv.models.fields import read_number, read_optional, shown
from latentkv.ops.kda import TAPS
from latentkv.ops.swiglu_limit import SwigluLimit

if TYPE_CHECKING:
    from latentkv.models.config_reader import Fields
    from latentkv.models.families import Family

_KINDS = ("full_attention", "linear_attention")
_OTHER_NAMES = {"indexed_attention": "full_attention"}
"""GLM-5.3's word for latent attention that has an indexer."""
_NESTED = "linear_attn_config"
"""Kimi-Linear's own place for what concerns its linear layers; layers count from 1 there."""

# What lightning layers might be otherwise, with the values that they have in every published model, or are meant.
_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "use_qk_norm": (None, True),
    "linear_rope": (None, True),
    "linear_silu": (None, False),
    "use_linear_silu": (None, False),
    "use_bias": (None, False),
    "use_qkv_bias": (None, False),
    "gated_attention_proj_granularity_type": (None,),
}


def read_hybrid_layers(
    fields: Fields, family: Family, latent: LayerConfig, sparse: Sequence[bool], shares: Sequence[bool]
) -> tuple[LayerConfig, ...]:
    """Every layer of the model.

    Args:
        fields: of its config.json.
        family: of the model.
        latent: a layer of latent attention with experts.
        sparse: which layers have experts.
        shares: which layers read what an indexer before them has selected, if they are latent attention.

    Raises:
        ConfigError: a field is missing, out of range or not supported.
    """
    nested = fields.get(_NESTED) or {}
    if not isinstance(nested, Mapping):
        raise ConfigError(f"config.json: {_NESTED} must be an object, not {shown(nested)}.")
    plain = replace(latent, indexer=None)
    if family.recurrent == "lightning":
        recurrent = _read_lightning(fields, plain, len(sparse))
    else:
        recurrent = [replace(plain, attention=_read_kda(fields, family, nested), rope=None)] * len(sparse)
    kinds = _kinds(fields, family, nested, len(sparse))
    routed = _limits(fields, "expert_swiglu_limit_list", sparse)
    shared = _limits(fields, "share_expert_swiglu_limit_list", sparse)
    _require_shared_width(fields, latent.moe)
    layers: list[LayerConfig] = []
    for i, kind in enumerate(kinds):
        layer = replace(latent, shares_selection=shares[i]) if kind == "full_attention" else recurrent[i]
        if layer.shares_selection and (not i or kinds[i - 1] != "full_attention"):
            raise ConfigError(
                f"config.json: layer {i} is to share what the layer before it has selected, which selects nothing."
            )
        moe = latent.moe if sparse[i] else None
        if moe is not None:
            moe = replace(
                moe,
                swiglu_limit=routed[i] or moe.swiglu_limit,
                shared_swiglu_limit=shared[i] or moe.shared_swiglu_limit,
            )
        layers.append(replace(layer, moe=moe))
    return tuple(layers)


def _read_kda(fields: Fields, family: Family, nested: Mapping[str, Any]) -> KDAConfig:
    # What transformers writes comes first: there `head_dim` is another's.
    taps = _size(fields, nested, "short_conv_kernel_size", "linear_conv_kernel_dim", "short_conv_kernel_size")
    if taps != TAPS:
        raise ConfigError(f"config.json: short convolutions of {taps} tokens are not supported; only {TAPS} are.")
    return KDAConfig(
        num_heads=_size(fields, nested, "num_heads", "linear_num_heads", "num_attention_heads"),
        head_dim=_size(fields, nested, "head_dim", "linear_head_dim", "head_dim"),
        norm_eps=fields.positive("rms_norm_eps", 0.0),
        lower_bound=_lower_bound(fields, family, nested),
        low_rank_gates=family.recurrent == "kda, low rank",
        rates_around=family.rates_around,
    )


def _lower_bound(fields: Fields, family: Family, nested: Mapping[str, Any]) -> float | None:
    """What bounds the logarithm of the decay; None: nothing does."""
    if family.kda_bound is None:
        return None
    key, flag = family.kda_bound
    if flag is not None and not fields.flag(flag):
        return None
    value = nested["gate_lower_bound"] if "gate_lower_bound" in nested else fields.get(key)
    if value is None and nested and nested.get("safe_gate", True):
        value = -5.0
    bound = None if value is None else read_number(value, key)
    if bound is not None and not -80 <= bound < 0:
        raise ConfigError(f"config.json: {key} must be below 0 and at least -80, not {bound}.")
    return bound


def _read_lightning(fields: Fields, latent: LayerConfig, num_layers: int) -> list[LayerConfig]:
    """Each layer as if it were lightning attention: from layer to layer it forgets more slowly.

    The pace of layer i of N is 1 - i / (N - 1) + 1e-5 times a head's: so SGLang, vLLM and the publisher's training code
    compute it, which counts from 1 and subtracts 1. The modelling file that the publisher gives out subtracts 1 from i,
    which there counts from 0: `slope_layer_offset` -1 in config.json does the same.
    """
    for key, allowed in _ALWAYS.items():
        if fields.get(key) not in allowed:
            raise ConfigError(
                f"config.json: {key}={shown(fields.get(key))} is not supported with lightning attention; only "
                f"{allowed[-1]!r} is."
            )
    heads, dim, groups = (fields.size(key) for key in ("num_attention_heads", "head_dim", "group_norm_size"))
    key = "num_kv_heads_for_linear_attn"
    if fields.get(key) not in (None, heads):
        raise ConfigError(f"config.json: {key}={shown(fields.get(key))} is not supported; only {heads} is.")
    if heads * dim % groups:
        raise ConfigError(f"config.json: group_norm_size={groups} groups cannot share {heads * dim} numbers evenly.")
    rope, offset = latent.rope, fields.get("slope_layer_offset")
    if rope is None or _turned(fields, dim) != rope.dim:
        raise ConfigError(
            f"config.json: lightning attention turns {_turned(fields, dim)} of {dim} dimensions and latent attention "
            f"qk_rope_head_dim={rope.dim if rope else 0}; that is not supported, only as many of both is."
        )
    if offset not in (0, -1):
        raise ConfigError(f"config.json: slope_layer_offset must be 0 or -1, not {shown(offset)}.")
    halves = replace(rope, interleaved=False)
    return [
        replace(
            latent,
            rope=halves,
            attention=LightningConfig(
                num_heads=heads,
                head_dim=dim,
                norm_eps=fields.positive("rms_norm_eps", 0.0),
                num_groups=groups,
                decay_scale=1 - (i + offset) / max(num_layers - 1, 1) + 1e-5,
            ),
        )
        for i in range(num_layers)
    ]


def _turned(fields: Fields, head_dim: int) -> int:
    """Dimensions of a head of lightning attention that are turned."""
    if fields.get("rotary_dim") is not None:
        return fields.size("rotary_dim")
    key = "partial_rotary_factor"
    scaling = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or {}
    return int(head_dim * (read_optional(scaling.get(key, fields.get(key)), key) or 1.0))


def _size(fields: Fields, nested: Mapping[str, Any], inner: str, *keys: str) -> int:
    """A size by the name that it has in the nested object, or by the first of its other names that is there."""
    if nested.get(inner) is not None:
        return fields.whole(f"{_NESTED}.{inner}", nested[inner])
    return fields.size(next((key for key in keys if fields.get(key) is not None), keys[-1]))


def _kinds(fields: Fields, family: Family, nested: Mapping[str, Any], num_layers: int) -> list[str]:
    kinds = fields.get("layer_types")
    if isinstance(kinds, list):
        kinds = [_OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
            raise ConfigError(f"config.json: layer_types must name each of {num_layers} layers {' or '.join(_KINDS)}.")
        return kinds
    if "full_attn_layers" in nested and "kda_layers" in nested:
        return _listed_kinds(nested, num_layers)
    every = fields.size("layer_group_size") if family.group_ends else 4
    if family.group_ends and not family.part_of_group and num_layers % every:
        raise ConfigError(
            f"config.json: {num_layers} layers are no whole number of groups of layer_group_size={every}: "
            "give layer_types, which say what the last ones are."
        )
    if family.group_ends:
        return [_KINDS[(i + 1) % every != 0] for i in range(num_layers)]
    return [_KINDS[not i or i % every != 0] for i in range(num_layers)]


def _listed_kinds(nested: Mapping[str, Any], num_layers: int) -> list[str]:
    """The kinds of layers that are listed by their numbers, each once."""
    lists = nested["full_attn_layers"], nested["kda_layers"]
    if not all(isinstance(numbers, list) for numbers in lists) or sorted(
        (number for numbers in lists for number in numbers), key=str
    ) != sorted(range(1, num_layers + 1), key=str):
        raise ConfigError(
            f"config.json: full_attn_layers and kda_layers of {_NESTED} must name each of the layers 1 to {num_layers} "
            "once."
        )
    return [_KINDS[number in lists[1]] for number in range(1, num_layers + 1)]


def _limits(fields: Fields, key: str, sparse: Sequence[bool]) -> list[SwigluLimit | None]:
    """The limit of each layer's activations, 0 and null for none; transformers has no such limits."""
    values = fields.get(key)
    if values is None:
        return [None] * len(sparse)
    if not isinstance(values, list) or len(values) < len(sparse):
        raise ConfigError(f"config.json: {key} must list a number for each of {len(sparse)} layers.")
    limits = [None if value is None else read_number(value, key) for value in values]
    for layer, limit in enumerate(limits[: len(sparse)]):
        if limit and (limit < 0 or not sparse[layer]):
            raise ConfigError(f"config.json: {key} gives layer {layer} the limit {limit}, which has no meaning there.")
    return [SwigluLimit(limit) if limit else None for limit in limits]


def _require_shared_width(fields: Fields, moe: MoEConfig | None) -> None:
    key = "moe_shared_expert_intermediate_size"
    width = fields.get(key)
    if moe is not None and width not in (None, moe.intermediate_size):
        raise ConfigError(f"config.json: {key}={shown(width)} is not supported; only {moe.intermediate_size} is.")
