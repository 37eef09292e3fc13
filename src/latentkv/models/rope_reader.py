"""The rotary part of config.json -> `RopeConfig`: `rope_scaling` and `rope_theta`, or `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from latentkv.errors import ConfigError
from latentkv.models.config import GQAConfig, MLAConfig, RopeConfig
from latentkv.models.fields import read_flag, read_optional, read_positive, shown
from latentkv.models.rope import attention_factor, inverse_frequencies

if TYPE_CHECKING:
    from latentkv.models.config_reader import Fields
    from latentkv.models.families import Family

_LONGEST = 2**31
"""Tokens of a context; no model has more."""

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_OTHER_NAMES = {"su": "longrope", "deepseek_yarn": "yarn"}


def longest_context(rope: RopeConfig, max_positions: int) -> int:
    """Tokens of the longest sequence that a model was made for.

    A stretched model reads its original length times the factor; published recipes add the stretching to a config and
    leave `max_position_embeddings` as it was. llama3 is the exception: Llama 3.2 says 131,072 with a factor that would
    give twice as many, so there the field counts where it is more than the original length.

    Args:
        rope: of the model.
        max_positions: the config's `max_position_embeddings`.
    """
    left_alone = max_positions <= rope.original_max_positions
    if rope.kind in ("linear", "yarn", "longrope") or (rope.kind == "llama3" and left_alone):
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions


def read_rope(fields: Fields, family: Family, attention: MLAConfig | GQAConfig) -> RopeConfig:
    """Read the rotary embedding of a model with this attention.

    Raises:
        ConfigError: the kind is not supported, or a value that the kind needs is missing.
    """
    params = _parameters(fields, family)
    if not family.rotates:
        return RopeConfig(attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else 0, kind="none")
    if any(isinstance(value, Mapping) for value in params.values()):
        raise ConfigError("config.json: rope parameters that differ between layers are not supported.")
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = _OTHER_NAMES.get(str(kind), kind)
    if kind not in _KINDS:
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_KINDS)}.")
    dim = _rotary_dim(fields, family, params, attention)
    if dim % 2 or not dim:
        raise ConfigError(f"config.json: rotary embedding needs an even number of dimensions, not {dim}.")
    max_positions = fields.size("max_position_embeddings")
    outside, inside = (where.get("original_max_position_embeddings") for where in (fields.raw, params))
    key = "original_max_position_embeddings"
    original = int(read_positive(outside, key, read_positive(inside, key, max_positions)))
    if not 0 < original <= 2**31:
        raise ConfigError(f"config.json: {key} is {original}: it must be a whole number from 1 to {2**31:,}.")
    if params.get("factor") is None and kind in ("linear", "llama3"):
        raise ConfigError(f"config.json: rope type {kind!r} needs a 'factor'.")
    interleaved = fields.flag("rope_interleave") if family.rope_interleaved is None else family.rope_interleaved
    rope = RopeConfig(
        dim=dim,
        theta=read_positive(params.get("rope_theta") or fields.number("rope_theta"), "rope_theta", 0.0),
        kind=kind,
        interleaved=interleaved,
        factor=_positive(params, "factor", max_positions / original),
        original_max_positions=original,
        attention_factor=read_optional(params.get("attention_factor"), "rope's attention_factor"),
        mscale=read_optional(params.get("mscale"), "rope's mscale"),
        mscale_all_dim=read_optional(params.get("mscale_all_dim"), "rope's mscale_all_dim"),
        beta_fast=_positive(params, "beta_fast", 32.0),
        beta_slow=_positive(params, "beta_slow", 1.0),
        truncate=read_flag(params.get("truncate", True), "rope's truncate"),
        low_freq_factor=_positive(params, "low_freq_factor", 1.0),
        high_freq_factor=_positive(params, "high_freq_factor", 4.0),
        short_factor=_factors(params, "short_factor", kind, dim),
        long_factor=_factors(params, "long_factor", kind, dim),
        query_scaling_beta=read_optional(params.get("llama_4_scaling_beta"), "rope's llama_4_scaling_beta") or None,
    )
    _require_computable(rope)
    return rope


def _require_computable(rope: RopeConfig) -> None:
    """Refuse numbers that are each of the right kind, and together lead to none."""
    try:
        longest = rope.original_max_positions * rope.factor
        frequencies = [inverse_frequencies(rope, max_context=length) for length in (1, _LONGEST)]
        factors = [attention_factor(rope), rope.softmax_factor]
        fits = all(bool(torch.isfinite(each).all()) for each in frequencies) and all(map(math.isfinite, factors))
    except (ArithmeticError, ValueError):
        longest, fits = 0.0, False
    if not fits or longest > _LONGEST:
        raise ConfigError(
            "config.json: the rotary embedding's numbers lead to angles or to a context that are not finite, or too "
            "large: fetch the file again."
        )


def _parameters(fields: Fields, family: Family) -> Mapping[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        found = fields.raw.get(key)
        if found is not None and not isinstance(found, Mapping):
            raise ConfigError(f"config.json: {key} must be an object, not {shown(found)}.")
        if found:
            return found
    return family.defaults.get("rope_parameters") or {}


def _positive(params: Mapping[str, Any], key: str, default: float) -> float:
    return read_positive(params.get(key), f"rope's {key}", default)


def _rotary_dim(fields: Fields, family: Family, params: Mapping[str, Any], attention: MLAConfig | GQAConfig) -> int:
    """How many of a head's dimensions are rotated; a share that is stated must agree with those of the attention."""
    key = "partial_rotary_factor"
    share = read_optional(params.get(key, fields.raw.get(key)), key)
    if isinstance(attention, GQAConfig) and family.rotary_share is not None:
        share = family.rotary_share if share is None else share
        if not 0 < share <= 1:
            raise ConfigError(f"config.json: {key} must be above 0 and at most 1, not {share}.")
        return int(attention.head_dim * share)
    dim = attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim
    heads = (attention.qk_nope_head_dim + dim, dim) if isinstance(attention, MLAConfig) else (dim,)
    if family.recurrent and fields.get("head_dim") is not None:  # of the other layers; Ling-3.0 means its share of that
        heads = (*heads, fields.size("head_dim"))
    if share not in (None, 1) and not any(round(head * share) == dim for head in heads):
        raise ConfigError(f"config.json: {key}={share} does not match {dim} rotary dimensions.")
    return dim


def _factors(params: Mapping[str, Any], key: str, kind: str, dim: int) -> tuple[float, ...]:
    if kind != "longrope":
        return ()
    values = params.get(key)
    if not isinstance(values, list) or len(values) != dim // 2:
        raise ConfigError(f"config.json: longrope needs {key} with {dim // 2} numbers.")
    return tuple(read_positive(value, f"rope's {key}", 0.0) for value in values)
