"""What a checkpoint means: one frozen `ModelConfig` for every supported family.

Reading a Hugging Face `config.json` into it is `models/config_reader.py`. Nothing below depends on a model's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch

from latentkv.errors import ConfigError
from latentkv.ops.kda import TAPS
from latentkv.ops.kv_formats import FLOAT_DTYPES
from latentkv.ops.swiglu_limit import SwigluLimit
from latentkv.state.spec import (
    IndexSpec,
    KeyValueSpec,
    KVFormat,
    LastStateSpec,
    LatentSpec,
    LayerSpec,
    RecurrentSpec,
    RingSpec,
)

T = TypeVar("T")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (YaRN: arXiv 2309.00071; longrope: arXiv 2402.13753) of `dim` dimensions of each head.

    `interleaved` pairs dimensions (0, 1), (2, 3), ...; otherwise (0, dim/2), (1, dim/2 + 1), ... "dynamic" is plain up
    to the original length, beyond which cached keys would change their meaning with every token. "none" turns nothing
    (NoPE: Kimi-Linear): all angles are 0.
    """

    dim: int
    theta: float = 10000.0
    kind: Literal["none", "default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_scaling_beta: float | None = None

    @property
    def softmax_factor(self) -> float:
        """What YaRN's `mscale_all_dim` multiplies the softmax scale of MLA by: m(mscale_all_dim)^2, else 1."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's m(s) = 0.1 s ln(factor) + 1 (1 when nothing is stretched)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). `bias` is on q_a, kv_a and o.

    `output_gate`: what its heads give is multiplied by a sigmoid, one a head or one a number (Ling-3.0); "with queries"
    is one a number, projected together with the queries, from their latent normed and as it is (A.X-K2); None: not.
    `q_lora_scale` multiplies queries, and `kv_lora_scale` the normed latent before it is cached (LongCat-Flash, arXiv
    2509.01322, section 2.3: the variance of a full projection). `sinks`: each head has a learned number in the sum that
    its softmax divides by (Hy4).
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_norm_eps: float = 1e-6
    bias: bool = False
    output_gate: Literal["head", "element", "with queries"] | None = None
    q_lora_scale: float = 1.0
    kv_lora_scale: float = 1.0
    sinks: bool = False


@dataclass(frozen=True)
class KDAConfig:
    """Kimi Delta Attention (arXiv 2510.26692): a matrix a head in place of a cache.

    Attributes:
        num_heads: H, which need not be that of other attention.
        head_dim: D, of queries, keys and values.
        norm_eps: of the norm of what the heads give.
        lower_bound: of the logarithm of the decay, a factor of its sigmoid; None: minus a softplus, without bound.
        low_rank_gates: the forget and the output gate are products of two matrices of rank D, else one.
        rates_around: checkpoints have its rates as [1, 1, H, 1] (Kimi-Linear), else as [H].
    """

    num_heads: int
    head_dim: int
    norm_eps: float
    lower_bound: float | None
    low_rank_gates: bool
    rates_around: bool = False
    name: ClassVar[str] = "Kimi Delta Attention"
    short_name: ClassVar[str] = "KDA"

    def spec(self, most_drafted: int) -> RecurrentSpec:
        """Keeps a matrix a head, and what the convolutions have read last; the inputs of both, and beta, may wait."""
        heads, dim = self.num_heads, self.head_dim
        channels = 3 * heads * dim
        return RecurrentSpec(
            ((heads, dim, dim), (TAPS - 1, channels)), ((channels,), (heads, dim), (heads,)), most_drafted
        )


@dataclass(frozen=True)
class LightningConfig:
    """Lightning attention (arXiv 2401.04658) as Ling-2.5 and 2.6 have it: a matrix a head that forgets at a fixed pace.

    Attributes:
        num_heads: H.
        head_dim: D, of queries, keys and values.
        norm_eps: of the norms of queries, keys and what the heads give.
        num_groups: what the heads give is normed in so many groups of H D / num_groups numbers.
        decay_scale: of this layer; head h forgets a factor of exp(-decay_scale * slope_h) at each token.
    """

    num_heads: int
    head_dim: int
    norm_eps: float
    num_groups: int
    decay_scale: float
    name: ClassVar[str] = "lightning attention"
    short_name: ClassVar[str] = "lightning"

    @property
    def log_decay(self) -> tuple[float, ...]:
        """Of each head: its slope is ALiBi's (arXiv 2108.12409, section 3, and its code for other numbers than 2^n)."""
        power = 2 ** (self.num_heads.bit_length() - 1)
        slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
        slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (self.num_heads - power), 2)]
        return tuple(-self.decay_scale * slope for slope in slopes)

    def spec(self, most_drafted: int) -> RecurrentSpec:
        """Keeps a matrix a head; keys and values may wait."""
        heads, dim = self.num_heads, self.head_dim
        return RecurrentSpec(((heads, dim, dim),), ((2, heads * dim),), most_drafted)


@dataclass(frozen=True)
class IndexerConfig:
    """Which tokens latent attention reads (DeepSeek sparse attention, arXiv 2512.02556, section 2.1).

    Each token reads the `topk` best of those it sees, by the scores of `num_heads` heads of `head_dim` dimensions.
    `interleaved` is about the indexer's own rotary pairs: DeepSeek-V3.2 pairs them otherwise than its attention does.
    `rotates_last`: they are its last dimensions, else its first. `norm_eps`: of the norm of its keys, whose weights are
    float32 whatever the model's dtype where it has an `exact_norm`.

    Where there is a `pool`, tokens are scored by pools of so many, each with one key (GLM-5.3-Flash): of those that it
    sees whole, a token reads the `topk` / `pool` best, and with `open_pool` the tokens after them, itself the last.
    """

    num_heads: int
    head_dim: int
    topk: int
    interleaved: bool = False
    rotates_last: bool = False
    norm_eps: float = 1e-6
    exact_norm: bool = False
    pool: int | None = None
    open_pool: bool = True

    @property
    def most_read(self) -> int:
        """Tokens that a token reads at most."""
        return self.topk + (self.pool - 1 if self.pool and self.open_pool else 0)

    @property
    def all_read(self) -> int:
        """Of so many tokens or fewer, a token reads all that it sees."""
        return self.most_read if self.open_pool or self.pool in (None, 1) else 0


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention; `num_kv_heads` = num_heads is MHA, 1 is MQA.

    `qk_norm_per_head`: each head's query and key have a norm of their own, else all heads together have one. `scale` is
    what scores are multiplied by; None: 1 / sqrt(head_dim).
    """

    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    scale: float | None = None

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


RecurrentConfig = KDAConfig | LightningConfig
"""The kinds of attention that keep something of each sequence, and nothing of each token."""

AttentionConfig = MLAConfig | GQAConfig | RecurrentConfig
"""The kinds of attention."""


@dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts (DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    `group_score` says how a group of experts is scored when only `topk_group` of `num_groups` may be used:
    by its best expert, or by the sum of its best two. `None`: no groups. `excluded_score` is what the experts of the
    other groups count in the choice. `gated_shared_size` is the width of a shared expert that each token weights by a
    sigmoid of its own (Qwen2-MoE); 0: there is none. `swiglu_limit` bounds what the routed experts' activation
    multiplies, and `shared_swiglu_limit` that of the shared ones; None: nothing does. `num_zero_experts` more that the
    router chooses among, numbered from `num_experts` on, give a token back as it is (LongCat-Flash, arXiv 2509.01322,
    section 2.1). `exact_router`: the router's weight is float32, whatever the model's dtype.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    num_shared_experts: int = 0
    gated_shared_size: int = 0
    scoring: Literal["softmax", "sigmoid"] = "sigmoid"
    correction_bias: bool = False
    group_score: Literal["max", "top2"] | None = None
    num_groups: int = 1
    topk_group: int = 1
    excluded_score: float = -math.inf
    normalize_weights: bool = False
    scaling_factor: float = 1.0
    post_norm: bool = False
    swiglu_limit: SwigluLimit | None = None
    shared_swiglu_limit: SwigluLimit | None = None
    num_zero_experts: int = 0
    exact_router: bool = False

    @property
    def num_choices(self) -> int:
        """What the router chooses among: experts that compute, and those that do not."""
        return self.num_experts + self.num_zero_experts

    @property
    def computed_per_token(self) -> float:
        """Of a token's choices those that compute, on average: each expert is taken to be chosen as often as any."""
        return self.experts_per_token * self.num_experts / self.num_choices


@dataclass(frozen=True)
class HyperConnectionConfig:
    """Several residual streams (mHC, arXiv 2512.24880), which each block reads as one and writes to all.

    Attributes:
        num_streams: how many; the embedding begins each of them, and their mean is what is normed last.
        eps: added to sums and weights, see `ops.mix_streams`.
        sinkhorn_iterations: by which the matrix that mixes them is made doubly stochastic.
    """

    num_streams: int
    eps: float
    sinkhorn_iterations: int


@dataclass(frozen=True)
class IndependentHyperConnectionConfig:
    """Several residual streams that are not mixed (iHC, Hy4): each block reads a sum of them and is added to all.

    Attributes:
        num_streams: how many; the embedding begins each of them, and a sum of them is what is normed last.
        eps: added to what they count in sums, and to what blocks count in them.
        magnitude: what a block counts in a stream at most.
    """

    num_streams: int
    eps: float
    magnitude: float


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    Attributes:
        attention: which, and its sizes.
        rope: rotary embedding of its queries and keys; None: it knows order without.
        moe: its routed and shared experts; None: a dense feed-forward block.
        shortcut: what a layer's dense feed-forward block reads, experts of the next one read too, and add to what that
            gives in the end (ScMoE, arXiv 2404.05019; LongCat-Flash). "begins" in the first of the two, "ends" in the
            second, whose `moe` stands beside a dense block of its own; None: neither.
        sliding_window: a token sees at most this many tokens, itself included; None: all.
        indexer: what selects the tokens that latent attention reads; None: it reads all.
        shares_selection: the layer reads what the last indexer before it has selected, instead of having one.
    """

    attention: AttentionConfig
    rope: RopeConfig | None
    moe: MoEConfig | None = None
    sliding_window: int | None = None
    indexer: IndexerConfig | None = None
    shares_selection: bool = False
    shortcut: Literal["begins", "ends"] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether its feed-forward block is dense; experts may stand beside that where a shortcut ends."""
        return self.moe is None or self.shortcut == "ends"

    @property
    def own_indexer(self) -> IndexerConfig | None:
        """The indexer that the layer itself has."""
        return None if self.shares_selection else self.indexer

    def spec(self, kv_format: KVFormat, last_state: LastStateSpec | None = None, *, most_drafted: int = 0) -> LayerSpec:
        """What the layer keeps, its tokens stored in `kv_format`; where that has 8 bits, an indexer's keys are int8.

        A recurrent layer keeps room for drafts of `most_drafted` tokens, and so does one that selects pools of tokens;
        the others need none.
        """
        index = ring = None
        if self.own_indexer is not None:
            dim, pool = self.own_indexer.head_dim, self.own_indexer.pool
            index = IndexSpec(dim, FLOAT_DTYPES.get(kv_format, torch.int8), pool or 1)
            if pool is not None:
                ring = RingSpec(dim, pool + most_drafted, FLOAT_DTYPES.get(kv_format, torch.bfloat16))
        attention = self.attention
        if isinstance(attention, RecurrentConfig):
            return LayerSpec(None, last_state=last_state, recurrent=attention.spec(most_drafted))
        if isinstance(attention, MLAConfig):
            tokens = LatentSpec(attention.kv_lora_rank, attention.qk_rope_head_dim, kv_format)
        else:
            tokens = KeyValueSpec(attention.num_kv_heads, attention.head_dim, kv_format)
        return LayerSpec(tokens, index, last_state, ring=ring)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only language model. `source` is the config.json that it was read from, kept for saving.

    `gated_norm_rank`: norms before attention and before experts gate themselves through a bottleneck of this width
    (A.X-K2); 0: they do not.

    `hyper_connections`: the residual streams, where there are several.
    `swiglu_limit`: of the activations of dense layers; those of experts have their own.
    `exact_head`: the output head is float32, whatever the model's dtype.

    What layers may differ in is asked of each of `layers`. `attention`, `rope` and `moe` are for what is done to whole
    models alone: they raise `ConfigError` for a model whose layers differ in them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_mtp_layers: int = 0
    gated_norm_rank: int = 0
    hyper_connections: HyperConnectionConfig | IndependentHyperConnectionConfig | None = None
    swiglu_limit: SwigluLimit | None = None
    exact_head: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        """Decoder layers, those of MTP modules not counted."""
        return len(self.layers)

    @property
    def mtp_layer(self) -> LayerConfig:
        """The layer of each MTP module: like the model's last one, but its indexer, if any, is always its own.

        It attends as the last layer that is not recurrent. Its activations have no limits, which are listed for the
        model's own layers (Ling-3.0-flash).
        """
        attends = next(layer for layer in reversed(self.layers) if not isinstance(layer.attention, RecurrentConfig))
        moe = self.layers[-1].moe
        moe = None if moe is None else replace(moe, swiglu_limit=None, shared_swiglu_limit=None)
        return replace(attends, shares_selection=False, moe=moe)

    @cached_property
    def attention(self) -> MLAConfig | GQAConfig:
        """The attention of all layers."""
        self._same("attention", [layer.attention for layer in self.layers])
        return self.cached_attention

    @cached_property
    def cached_attention(self) -> MLAConfig | GQAConfig:
        """The attention of all layers that keep something of each token: all but recurrent ones."""
        found = [layer.attention for layer in self.layers if not isinstance(layer.attention, RecurrentConfig)]
        if not found:
            raise ConfigError(f"No layer of this {self.model_type} model reads past tokens; that is not supported.")
        return self._same("attention", found)

    @property
    def recurrent(self) -> RecurrentConfig | None:
        """The attention of the first recurrent layer; the others may forget at another pace. None: there is none."""
        found = (layer.attention for layer in self.layers if isinstance(layer.attention, RecurrentConfig))
        return next(found, None)

    @property
    def num_recurrent_layers(self) -> int:
        """Layers that keep something of each sequence, and nothing of each token."""
        return sum(isinstance(layer.attention, RecurrentConfig) for layer in self.layers)

    @cached_property
    def rope(self) -> RopeConfig:
        """The rotary embedding of all layers that have one, whose angles are the same.

        Recurrent layers may pair dimensions otherwise: this is how the others do.
        """
        ropes = [(layer.rope, layer.attention) for layer in self.layers if layer.rope is not None]
        paired = [rope for rope, attention in ropes if not isinstance(attention, RecurrentConfig)]
        self._same("rotary embedding", [replace(rope, interleaved=False) for rope, _ in ropes])
        return self._same("rotary embedding", paired)

    @cached_property
    def moe(self) -> MoEConfig | None:
        """The experts of all layers that have any, limits of activations aside; None: every layer is dense."""
        found = [
            replace(layer.moe, swiglu_limit=None, shared_swiglu_limit=None)
            for layer in self.layers
            if layer.moe is not None
        ]
        return self._same("experts", found) if found else None

    def specs(
        self, kv_format: KVFormat, *, mtp: torch.dtype | None = None, most_drafted: int = 0
    ) -> tuple[LayerSpec, ...]:
        """What each layer keeps.

        Args:
            kv_format: how tokens are stored.
            mtp: dtype of the hidden states, where the first MTP module is to draft: its layer comes last.
            most_drafted: tokens of the longest draft, for which some layers keep room.
        """
        specs = tuple(layer.spec(kv_format, most_drafted=most_drafted) for layer in self.layers)
        return specs if mtp is None else (*specs, self.mtp_layer.spec(kv_format, LastStateSpec(self.hidden_size, mtp)))

    def _same(self, what: str, values: Sequence[T]) -> T:
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"The layers of this {self.model_type} model differ in their {what}, which is not supported here: "
                "use a model whose layers are alike."
            )
        return values[0]
