"""The one decoder: every supported family is this module under another `ModelConfig`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentkv import ops
from latentkv.errors import ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config import (
    HyperConnectionConfig,
    IndependentHyperConnectionConfig,
    KDAConfig,
    LayerConfig,
    LightningConfig,
    MLAConfig,
    ModelConfig,
)
from latentkv.models.forms import Form
from latentkv.models.gqa import GroupedQueryAttention
from latentkv.models.hyper_connections import HyperConnection
from latentkv.models.independent_hyper_connections import HyperHead, IndependentHyperConnection
from latentkv.models.indexer import HeadWeights, Indexer
from latentkv.models.kda import KimiDeltaAttention
from latentkv.models.layers import MLP, Embedding, GatedRMSNorm, Linear, OutputHead, RMSNorm
from latentkv.models.lightning import LightningAttention
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.moe import Experts, MoE, Router
from latentkv.models.packing import Packer
from latentkv.models.recurrent import RecurrentAttention
from latentkv.models.rope import Rotary, rotary
from latentkv.models.shard import Team
from latentkv.models.stage import Absent, Stage
from latentkv.state import LayerState, PagedCache
from latentkv.weights import PackedWeight

_WITH_EXACT_PARTS = (
    KimiDeltaAttention,
    HyperConnection,
    IndependentHyperConnection,
    HyperHead,
    Indexer,
    MultiHeadLatentAttention,
    OutputHead,
)


_SUMMED = ("mlp", "experts", "shared_expert", "o_proj", "down_proj")
"""Ends of the names of modules that give what is added to the residual stream."""


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, feed-forward (dense or experts), residual; experts at the end of a shortcut.

    Where the model has several residual streams, a hyper-connection takes the residual's place around each block.

    Attributes:
        team: the processes whose shards of this layer add up, where there are several.
    """

    team: Team | None = None

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, max_context: int) -> None:
        super().__init__()
        self.self_attn = _attention(config, layer, max_context)
        experts = None
        if layer.moe is not None:
            experts = MoE(config.hidden_size, layer.moe, norm_eps=config.rms_norm_eps, bias=config.mlp_bias)
        if layer.is_dense or experts is None:
            limit = config.swiglu_limit
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, limit=limit)
            self.shortcut = experts
        else:
            self.mlp, self.shortcut = experts, None
        self.begins_shortcut = layer.shortcut == "begins"
        self.input_layernorm = _norm(config, gated=True)
        self.post_attention_layernorm = _norm(config, gated=not layer.is_dense)
        self.residual_multiplier = config.residual_multiplier
        self.attn_hc = self.ffn_hc = None
        if config.hyper_connections is not None:
            self.attn_hc, self.ffn_hc = (_connection(config, config.hyper_connections) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        positions: Rotary,
        batch: Batch | None = None,
        state: LayerState | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """[B, S, hidden] whole sequences, or with a batch and the layer's state [T, hidden] new tokens.

        Where the model has n residual streams, x and the result are [..., n, hidden].
        """
        if self.attn_hc is not None and self.ffn_hc is not None:
            h, mix = self.attn_hc.read(x)
            h = self.input_layernorm(h)
            if batch is None or state is None:
                block = self.self_attn(h, positions)
            else:
                block = self._attend(h, positions, batch, state, None, form)
            x = self.attn_hc.write(x, block, mix)
            h, mix = self.ffn_hc.read(x)
            return self.ffn_hc.write(x, self._feed(self.post_attention_layernorm(h), None), mix)
        if batch is None or state is None:
            x = self.between(x, positions)
            h = self.post_attention_layernorm(x)
            return self._follow_shortcut(h, self._add(x, self.mlp(h)), positions)
        # Blocks add the residual stream themselves, which saves a rounding, unless they are to be multiplied first.
        plain = self.residual_multiplier == 1.0
        h, residual = self.input_layernorm(x), x if plain else None
        block = self._attend(h, positions, batch, state, residual, form)
        x = block if plain else self._add(x, block)
        h, residual = self.post_attention_layernorm(x), x if plain else None
        block = self._feed(h, residual)
        return self._follow_shortcut(h, block if plain else self._add(x, block), positions)

    def between(self, x: Tensor, positions: Rotary) -> Tensor:
        """The residual stream of whole sequences between attention and feed-forward: [B, S, hidden] -> the same."""
        return self._add(x, self.self_attn(self.input_layernorm(x), positions))

    def attend_whole(self, h: Tensor, positions: Rotary) -> Tensor:
        """What attention alone gives of whole sequences, normed already: [B, S, hidden] -> the same."""
        return self.self_attn(h, positions)

    def _attend(
        self,
        h: Tensor,
        positions: Rotary,
        batch: Batch,
        state: LayerState,
        residual: Tensor | None,
        form: Form | None,
    ) -> Tensor:
        """What attention gives, plus the residual."""
        if self.team is None:
            return self.self_attn.attend(h, positions, batch, state, residual, form)
        return self.team.combine(self.self_attn.attend(h, positions, batch, state, None, form), residual, h.dtype)

    def _feed(self, h: Tensor, residual: Tensor | None) -> Tensor:
        """What the feed-forward block gives, plus the residual; experts see to their sum themselves."""
        if self.team is None or isinstance(self.mlp, MoE):
            return self.mlp(h, residual)
        return self.team.combine(self.mlp(h), residual, h.dtype)

    def join(self, team: Team) -> None:
        """Have what blocks give added up with the other shards'. Parts of sums are float32."""
        self.team = team
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                module.team = team
            if isinstance(module, MLP | Experts | Linear) and name.endswith(_SUMMED):
                module.out_dtype = torch.float32

    def _follow_shortcut(self, h: Tensor, x: Tensor, positions: Rotary) -> Tensor:
        """x, with what the experts at a shortcut's end give; where one begins, h is left for them."""
        if self.begins_shortcut:
            positions.shortcut.x = h
        if self.shortcut is None:
            return x
        begun, positions.shortcut.x = positions.shortcut.x, None
        if begun is None:
            raise ConfigError("experts at the end of a shortcut need a layer before them in which one begins.")
        return self.shortcut(begun, x)

    def _add(self, x: Tensor, block: Tensor) -> Tensor:
        """The residual stream after a block."""
        return x + block if self.residual_multiplier == 1.0 else x + block * self.residual_multiplier


def _connection(
    config: ModelConfig, kind: HyperConnectionConfig | IndependentHyperConnectionConfig
) -> HyperConnection | IndependentHyperConnection:
    if isinstance(kind, HyperConnectionConfig):
        return HyperConnection(config.hidden_size, kind, config.rms_norm_eps)
    return IndependentHyperConnection(config.hidden_size, kind, config.rms_norm_eps)


def _norm(config: ModelConfig, *, gated: bool) -> RMSNorm | GatedRMSNorm:
    if gated and config.gated_norm_rank:
        return GatedRMSNorm(config.hidden_size, config.gated_norm_rank, config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


def _attention(
    config: ModelConfig, layer: LayerConfig, max_context: int
) -> MultiHeadLatentAttention | GroupedQueryAttention | RecurrentAttention:
    attention = layer.attention
    if isinstance(attention, KDAConfig):
        return KimiDeltaAttention(config.hidden_size, attention)
    if isinstance(attention, LightningConfig):
        return LightningAttention(config.hidden_size, attention)
    if isinstance(attention, MLAConfig):
        return MultiHeadLatentAttention(
            config.hidden_size,
            config.num_heads,
            kv_lora_rank=attention.kv_lora_rank,
            qk_nope_head_dim=attention.qk_nope_head_dim,
            qk_rope_head_dim=attention.qk_rope_head_dim,
            v_head_dim=attention.v_head_dim,
            q_lora_rank=attention.q_lora_rank,
            rope=layer.rope,
            bias=attention.bias,
            norm_eps=attention.latent_norm_eps,
            max_context=max_context,
            indexer=layer.indexer,
            shares_selection=layer.shares_selection,
            output_gate=attention.output_gate,
            q_lora_scale=attention.q_lora_scale,
            kv_lora_scale=attention.kv_lora_scale,
            sinks=attention.sinks,
        )
    if layer.rope is None:
        raise ConfigError("grouped-query attention without rotary embedding is not supported: give its layers a rope.")
    return GroupedQueryAttention(
        config.hidden_size,
        config.num_heads,
        attention,
        layer.rope,
        norm_eps=config.rms_norm_eps,
        sliding_window=layer.sliding_window,
    )


class MTPModule(nn.Module):
    """One multi-token-prediction module (DeepSeek-V3, section 2.2): predicts one token further than its input."""

    def __init__(self, config: ModelConfig, *, max_context: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config, config.mtp_layer, max_context=max_context)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, embedding: Tensor, positions: Rotary) -> Tensor:
        """Hidden states of tokens i and embeddings of tokens i + 1, [B, S, hidden] -> hidden states for i + 2."""
        return self.norm(self.layer(self.eh_proj(self.join(hidden, embedding)), positions))

    def join(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """What the module reads: [..., hidden] of both -> [..., 2 hidden]."""
        return torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)


class Trunk(nn.Module):
    """Embedding, layers and final norm; named as Hugging Face names them."""

    def __init__(self, config: ModelConfig, *, max_context: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, max_context=max_context) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        streams = config.hyper_connections
        self.hc_head = None
        if isinstance(streams, IndependentHyperConnectionConfig):
            self.hc_head = HyperHead(config.hidden_size, streams, config.rms_norm_eps)


class Decoder(nn.Module):
    """A decoder-only language model. Parameter names are those of its Hugging Face checkpoint.

    Once packed (`pack_module`) it can only be run: its weights are no parameters any more.

    Args:
        config: the model.
        max_context: the longest sequence this instance will see; None: `config.max_positions`.

    Attributes:
        stage: the layers, or shards of layers, that are here; other processes have the others.

    Raises:
        ConfigError: the layers differ in their rotary embedding.
    """

    packed_embedding: PackedWeight | None = None

    def __init__(self, config: ModelConfig, *, max_context: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_context = max_context or config.max_positions
        self.rope = config.rope  # a step has one set of angles
        self.stage = Stage.whole(config.num_layers)
        self.is_tied = config.tie_word_embeddings
        self._team: Team | None = None
        self.model = Trunk(config, max_context=self.max_context)
        if not config.tie_word_embeddings:
            self.lm_head = OutputHead(config.hidden_size, config.vocab_size, exact=config.exact_head)
        self.mtp = nn.ModuleList(MTPModule(config, max_context=self.max_context) for _ in range(config.num_mtp_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise for training: normal(0, initializer_range), norms 1, biases 0; without storage, nothing."""
        if self.model.embed_tokens.weight.is_meta:
            return
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Router):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                for name, parameter in module.named_parameters():
                    if name == "bias":
                        nn.init.zeros_(parameter)
            if isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
            if isinstance(module, KimiDeltaAttention | HyperConnection | IndependentHyperConnection | HyperHead):
                module.reset_parameters()

    def forward(self, batch: Batch, cache: PagedCache, *, form: Form | None = None) -> Tensor:
        """One step over the paged cache.

        Args:
            batch: the new tokens of all sequences.
            cache: read and written in place.
            form: of latent attention; None: the cheaper one for each sequence.

        Returns:
            final hidden states of the T new tokens, [T, hidden].
        """
        return self.run_layers(*self.inputs(batch), batch, cache, form=form)

    def inputs(self, batch: Batch) -> tuple[Tensor, Rotary]:
        """Embeddings [T, hidden], one for each residual stream where there are several, and rotary angles."""
        return self.embedded(batch), self.rotary(batch.positions)

    def embedded(self, batch: Batch) -> Tensor:
        """Embeddings of new tokens [T, hidden], one for each residual stream where there are several."""
        return self._streams(self.embed(batch.input_ids))

    def rotary(self, positions: Tensor) -> Rotary:
        """Angles of tokens at `positions` [...] int64."""
        return rotary(self.rope, positions, max_context=self.max_context)

    def run_layers(
        self, x: Tensor, positions: Rotary, batch: Batch, cache: PagedCache, *, form: Form | None = None
    ) -> Tensor:
        """`forward` from what `inputs` gives on, through the layers of this stage.

        The first stage reads what `inputs` gives, another what the one before it gives, which is [T, hidden], or
        [T, n, hidden] where the model has n residual streams.
        """
        for index, layer in enumerate(self.stage.own(list(self.model.layers))):
            x = layer(x, positions, batch, cache.view(index), form)
        return self._normed(x) if self.stage.is_last else x

    def forward_train(self, input_ids: Tensor, *, recompute: bool = False) -> Tensor:
        """Whole causal sequences without a cache, differentiable: ids [B, S] -> final hidden states [B, S, hidden].

        Args:
            input_ids: [B, S] int64.
            recompute: keep only each layer's input for the backward pass, which computes the layer once more.
        """
        x = self._streams(self.embed(input_ids))
        positions = self.angles(input_ids.shape[1])
        for layer in self.model.layers:
            x = checkpoint(layer, x, positions, use_reentrant=False) if recompute else layer(x, positions)
        return self._normed(x)

    def attention_outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What each layer's attention alone gives of an input of its own, differentiable.

        Args:
            inputs: [B, S, hidden] for each layer, whole sequences, normed already.

        Returns:
            [B, S, hidden] for each layer.
        """
        positions = self.angles(inputs[0].shape[1])
        layers = cast("Iterable[DecoderLayer]", self.model.layers)
        return [layer.attend_whole(h, positions) for layer, h in zip(layers, inputs, strict=True)]

    def angles(self, length: int) -> Rotary:
        """Rotary angles of whole sequences of `length` tokens, [1, length, ...]."""
        return self.rotary(torch.arange(length, device=self.model.norm.weight.device)[None])

    def mtp_hidden(self, index: int, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """Hidden states of MTP module `index`.

        Args:
            index: which module; module k predicts token i + k + 2 from position i.
            hidden: [B, S, hidden] final hidden states of the model (index 0) or of the module before.
            next_ids: [B, S] the token that follows each position (by index + 1).

        Returns:
            [B, S, hidden], to be given to `logits`.
        """
        # The module's inputs are shifted: row i stands for token i + index + 1, and is rotated as such.
        tokens = torch.arange(next_ids.shape[1], device=next_ids.device)[None] + index + 1
        return self.mtp[index](hidden, self.embed(next_ids), self.rotary(tokens))

    def mtp_inputs(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Rotary]:
        """What `run_mtp` reads: [T, 2 hidden], and rotary angles.

        Args:
            hidden: [T, hidden] final hidden states of the tokens before those of `batch`.
            batch: the tokens that follow them. A sequence's first token follows none: no row stands for it, and
                `kv_start` is 1.
        """
        x, positions = self.inputs(batch)
        return self._mtp_module.join(hidden, x), positions

    def run_mtp(
        self, x: Tensor, positions: Rotary, batch: Batch, cache: PagedCache, *, form: Form | None = None
    ) -> Tensor:
        """One step of the first MTP module over the paged cache, whose layer after the model's own is the module's.

        Args:
            x: what `mtp_inputs` gives.
            positions: likewise.
            batch: where its tokens belong: the state of a token lies in the slot of that token.
            cache: read and written in place.
            form: as in `forward`.

        Returns:
            [T, hidden], to be given to `logits`: what follows each of the tokens.
        """
        module = self._mtp_module
        state = cache.view(-1)
        return module.norm(module.layer(module.eh_proj(x), positions, batch, state, form))

    @property
    def _mtp_module(self) -> MTPModule:
        return cast(MTPModule, self.mtp[0])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids [...] -> scaled embeddings [..., hidden]."""
        embedded = self.model.embed_tokens(input_ids)
        return embedded if self.config.embedding_multiplier == 1.0 else embedded * self.config.embedding_multiplier

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., hidden] -> logits [..., V] float32.

        Inference computes them in float32 whatever the dtype of the weights; training, where a rounding does not
        choose a token, in the weights' own.
        """
        return self.own_logits(hidden) if self._team is None else self._team.logits(hidden, self.own_logits)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Those that this process computes: of the tokens of its shard of the output head."""
        if self.config.logit_multiplier != 1.0:
            hidden = hidden * self.config.logit_multiplier
        weight = self.output_weight
        if torch.is_grad_enabled() or hidden.dtype == torch.float32:
            hidden = hidden if isinstance(weight, PackedWeight) else hidden.to(weight.dtype)
            return ops.linear(hidden, weight).float()
        return ops.output_logits(hidden, weight)

    @property
    def output_weight(self) -> Tensor | PackedWeight:
        """[V, hidden]: the output head's weight, or the embedding's where they are tied."""
        if self.is_tied:
            return self.model.embed_tokens.weight if self.packed_embedding is None else self.packed_embedding
        return self.lm_head.weight if self.lm_head.packed is None else self.lm_head.packed

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.model.norm.weight.dtype

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """What holds the parameters of this stage, by name and in order, each to be loaded and packed by itself."""
        parts: list[tuple[str, nn.Module | None]] = [("model.embed_tokens", self.model.embed_tokens)]
        parts += [(f"model.layers.{index}", layer) for index, layer in enumerate(self.model.layers)]
        parts += [("model.norm", self.model.norm), ("model.hc_head", self.model.hc_head)]
        if not self.is_tied:
            parts.append(("lm_head", self.lm_head))
        parts += [(f"mtp.{index}", module) for index, module in enumerate(self.mtp)]
        yield from ((name, part) for name, part in parts if part is not None and not isinstance(part, Absent))

    def pack(self, packer: Packer) -> None:
        """See `Packable`: an output head that is tied to the embedding gets a packed copy of it."""
        if self.is_tied and self.stage.is_first:
            self.packed_embedding = packer.copy("model.embed_tokens.weight", as_name="lm_head.weight")

    def moe_layers(self) -> list[MoE]:
        """Every mixture-of-experts block, those of MTP modules included."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def keep_choices_exact(self) -> None:
        """Hold in float32 after a cast what decides between near-equal experts or tokens, or whose errors add up.

        That is every router's correction bias, and its weight where that is trained so, the projection of the weights
        of every indexer's heads, what recurrent layers forget by, what pools of index keys and residual streams are
        mixed by, and sinks, norms of index keys and the output head where those are trained so.
        """
        for layer in self.moe_layers():
            if layer.config.exact_router:
                layer.gate.float()
            if layer.gate.e_score_correction_bias is not None:
                layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.float()
        for module in self.modules():
            if isinstance(module, HeadWeights):
                module.float()
            if isinstance(module, _WITH_EXACT_PARTS):
                module.keep_exact()

    def drop_mtp_modules(self, *, keep: Container[int]) -> None:
        """Leave out the MTP modules that a checkpoint turned out not to have."""
        self.mtp = nn.ModuleList(module for index, module in enumerate(self.mtp) if index in keep)

    def keep_stage(self, stage: Stage) -> None:
        """Leave out what other processes have; the names of what stays are the same.

        Where layers are shared out, what stays of them is new, and holds nothing: only a decoder without storage is
        made a shard. Its output head is one of its own then, tied or not.
        """
        self.stage = stage
        held = stage.own(range(self.config.num_layers))
        layers = (self._share(index) if index in held else Absent() for index in range(self.config.num_layers))
        self.model.layers = nn.ModuleList(layers)
        if stage.is_first and not stage.shard.is_whole:
            rows = stage.shard.head_rows(self.config.vocab_size)
            with torch.device("meta"):
                head = OutputHead(self.config.hidden_size, len(rows), exact=self.config.exact_head)
            self.lm_head, self.is_tied = head.to(self.dtype), False
        if not stage.reads_tokens:
            self.mtp = nn.ModuleList()
            self.model.register_module("embed_tokens", Absent())
        if not stage.is_first and not self.is_tied:
            self.register_module("lm_head", Absent())
        if not stage.shard.is_whole:
            self.keep_choices_exact()

    def _share(self, index: int) -> nn.Module:
        """A layer, or this process's shard of it."""
        if self.stage.shard.is_whole:
            return self.model.layers[index]
        with torch.device("meta"):
            layer = DecoderLayer(*self.stage.shard.layer(self.config, index), max_context=self.max_context)
        return layer.to(self.dtype)

    def join(self, team: Team) -> None:
        """Have layers and output head add up with the other shards of this stage."""
        self._team = team if self.stage.is_first else None
        for layer in self.model.layers:
            if isinstance(layer, DecoderLayer):
                layer.join(team)

    def _streams(self, x: Tensor) -> Tensor:
        """What the first layer reads of embeddings [..., hidden]: each residual stream begins with them."""
        streams = self.config.hyper_connections
        if streams is None:
            return x
        return x.unsqueeze(-2).expand(*x.shape[:-1], streams.num_streams, -1).contiguous()

    def _normed(self, x: Tensor) -> Tensor:
        """Final hidden states [..., hidden] of what the last layer gives."""
        if self.config.hyper_connections is None:
            return self.model.norm(x)
        return self.model.norm(ops.collapse_streams(x) if self.model.hc_head is None else self.model.hc_head(x))
