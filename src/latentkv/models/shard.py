"""`Shard`: which heads, width of feed-forward blocks and vocabulary one of several processes has of each layer.

The layers of a shard are ordinary layers of a smaller model: what their blocks give are parts of sums, which the
processes add up (`Team`). What is small, or what all have to compute alike, each of them has whole: norms, routers,
latents and what projects to them, indexers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from latentkv.checkpoint.cuts import Cut
from latentkv.checkpoint.names import layer_of
from latentkv.errors import ConfigError
from latentkv.models.config import AttentionConfig, GQAConfig, KDAConfig, LayerConfig, MLAConfig, ModelConfig

_HEAD_ROWS = 32
"""Rows of the output head that stay together, as its kernels read them."""

_WIDTHS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Columns of feed-forward blocks that stay together: the fewer, the more scales are stored."""

_EVEN = 1.05
"""The largest part over the mean up to which parts count as even: all wait for who has it."""

_BY_HEAD = re.compile(r"self_attn\.(?:(?:q|k|v|q_b|kv_b|g|f|f_b|g_b|b)_proj\.\w+|sinks|A_log|dt_bias|conv_taps)")
_OUT_OF_HEADS = re.compile(r"self_attn\.o_proj\.weight")
_BY_WIDTH = re.compile(r"mlp\.(?:(shared_experts?)\.)?(?:gate|up)_proj\.\w+|mlp\.experts\.gate_up_proj")
_OUT_OF_WIDTH = re.compile(r"mlp\.(?:(shared_experts?)\.)?down_proj\.weight|mlp\.experts\.down_proj")
_ADDED = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.(shared_experts?\.)?down_proj)\.bias")


class Team(Protocol):
    """The processes whose shards together are whole layers."""

    def combine(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The sum of what the processes' blocks give [..., hidden], and of the residual, rounded once to `dtype`."""
        ...

    def logits(self, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [T, V] float32 of final hidden states [T, hidden], of which `own` gives this process's."""
        ...


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of each layer, all about as large; the first ones have the unit that is left over."""

    index: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether it has what there is but once: the embedding, modules of multi-token prediction, biases of sums."""
        return self.index == 0

    def layer(self, config: ModelConfig, index: int) -> tuple[ModelConfig, LayerConfig]:
        """The smaller model, and its layer, that the shard of a layer is one of."""
        layer = config.layers[index]
        attention, heads = layer.attention, config.num_heads
        own = self._part(_heads(config, attention))
        if isinstance(attention, KDAConfig):
            attention = replace(attention, num_heads=own)
        elif isinstance(attention, GQAConfig):
            heads = own * heads // attention.num_kv_heads
            attention = replace(attention, num_kv_heads=own)
        else:
            heads = own
        moe = layer.moe
        if moe is not None:
            gated = moe.gated_shared_size
            moe = replace(
                moe,
                intermediate_size=self._width(moe.intermediate_size),
                gated_shared_size=self._width(gated) if gated else 0,
            )
        width = self._width(config.intermediate_size) if layer.is_dense else config.intermediate_size
        layer = replace(layer, attention=attention, moe=moe)
        return replace(config, num_heads=heads, intermediate_size=width), layer

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model with this shard's layers, for what these keep."""
        return replace(config, layers=tuple(self.layer(config, index)[1] for index in range(config.num_layers)))

    def head_rows(self, vocab_size: int, index: int | None = None) -> range:
        """The tokens whose logits this shard computes, or another one of the same count."""
        each = _HEAD_ROWS if vocab_size > _HEAD_ROWS * (self.count - 1) else 1
        begin, end = replace(self, index=self.index if index is None else index).own(-(-vocab_size // each))
        return range(begin * each, min(end * each, vocab_size))

    def cut(self, config: ModelConfig, name: str) -> Cut | None:
        """What it has of the decoder's tensor `name`, but for the output head; None: all."""
        index = layer_of(name)
        if index is None or not name.startswith("model.layers."):
            return None
        layer, leaf = config.layers[index], name.split(".", 3)[3]
        if _BY_HEAD.fullmatch(leaf):
            return self._of(_heads(config, layer.attention), _axis(leaf, layer), pieces=3 if "conv_taps" in leaf else 1)
        if _OUT_OF_HEADS.fullmatch(leaf):
            return self._of(_heads(config, layer.attention), -1)
        found = _BY_WIDTH.fullmatch(leaf) or _OUT_OF_WIDTH.fullmatch(leaf)
        if found is None:
            return None
        units = self._width_units(_width_of(config, layer, found[1]))
        if _OUT_OF_WIDTH.fullmatch(leaf):
            return self._of(units, -1)
        return self._of(units, -1 if leaf.endswith(".bias") else -2, pieces=2 if leaf.endswith("gate_up_proj") else 1)

    def lacks(self, name: str) -> bool:
        """Whether a tensor is added to sums, and so only the first shard's; zero in the others."""
        return not self.is_first and _ADDED.fullmatch(name) is not None

    def own(self, units: int) -> tuple[int, int]:
        """The first of its units, and where they end."""
        each, more = divmod(units, self.count)
        begin = self.index * each + min(self.index, more)
        return begin, begin + each + (self.index < more)

    def _of(self, units: int, axis: int, *, pieces: int = 1) -> Cut:
        return Cut(axis, *self.own(units), units, pieces)

    def _part(self, units: int) -> int:
        begin, end = self.own(units)
        return end - begin

    def _width(self, width: int) -> int:
        units = self._width_units(width)
        return self._part(units) * (width // units)

    def _width_units(self, width: int) -> int:
        """As many as make the parts even, of as many columns each as can be, and of fewer than 32 only if they must."""
        units = [width // each for each in _WIDTHS if width % each == 0]
        large = [each for each in units if width // each >= 32 and each >= self.count]
        even = (each for each in large or units if -(-each // self.count) * self.count <= _EVEN * each)
        return next(even, (large or units)[-1])


WHOLE = Shard()
"""The only one there is."""


def require_can_be_shared_out(config: ModelConfig, count: int) -> None:
    """Raise `ConfigError` where the layers of a model cannot be shared out among so many processes."""
    if reason := _why_not(config, count):
        raise ConfigError(f"tensor_parallel={count} cannot be had: {reason}. Use fewer, or pipeline_parallel.")


def _why_not(config: ModelConfig, count: int) -> str | None:
    for layer in config.layers:
        attention, moe = layer.attention, layer.moe
        if not isinstance(attention, MLAConfig | GQAConfig | KDAConfig):
            return f"{attention.name} norms what all of its heads give together"
        if isinstance(attention, GQAConfig) and attention.qk_norm and not attention.qk_norm_per_head:
            return "its queries are normed over all heads together"
        if (heads := _heads(config, attention)) < count:
            return f"a layer has {heads} {'key/value ' if isinstance(attention, GQAConfig) else ''}heads"
        if moe is not None and moe.num_zero_experts:
            return "some of its experts give tokens back as they are"
        if layer.shortcut is not None:
            return "its experts stand at the end of shortcuts"
        widths = [config.intermediate_size] if layer.is_dense else []
        if moe is not None:
            widths += [width for width in (moe.intermediate_size, moe.gated_shared_size) if width]
        if min(widths) < count:
            return f"a feed-forward block is {min(widths)} wide"
    return f"its vocabulary has {config.vocab_size} tokens" if config.vocab_size < count else None


def _heads(config: ModelConfig, attention: AttentionConfig) -> int:
    """What a layer's heads are shared out in: heads, or groups of them that share a key."""
    if isinstance(attention, MLAConfig):
        return config.num_heads
    return attention.num_kv_heads if isinstance(attention, GQAConfig) else attention.num_heads


def _width_of(config: ModelConfig, layer: LayerConfig, shared: str | None) -> int:
    """The width by which a feed-forward block is shared out; several shared experts are as one expert is."""
    if layer.moe is None:
        return config.intermediate_size
    return layer.moe.gated_shared_size if shared == "shared_expert" else layer.moe.intermediate_size


def _axis(leaf: str, layer: LayerConfig) -> int:
    """The axis of a parameter along which heads lie."""
    if leaf.endswith("A_log"):
        return -2 if isinstance(layer.attention, KDAConfig) and layer.attention.rates_around else -1
    return -2 if leaf.endswith("weight") else -1
