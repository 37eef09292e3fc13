"""Calibration text through the source, layer by layer: the statistics, and how far attention looks back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentkv.convert.attention import GQAWeights
from latentkv.convert.source import SourceModel, attention_weights
from latentkv.convert.states import HiddenStates
from latentkv.convert.statistics import AttentionProfile, LayerStatistics, layer_statistics
from latentkv.models.decoder import DecoderLayer
from latentkv.models.gqa import GroupedQueryAttention
from latentkv.models.rope import Rotary, rotary


@dataclass(frozen=True)
class LayerView:
    """A layer of the source, and what it does on calibration text.

    Attributes:
        layer: itself, float32; its feed-forward part only where it was asked for.
        weights: its attention's projections, float64; norms on queries and keys are folded in.
        statistics: of its attention.
        norm_variation: of norms on queries and keys, how much what they multiply by varies; 0 without.
    """

    layer: DecoderLayer
    weights: GQAWeights
    statistics: LayerStatistics
    norm_variation: float


def positions_of(source: SourceModel, length: int) -> Rotary:
    """Rotary angles of a sequence's tokens, [1, S, d/2]."""
    return rotary(source.config.rope, torch.arange(length)[None], max_context=source.config.max_positions)


@torch.no_grad()
def view_layer(source: SourceModel, index: int, states: HiddenStates, *, feed_forward: bool = True) -> LayerView:
    """Load a layer, with or without its feed-forward part, and collect the statistics of its attention."""
    layer = source.layer(index, feed_forward=feed_forward)
    block = layer.self_attn
    if not isinstance(block, GroupedQueryAttention):
        raise TypeError(f"layer {index} has no grouped-query attention")
    weights, variation = attention_weights(layer), 0.0
    if block.config.qk_norm:
        weights, variation = _without_norms(weights, block, (layer.input_layernorm(piece) for piece in states.pieces()))
    positions = positions_of(source, states.shape[1])
    repeats = source.shape.num_heads // source.shape.num_kv_heads
    profile = AttentionProfile.empty(source.shape.num_heads, states.shape[1])
    output = weights.o.float()

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        for piece in states.pieces():
            x = layer.input_layernorm(piece)
            q, k, v = block.project(x, positions)
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
            counted = [profile.add(*one, output, block.scale) for one in zip(q, k, v, strict=True)]
            yield x.flatten(0, 1), torch.cat(counted)

    return LayerView(layer, weights, layer_statistics(weights, inputs(), profile, source.shape), variation)


def _without_norms(
    weights: GQAWeights, block: GroupedQueryAttention, inputs: Iterable[Tensor]
) -> tuple[GQAWeights, float]:
    """Norms on queries and keys as what they multiply by on average, which is no longer exact.

    Returns:
        The weights with gamma and the mean of 1 / RMS of every head folded in; the coefficient of variation of 1 / RMS,
        mean over heads.
    """
    factors: dict[str, list[Tensor]] = {"q": [], "k": []}
    for x in inputs:
        for name, projection in (("q", block.q_proj), ("k", block.k_proj)):
            heads = projection(x).unflatten(-1, (-1, block.config.head_dim)).double()
            factors[name].append((heads.square().mean(-1) + block.q_norm.eps).rsqrt().flatten(0, -2))
    folded, variations = {}, []
    for name, norm in (("q", block.q_norm), ("k", block.k_norm)):
        inverse = torch.cat(factors[name])
        variations.append(inverse.std(0) / inverse.mean(0))
        scale = (inverse.mean(0)[:, None] * norm.weight.double()).flatten()
        folded[name] = getattr(weights, name) * scale[:, None]
    return replace(weights, **folded), float(torch.cat(variations).mean())
