"""Rotary position embedding: inverse frequencies of each kind, and the rotation of a step's tokens."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from latentkv.models.config import RopeConfig, yarn_mscale
from latentkv.models.selection import Selection, Shortcut


class Rotary(NamedTuple):
    """What one step's positions mean: cos and sin [..., R/2] float32, and the query's scale [...] or None.

    `selection` is which tokens they read, and `shortcut` what experts of a later layer read; both are empty when a step
    begins, and layers fill them in.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None
    selection: Selection
    shortcut: Shortcut


def rotary(config: RopeConfig, positions: Tensor, *, max_context: int) -> Rotary:
    """Angles of `positions` [...] int64.

    Angles are computed in float64, so that position 131,071 is as exact as position 1. cos and sin carry the
    attention factor. The query scale is Llama 4's 1 + beta ln(1 + floor(position / original_max_positions)).

    Args:
        config: the rotary embedding.
        positions: index of each token in its sequence.
        max_context: the longest sequence that this model instance may see; chooses longrope's factors once.
    """
    frequencies = _frequencies_on(positions.device, config, max_context)
    angles = positions.to(torch.float64)[..., None] * frequencies
    factor = attention_factor(config)
    scale = None
    if config.query_scaling_beta is not None:
        steps = torch.floor(positions.to(torch.float32) / config.original_max_positions)
        scale = 1 + config.query_scaling_beta * torch.log1p(steps)
    return Rotary((angles.cos() * factor).float(), (angles.sin() * factor).float(), scale, Selection(), Shortcut())


@cache
def _frequencies_on(device: torch.device, config: RopeConfig, max_context: int) -> Tensor:
    """Copied to a GPU once, not in every step."""
    return inverse_frequencies(config, max_context=max_context).to(device)


@cache
def inverse_frequencies(config: RopeConfig, *, max_context: int) -> Tensor:
    """Angle per position of each rotated pair, [dim / 2] float64 on the CPU; computed once, so do not change it."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float64, device="cpu") / config.dim
    plain = config.theta**-exponents
    if config.kind == "none":
        return torch.zeros_like(plain)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "yarn":
        return _yarn(config, plain)
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "longrope":
        # Chosen by the longest possible sequence, never by the current one: cached keys would change their meaning.
        factors = config.long_factor if max_context > config.original_max_positions else config.short_factor
        return plain / torch.tensor(factors, dtype=torch.float64, device="cpu")
    return plain


def attention_factor(config: RopeConfig) -> float:
    """What multiplies cos and sin (and so q and k alike): YaRN, section 3.4; longrope, section 3.3."""
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.kind == "longrope":
        if config.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor)


def _yarn(config: RopeConfig, plain: Tensor) -> Tensor:
    """Pairs that turn often keep their frequency, slow ones are interpolated, a linear ramp between (section 3.2)."""

    def pair_that_turns(times: float) -> float:
        spans = config.original_max_positions / (times * 2 * math.pi)
        return config.dim * math.log(spans) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(config.dim // 2, dtype=torch.float64, device="cpu")
    interpolated = ((index - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are interpolated, short ones kept, a smooth blend between."""
    waves_in_context = config.original_max_positions * plain / (2 * math.pi)
    kept = (waves_in_context - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain / config.factor * (1 - kept) + plain * kept
