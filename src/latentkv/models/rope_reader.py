"""The rotary part of config.json -> `RopeConfig`: `rope_scaling` and `rope_theta`, or `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latentkv.errors import ConfigError
from latentkv.models.config import GQAConfig, MLAConfig, RopeConfig

if TYPE_CHECKING:
    from latentkv.models.config_reader import Fields
    from latentkv.models.families import Family

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
    params: Mapping[str, Any] = (
        fields.raw.get("rope_scaling")
        or fields.raw.get("rope_parameters")
        or family.defaults.get("rope_parameters")
        or {}
    )
    if any(isinstance(value, Mapping) for value in params.values()):
        raise ConfigError("config.json: rope parameters that differ between layers are not supported.")
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in _KINDS:
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_KINDS)}.")
    dim = attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim
    if dim % 2:
        raise ConfigError(f"config.json: rotary embedding needs an even number of dimensions, not {dim}.")
    _check_partial(fields, params, attention, dim)
    max_positions = fields.size("max_position_embeddings")
    outside, inside = (where.get("original_max_position_embeddings") for where in (fields.raw, params))
    original = int(outside or inside or max_positions)
    if not 0 < original <= 2**31:
        raise ConfigError(f"config.json: original_max_position_embeddings is {original}: it must be a positive number.")
    if params.get("factor") is None and kind in ("linear", "llama3"):
        raise ConfigError(f"config.json: rope type {kind!r} needs a 'factor'.")
    interleaved = bool(fields.get("rope_interleave")) if family.rope_interleaved is None else family.rope_interleaved
    return RopeConfig(
        dim=dim,
        theta=_positive(params, "rope_theta", fields.get("rope_theta")),
        kind=kind,
        interleaved=interleaved,
        factor=_positive(params, "factor", max_positions / original),
        original_max_positions=original,
        attention_factor=params.get("attention_factor"),
        mscale=params.get("mscale"),
        mscale_all_dim=params.get("mscale_all_dim"),
        beta_fast=_positive(params, "beta_fast", 32.0),
        beta_slow=_positive(params, "beta_slow", 1.0),
        truncate=bool(params.get("truncate", True)),
        low_freq_factor=_positive(params, "low_freq_factor", 1.0),
        high_freq_factor=_positive(params, "high_freq_factor", 4.0),
        short_factor=_factors(params, "short_factor", kind, dim),
        long_factor=_factors(params, "long_factor", kind, dim),
        query_scaling_beta=params.get("llama_4_scaling_beta"),
    )


def _positive(params: Mapping[str, Any], key: str, default: Any) -> float:
    """A finite number above 0; the default where the key is absent, null or 0."""
    value = float(params.get(key) or default)
    if not 0 < value < math.inf:
        raise ConfigError(f"config.json: rope's {key} is {value}: it must be a finite number above 0.")
    return value


def _check_partial(fields: Fields, params: Mapping[str, Any], attention: MLAConfig | GQAConfig, dim: int) -> None:
    """Some configs state the rotary share of a head; it must agree with the rotary dims that the attention has."""
    share = params.get("partial_rotary_factor", fields.raw.get("partial_rotary_factor"))
    if share is None or share == 1:
        return
    heads = (attention.qk_nope_head_dim + dim, dim) if isinstance(attention, MLAConfig) else (dim,)
    if not any(round(head * float(share)) == dim for head in heads):
        raise ConfigError(f"config.json: partial_rotary_factor={share} does not match {dim} rotary dimensions.")


def _factors(params: Mapping[str, Any], key: str, kind: str, dim: int) -> tuple[float, ...]:
    if kind != "longrope":
        return ()
    values = params.get(key)
    if not isinstance(values, list) or len(values) != dim // 2:
        raise ConfigError(f"config.json: longrope needs {key} with {dim // 2} numbers.")
    return tuple(float(value) for value in values)
