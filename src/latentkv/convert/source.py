"""The model that is converted: what it must be, and the weights of one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentkv.checkpoint.filling import Match, match_parameters
from latentkv.checkpoint.names import layer_of
from latentkv.checkpoint.tensors import Tensors
from latentkv.convert.attention import GQAWeights, HeadShape
from latentkv.convert.convertible import require_convertible_model
from latentkv.models.config import GQAConfig, ModelConfig
from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.models.rope import attention_factor, inverse_frequencies
from latentkv.models.stored_config import open_checkpoint


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint with grouped-query attention.

    Attributes:
        config: of the model.
        attention: its attention.
        reader: its files.
        match: where the decoder's tensors lie there.
        shapes: {name in the decoder: shape}; experts are fused.
    """

    config: ModelConfig
    attention: GQAConfig
    reader: Tensors
    match: Match
    shapes: dict[str, tuple[int, ...]]

    @property
    def shape(self) -> HeadShape:
        """Of its heads."""
        return HeadShape(self.config.num_heads, self.attention.num_kv_heads, self.attention.head_dim)

    @property
    def frequencies(self) -> Tensor:
        """theta_l, [d / 2] float64."""
        return inverse_frequencies(self.config.rope, max_context=self.config.max_positions)

    @property
    def scale(self) -> float:
        """What its scores are multiplied by, the factor on cos and sin (of YaRN) included."""
        return self.attention.score_scale * attention_factor(self.config.rope) ** 2

    def layer_names(self, index: int) -> list[str]:
        """Names in the decoder of a layer's tensors."""
        return [name for name in self.shapes if layer_of(name) == index]

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the layers."""
        return [name for name in self.shapes if layer_of(name) is None]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor by its name in the decoder."""
        tensor = torch.empty(self.shapes[name], dtype=dtype)
        self.match.fill({name: tensor})
        return tensor

    @property
    def head_is_embedding(self) -> bool:
        """Whether they are one matrix even when what multiplies each of them is part of it."""
        config = self.config
        return config.tie_word_embeddings and config.embedding_multiplier == config.logit_multiplier == 1.0

    def folded(self, name: str, dtype: torch.dtype, origin: str | None = None) -> Tensor:
        """A tensor of a model that is the same and multiplies nothing: Granite's scalars are part of its weights.

        Args:
            name: in the decoder.
            dtype: of the result.
            origin: the tensor that it is made of, where that has another name.
        """
        factor = self.multiplier(name)
        tensor = self.read(origin or name, dtype if factor == 1.0 else torch.float32)
        return tensor if factor == 1.0 else tensor.mul_(factor).to(dtype)

    def multiplier(self, name: str) -> float:
        """What the model multiplies by, besides a tensor."""
        config = self.config
        if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")):
            return config.residual_multiplier
        return {
            "model.embed_tokens.weight": config.embedding_multiplier,
            "lm_head.weight": config.logit_multiplier,
        }.get(name, 1.0)

    def layer(self, index: int, *, feed_forward: bool = True) -> DecoderLayer:
        """A layer in float32, ready to run over whole sequences.

        Args:
            index: of the layer.
            feed_forward: load that part too, most of its weights; else it stays on the meta device.
        """
        with torch.device("meta"):
            layer = DecoderLayer(self.config, self.config.layers[index], max_context=self.config.max_positions)
        prefix = f"model.layers.{index}."
        names = (name for name in self.layer_names(index) if feed_forward or ".mlp." not in name)
        tensors = {name.removeprefix(prefix): self.read(name, torch.float32) for name in names}
        layer.load_state_dict(tensors, assign=True, strict=feed_forward)
        return layer.eval().requires_grad_(False)


def open_source(folder: Path) -> SourceModel:
    """Open a model to convert.

    Raises:
        ConfigError: it cannot be converted, and why.
        CheckpointError: its files are damaged, or tensors are missing, unexpected or misshapen, each named.
    """
    config, reader = open_checkpoint(folder)
    attention = require_convertible_model(folder, config)
    with torch.device("meta"):
        state = Decoder(config, max_context=config.max_positions).state_dict()
    match = match_parameters(state, reader, num_layers=config.num_layers)
    return SourceModel(config, attention, reader, match, {name: tuple(t.shape) for name, t in state.items()})


def attention_weights(layer: DecoderLayer) -> GQAWeights:
    """The projections of a layer of `SourceModel.layer`, in float64."""
    block = layer.self_attn

    def double(name: str) -> Tensor | None:
        parameter = dict(block.named_parameters()).get(name)
        return None if parameter is None else parameter.double()

    weights = {name: double(f"{name}_proj.weight") for name in ("q", "k", "v", "o")}
    biases = {f"{name}_bias": double(f"{name}_proj.bias") for name in ("q", "k", "v", "o")}
    return GQAWeights(**weights, **biases)  # type: ignore[arg-type]
