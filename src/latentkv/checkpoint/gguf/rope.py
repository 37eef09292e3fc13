"""The rotary part of a GGUF file's metadata -> `rope_parameters`, in transformers' words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from latentkv.checkpoint.gguf.metadata import Metadata, as_written
from latentkv.errors import CheckpointError

_ONE, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (_ONE, _LONG, _SHORT)
"""Small tensors with a divisor for each frequency, which belong to the config."""

_KINDS = ("none", "linear", "yarn", "longrope")
# Converters of llama.cpp take these for granted when they work out the divisors of Llama 3.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_TOLERANCE = 1e-4


def rope_parameters(
    meta: Metadata, shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Sequence[float]], *, is_mla: bool
) -> dict[str, Any]:
    """How positions turn into angles.

    Args:
        meta: of the file.
        shapes: of its tensors.
        factors: the numbers of those of `FACTOR_TENSORS` that it holds.
        is_mla: whether attention is latent; then the file holds YaRN's multiplier times 0.1.

    Raises:
        CheckpointError: the kind is not supported, or a number is missing or of another kind.
    """
    theta = meta.number("rope.freq_base", 10000.0)
    found = {"rope_type": "default", "rope_theta": theta} | _scaling(meta, shapes, factors, theta, is_mla=is_mla)
    return found | _temperature(meta, found)


def _scaling(
    meta: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Sequence[float]],
    theta: float,
    *,
    is_mla: bool,
) -> dict[str, Any]:
    context = meta.whole("context_length")
    kind = meta.text("rope.scaling.type", "linear")
    if kind not in _KINDS:
        raise CheckpointError(
            f"The GGUF file's metadata: {meta.architecture}.rope.scaling.type={kind!r:.40} is not supported; "
            f"supported: {', '.join(_KINDS)}."
        )
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0)) or 1.0
    if _LONG in shapes or _SHORT in shapes or kind == "longrope":
        return _long(meta, factors, context)
    if _ONE in shapes and meta.architecture == "llama":
        if factor != 1:
            raise CheckpointError(f"The GGUF file has both {_ONE} and a rope.scaling.factor, which is not supported.")
        return _divisors(_values(factors, _ONE), theta, context)
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return _yarn(meta, factor, context, is_mla=is_mla)


def _yarn(meta: Metadata, factor: float, context: int, *, is_mla: bool) -> dict[str, Any]:
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        if meta.number(key, 1.0) != 1:
            raise CheckpointError(
                f"The GGUF file's metadata: {meta.architecture}.{key}={meta.number(key)} is not supported; only 1 is."
            )
    original = meta.whole("rope.scaling.original_context_length", context)
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # Of latent attention the file holds 0.1 x mscale_all_dim (llama.cpp's converter writes it so, its loader takes the
    # 0.1 out). `mscale` is not stored: in every published model it is the same.
    multiplier = meta.number("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:
        mscale = round(10 * multiplier, 9) if is_mla else multiplier
        found |= {"mscale": mscale, "mscale_all_dim": mscale}
    return found


def _temperature(meta: Metadata, found: Mapping[str, Any]) -> dict[str, Any]:
    """What Mistral's queries are scaled by as a text grows past the original context."""
    beta = meta.number("attention.temperature_scale", 0.0)
    if not beta:
        return {}
    original = found.get("original_max_position_embeddings", meta.whole("context_length"))
    length = meta.whole("attention.temperature_length", original)
    if length != original:
        raise CheckpointError(
            f"The GGUF file's metadata: {meta.architecture}.attention.temperature_length={length} is not supported; "
            f"only the original context's {original} is."
        )
    return {"llama_4_scaling_beta": beta}


def _long(meta: Metadata, factors: Mapping[str, Sequence[float]], context: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": _values(factors, _LONG),
        "short_factor": _values(factors, _SHORT),
        "original_max_position_embeddings": meta.whole("rope.scaling.original_context_length", context),
        "attention_factor": meta.number("rope.scaling.attn_factor", 1.0),
    }


def _divisors(divisors: list[float], theta: float, context: int) -> dict[str, Any]:
    """Llama 3's kind where the divisors are those; otherwise the divisors as they are."""
    if all(divisor == 1 for divisor in divisors):
        return {}
    largest, half = max(divisors), len(divisors)
    llama3 = (_llama3_divisor(2 * math.pi * theta ** (i / half), largest) for i in range(half))
    if all(math.isclose(one, two, rel_tol=_TOLERANCE) for one, two in zip(divisors, llama3, strict=True)):
        return {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _ORIGINAL,
        }
    return {
        "rope_type": "longrope",
        "long_factor": divisors,
        "short_factor": divisors,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _llama3_divisor(wavelength: float, factor: float) -> float:
    if wavelength < _ORIGINAL / _HIGH:
        return 1.0
    if wavelength > _ORIGINAL / _LOW:
        return factor
    smooth = (_ORIGINAL / wavelength - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)


def _values(factors: Mapping[str, Sequence[float]], name: str) -> list[float]:
    values = [as_written(float(value)) for value in factors.get(name, ())]
    if not values:
        raise CheckpointError(f"The GGUF file lacks the tensor {name}, or it is empty: download it again.")
    if not all(0 < value < math.inf for value in values):
        raise CheckpointError(f"GGUF tensor {name} must hold numbers above 0: the file is damaged.")
    return values
