"""The model families as data: what an absent key of config.json means, and what a family's name alone implies.

Defaults are those of the classes of transformers 5.23 (`configuration_<model_type>.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from latentkv.checkpoint.names import ExpertNames, NameStyle


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies beyond its config.json.

    Attributes:
        attention: kind of attention.
        defaults: value of each key that config.json leaves out.
        rope_interleaved: pairing of rotary dimensions; None: config key `rope_interleave` says.
        scoring: router's activation; None: the family has no experts.
        group_score: how groups of experts are scored (see `MoEConfig`); "topk_method": that config key says.
        correction_bias: the router adds a learned bias when it selects (DeepSeek-V3, section 2.1.2).
        correction_bias_optional: published checkpoints may leave that bias out (zeros).
        normalizes_weights: whether the config key `norm_topk_prob` is honoured.
        post_mlp_norm: a norm on the output of each MoE block.
        saved_as: the model_type that transformers knows it by; None: its own.
        expert_size: config key that says how wide a routed expert is.
        expert_names: how published and transformers checkpoints have routed experts.
        qkv_bias, qk_norm: of grouped-query attention; a text: that config key says.
        output_bias: of grouped-query attention's output projection; a text: that config key says.
        qk_norm_per_head: see `GQAConfig`.
        name_style: whose names published and transformers checkpoints have for the rest.
        recurrent: what the other layers of a hybrid are: Kimi Delta Attention, whose two gates are full matrices or of
            low rank, or lightning attention; None: there are none.
        kda_bound: config keys of what bounds the decay of Kimi Delta Attention: the bound, and the flag that says
            whether there is one (None: there is where the bound is not null); None: it is never bounded.
        rates_around: checkpoints have its rates, a number a head, with sizes of one around (Kimi-Linear).
        group_ends: layers without `layer_types` or lists of their numbers that are latent attention: the last of each
            `layer_group_size`; else every fourth, but the first.
        part_of_group: the last layers may be no whole group.
        query_gate: latent attention is gated, each number by what is projected with the queries.
        excluded_score: see `MoEConfig`.
        output_gate: config key `gated_attention_proj_granularity_type` says how latent attention is gated.
        element_gate: latent attention is gated, each number by what is projected for it.
        sinks: see `MLAConfig`.
        indexer_like_attention: an indexer rotates its last dimensions, in the pairs of its attention's queries unless
            config key `indexer_rope_interleave` says in which, and norms its keys in float32 by `rms_norm_eps` (Hy4).
        limits_routed: config key `swiglu_limit` is about routed experts alone.
        exact_head: see `ModelConfig`.
        rotates: latent attention turns its rotary dimensions; Kimi-Linear leaves them as they are.
        mtp: modules that predict further tokens are run; else what files hold of them is left out.
        wrapper: transformers knows it inside a wrapper of this type alone; None: by itself.
        variants: families that bear the `model_type` too, by what config key `architectures` names.
        other_architectures: models that bear it and are not supported, likewise: what they are.
        stacked: checkpoints have the projections of queries, keys and values in one tensor, and gates with ups.
        paired: each of the `num_layers` of its config is two here, and a shortcut leads from the first to experts that
            the second adds (LongCat-Flash).
        exact_router: see `MoEConfig`.
        rotary_share: of a head, where config key `partial_rotary_factor` leaves it open; None: heads are whole.
        sliding_layers: which have the sliding window where `layer_types` does not say: those from number
            `max_window_layers` on, every one, or those of even number below `max_window_layers`.
    """

    attention: Literal["mla", "gqa"]
    defaults: Mapping[str, Any]
    rope_interleaved: bool | None = False
    scoring: Literal["softmax", "sigmoid"] | None = None
    group_score: Literal["max", "top2", "topk_method"] | None = None
    correction_bias: bool = False
    correction_bias_optional: bool = False
    normalizes_weights: bool = True
    post_mlp_norm: bool = False
    expert_size: str = "moe_intermediate_size"
    expert_names: ExpertNames = "one by one"
    name_style: NameStyle = "usual"
    recurrent: Literal["kda", "kda, low rank", "lightning"] | None = None
    kda_bound: tuple[str, str | None] | None = None
    rates_around: bool = False
    group_ends: bool = False
    part_of_group: bool = False
    output_gate: bool = False
    query_gate: bool = False
    excluded_score: float = float("-inf")
    element_gate: bool = False
    sinks: bool = False
    indexer_like_attention: bool = False
    limits_routed: bool = False
    exact_head: bool = False
    rotates: bool = True
    mtp: bool = True
    wrapper: str | None = None
    variants: Mapping[str, Family] = field(default_factory=dict[str, "Family"])
    other_architectures: Mapping[str, str] = field(default_factory=dict[str, str])
    stacked: bool = False
    paired: bool = False
    exact_router: bool = False
    saved_as: str | None = None
    qkv_bias: bool | str = "attention_bias"
    qk_norm: bool | str = False
    output_bias: bool | str = "attention_bias"
    qk_norm_per_head: bool = True
    rotary_share: float | None = None
    sliding_layers: Literal["from", "all", "even until"] = "from"
    topk_methods: frozenset[str] = field(default_factory=frozenset[str])


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "latent_norm_eps": 1e-6,  # a key of LatentKV's own: in transformers this is no choice
    "rope_theta": 10000.0,
}

_LLAMA: dict[str, Any] = _COMMON | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_ROUTED: dict[str, Any] = {"norm_topk_prob": False, "routed_scaling_factor": 1.0}

_DEEPSEEK_V3: dict[str, Any] = _COMMON | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
    "rope_interleave": True,
}

_DEEPSEEK_V3_FAMILY = Family(
    "mla",
    _DEEPSEEK_V3,
    rope_interleaved=None,
    scoring="sigmoid",
    group_score="top2",
    correction_bias=True,
    topk_methods=frozenset({"noaux_tc"}),
)

_DEEPSEEK_V2_FAMILY = Family(
    "mla",
    _LLAMA
    | {
        "vocab_size": 102400,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "routed_scaling_factor": 1.0,
        "topk_group": None,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "v_head_dim": 128,
        "moe_intermediate_size": 1407,
    },
    rope_interleaved=True,
    scoring="softmax",
    group_score="topk_method",
    normalizes_weights=False,
    topk_methods=frozenset({"greedy", "group_limited_greedy"}),
)

# Of Ling-2.5, Ring-2.5 and Ling-2.6, which transformers 5.23 has not: the defaults are those of the publisher's own
# configuration (github.com/inclusionAI/Ring-V2.5, models/configuration_bailing_moe_v2_5.py), whose router normalises.
_BAILING_LIGHTNING = Family(
    "mla",
    _COMMON
    | {
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "max_position_embeddings": 32768,
        "rope_theta": 600000.0,
        "eos_token_id": 156892,
        "head_dim": 128,
        "layer_group_size": 5,
        "group_norm_size": 4,
        "partial_rotary_factor": 0.5,
        "slope_layer_offset": 0,  # a key of LatentKV's own, see `models.hybrid_reader`
    },
    rope_interleaved=True,
    scoring="sigmoid",
    group_score="top2",
    correction_bias=True,
    topk_methods=frozenset({"noaux_tc"}),
    name_style="bailing",
    recurrent="lightning",
    group_ends=True,
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": _DEEPSEEK_V2_FAMILY,
    # The text model of DeepSeek-OCR 2: multi-head attention.
    "deepseek_ocr2_text": replace(
        _DEEPSEEK_V2_FAMILY, defaults={**_DEEPSEEK_V2_FAMILY.defaults, "use_mla": False, "first_k_dense_replace": 1}
    ),
    "deepseek_v3": _DEEPSEEK_V3_FAMILY,
    # Kimi-K2 is a DeepSeek-V3 checkpoint under another name.
    "kimi_k2": replace(_DEEPSEEK_V3_FAMILY, saved_as="deepseek_v3"),
    "glm4_moe_lite": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 154880,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 47,
            "num_attention_heads": 20,
            "n_shared_experts": 1,
            "n_routed_experts": 64,
            "routed_scaling_factor": 1.8,
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "qk_nope_head_dim": 192,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "num_nextn_predict_layers": 0,
            "rope_interleave": True,
        },
        rope_interleaved=None,
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        topk_methods=frozenset({"noaux_tc"}),
    ),
    "deepseek_v32": replace(
        _DEEPSEEK_V3_FAMILY,
        defaults=_DEEPSEEK_V3
        | {
            "max_position_embeddings": 163840,
            "num_nextn_predict_layers": 0,
            "index_topk": 2048,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "indexer_rope_interleave": False,
        },
        rope_interleaved=True,
    ),
    "glm_moe_dsa": replace(
        _DEEPSEEK_V3_FAMILY,
        defaults=_DEEPSEEK_V3
        | {
            "vocab_size": 154880,
            "hidden_size": 6144,
            "intermediate_size": 12288,
            "num_hidden_layers": 78,
            "num_attention_heads": 64,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "num_nextn_predict_layers": 0,
            "index_topk": 2048,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
            "indexer_rope_interleave": True,
        },
        rope_interleaved=True,
    ),
    "bailing_hybrid": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 157184,
            "hidden_size": 2560,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
            "n_shared_experts": 1,
            "n_routed_experts": 512,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 262144,
            "rope_theta": 6000000.0,
            "eos_token_id": 156895,
            "num_nextn_predict_layers": 1,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
            "layer_group_size": 6,
            "kda_safe_gate": True,
            "kda_lower_bound": -5.0,
        },
        rope_interleaved=True,
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        topk_methods=frozenset({"noaux_tc"}),
        name_style="bailing",
        recurrent="kda",
        kda_bound=("kda_lower_bound", "kda_safe_gate"),
        group_ends=True,
        output_gate=True,
        variants={"BailingMoeV2_5ForCausalLM": _BAILING_LIGHTNING},
        other_architectures={
            "BailingMoeLinearV2ForCausalLM": "Ring-2.0-linear, whose other layers are grouped-query attention",
        },
    ),
    "kimi_linear": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 163840,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.446,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 163584,
            "eos_token_id": 163586,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
        },
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        expert_names="mixtral",
        recurrent="kda, low rank",
        rates_around=True,
        rotates=False,
    ),
    # GLM-5.3-Flash; its checkpoints with a vision tower nest it in a glm5_next.
    "glm5_next_text": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 154880,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 45,
            "num_attention_heads": 64,
            "n_shared_experts": 1,
            "n_routed_experts": 288,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 0,
            "v_head_dim": 256,
            "qk_nope_head_dim": 256,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-5,
            "latent_norm_eps": None,  # that of the other norms
            "num_nextn_predict_layers": 0,
            "linear_head_dim": 128,
            "linear_num_heads": 64,
            "linear_conv_kernel_dim": 4,
            "linear_lower_bound": -5.0,
            "layer_group_size": 4,  # a key of LatentKV's own: in transformers this is no choice
            "index_topk": 2048,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
            "index_kpool": 16,
            "index_kpool_always_select_tail": True,
            "swiglu_limit": 10.0,
            "hc_mult": 4,
            "hc_eps": 1e-6,
            "hc_sinkhorn_iters": 20,
        },
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        topk_methods=frozenset({"noaux_tc"}),
        recurrent="kda, low rank",
        kda_bound=("linear_lower_bound", None),
        group_ends=True,
        part_of_group=True,
        rotates=False,
        mtp=False,
        wrapper="glm5_next",
    ),
    # Hy4-preview.
    "hy_v4": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 120832,
            "hidden_size": 2816,
            "intermediate_size": 6912,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.827,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "qk_nope_head_dim": 192,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 262144,
            "initializer_range": 0.006,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 120000,
            "eos_token_id": 120025,
            # A key that transformers 5.23 has not: it turns halves of heads, for which the published weights are not.
            "rope_interleave": True,
            "index_topk": 2048,
            "index_n_heads": 16,
            "index_head_dim": 128,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 2,
            "swiglu_limit": 10.0,
            "hc_mult": 4,
            "hc_eps": 1e-6,
            "hc_magnitude": 2.0,
        },
        rope_interleaved=None,
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        expert_names="fused",
        name_style="hy",
        element_gate=True,
        sinks=True,
        indexer_like_attention=True,
        limits_routed=True,
        exact_head=True,
        mtp=False,
    ),
    "minicpm3": Family(
        "mla",
        _LLAMA
        | {
            "vocab_size": 73448,
            "hidden_size": 2560,
            "intermediate_size": 6400,
            "num_hidden_layers": 62,
            "num_attention_heads": 40,
            "max_position_embeddings": 32768,
            "initializer_range": 0.1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "kv_lora_rank": 256,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": None,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
        },
    ),
    "youtu": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "tie_word_embeddings": True,
            "rope_interleave": True,
        },
        rope_interleaved=None,
    ),
    "mistral4": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 256,
            "q_lora_rank": 1024,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 64,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 1048576,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_interleave": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        rope_interleaved=None,
        scoring="softmax",
        group_score="top2",
        expert_names="fused",
    ),
    "axk1": Family(
        "mla",
        _DEEPSEEK_V3
        | {
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "n_routed_experts": 192,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 32768,
            "bos_token_id": 163691,
            "eos_token_id": 163691,
            "num_nextn_predict_layers": 0,
        },
        rope_interleaved=None,
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        correction_bias_optional=True,
        post_mlp_norm=True,
    ),
    # The defaults are A.X-K2-Light's.
    "axk2": Family(
        "mla",
        _DEEPSEEK_V3
        | {
            "vocab_size": 163840,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "n_routed_experts": 128,
            "kv_lora_rank": 128,
            "q_lora_rank": 384,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "qk_nope_head_dim": 64,
            "n_group": None,
            "topk_group": None,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 131072,
            "bos_token_id": 163691,
            "eos_token_id": 163691,
            "num_nextn_predict_layers": 0,
            "index_topk": 2048,
            "index_n_heads": 16,
            "index_head_dim": 128,
            "indexer_rope_interleave": False,
            "gated_norm_rank": 16,
        },
        rope_interleaved=True,
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        query_gate=True,
        excluded_score=0.0,
    ),
    # A DeepSeek-V3 checkpoint but for names of its config; it states no groups where it has these.
    "sarvam_mla": replace(
        _DEEPSEEK_V3_FAMILY,
        defaults=_DEEPSEEK_V3
        | {
            "vocab_size": 262144,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 64,
            "n_routed_experts": 128,
            "q_lora_rank": None,
            "n_group": 16,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "initializer_range": 0.006,
            "num_nextn_predict_layers": 0,
        },
    ),
    "longcat_flash": Family(
        "mla",
        _COMMON
        | {
            "vocab_size": 131072,
            "hidden_size": 6144,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_layers": 28,
            "num_attention_heads": 64,
            "n_routed_experts": 512,
            "zero_expert_num": 256,
            "routed_scaling_factor": 6.0,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "num_experts_per_tok": 12,
            "norm_topk_prob": False,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        rope_interleaved=True,
        scoring="softmax",
        correction_bias=True,
        normalizes_weights=False,
        name_style="paired",
        mtp=False,
        paired=True,
        exact_router=True,
        other_architectures={
            "LongcatFlashNgramForCausalLM": "LongCat-Flash-Lite, which adds embeddings of n-grams to those of tokens",
        },
    ),
    "llama": Family("gqa", _LLAMA),
    "mistral": Family(
        "gqa",
        _LLAMA
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        qkv_bias=False,
        output_bias=False,
    ),
    "qwen2": Family("gqa", _QWEN, qkv_bias=True, output_bias=False),
    "qwen3": Family("gqa", _QWEN | {"head_dim": 128}, qk_norm=True),
    "granite": Family(
        "gqa",
        _LLAMA
        | {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "phi3": Family(
        "gqa",
        _COMMON
        | {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "use_sliding_window": True,
        },
        qkv_bias=False,
        output_bias=False,
        rotary_share=1.0,
        sliding_layers="all",
        stacked=True,
    ),
    "seed_oss": Family(
        "gqa",
        _COMMON
        | {
            "vocab_size": 155136,
            "hidden_size": 4096,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "attention_bias": True,
            "attention_out_bias": False,
        },
        output_bias="attention_out_bias",
    ),
    "mixtral": Family(
        "gqa",
        _LLAMA
        | _ROUTED
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "use_sliding_window": True,
            "num_experts_per_tok": 2,
            "n_routed_experts": 8,
            "norm_topk_prob": True,
        },
        scoring="softmax",
        expert_size="intermediate_size",
        expert_names="mixtral",
        qkv_bias=False,
        output_bias=False,
        sliding_layers="all",
    ),
    "olmoe": Family(
        "gqa",
        _COMMON
        | _ROUTED
        | {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "num_experts_per_tok": 8,
            "n_routed_experts": 64,
        },
        scoring="softmax",
        expert_size="intermediate_size",
        qk_norm=True,
        qk_norm_per_head=False,
    ),
    "qwen2_moe": Family(
        "gqa",
        _QWEN
        | _ROUTED
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "n_routed_experts": 60,
            "qkv_bias": True,
        },
        scoring="softmax",
        qkv_bias="qkv_bias",
        output_bias=False,
        sliding_layers="even until",
    ),
    "qwen3_moe": Family(
        "gqa",
        _QWEN
        | _ROUTED
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
        },
        scoring="softmax",
        qk_norm=True,
        sliding_layers="all",
    ),
    # Attention is Qwen3's, the router DeepSeek-V3's.
    "dots1": Family(
        "gqa",
        _COMMON
        | _ROUTED
        | {
            "vocab_size": 152064,
            "hidden_size": 4608,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "n_group": 1,
            "topk_group": 1,
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 62,
        },
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        topk_methods=frozenset({"noaux_tc"}),
        qk_norm=True,
    ),
    "glm4_moe": Family(
        "gqa",
        _COMMON
        | _ROUTED
        | {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        scoring="sigmoid",
        group_score="top2",
        correction_bias=True,
        topk_methods=frozenset({"noaux_tc"}),
        output_bias=False,
        qk_norm="use_qk_norm",
        rotary_share=0.5,
    ),
}

ALIASES: Mapping[str, str] = {"AXK1": "axk1", "AXK2": "axk2", "youtu_llm": "youtu", "glm5_next": "glm5_next_text"}
"""Names that copies of a checkpoint use for the same model type."""

TEXT_MODEL_OF: Mapping[str, str] = {
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "deepseek_vl_v2": "deepseek_v2",
    "deepseek_ocr": "deepseek_v2",
    "deepseek_ocr2": "deepseek_ocr2_text",
    "glm5_next": "glm5_next_text",
}
"""What a wrapper's text model is where that does not say."""

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "n_shared_experts": ("num_shared_experts",),
    "n_group": ("num_expert_group",),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk"),
    "intermediate_size": ("ffn_hidden_size",),
    "moe_intermediate_size": ("expert_ffn_hidden_size",),
    "norm_topk_prob": ("moe_renormalize",),
    "max_position_embeddings": ("model_max_length",),
    "scoring_func": ("score_function", "moe_router_activation_func"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}
"""Other names of a key of config.json."""


def family_of(model_type: str, config: Mapping[str, Any]) -> Family:
    """The family of a text model: its `model_type`'s, or a variant of it, with what keys of its config change in it.

    DeepSeek-VL2 calls itself deepseek_v2 and routes as DeepSeek-V3 does; with `use_mla: false` (DeepSeek-VL2-Tiny,
    DeepSeek-OCR) attention is Llama's, which rotates halves of a head.
    """
    family, named = FAMILIES[model_type], config.get("architectures")
    if isinstance(named, list):
        family = next((family.variants[name] for name in named if name in family.variants), family)
    routes_as_v3 = config.get("topk_method") == "noaux_tc" and config.get("scoring_func") == "sigmoid"
    if family.scoring == "softmax" and routes_as_v3:
        router = _DEEPSEEK_V3_FAMILY
        family = replace(
            family,
            scoring=router.scoring,
            group_score=router.group_score,
            correction_bias=True,
            normalizes_weights=True,
            topk_methods=router.topk_methods,
        )
    if family.attention == "mla" and config.get("use_mla", family.defaults.get("use_mla")) is False:
        family = replace(family, attention="gqa", rope_interleaved=False)
    return family
