"""Small random checkpoints of every family, written by transformers itself, with every tensor randomised."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Mistral4ForCausalLM,
    PreTrainedModel,
)

VOCAB = 96
ORIGINAL = 16  # original_max_position_embeddings: every scaled branch is reached within 37 tokens
WINDOW = 24

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 0.8,
    "beta_slow": 0.05,
}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = BASE | {
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
NO_Q_LORA = {
    "q_lora_rank": None,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "v_head_dim": 24,
    "kv_lora_rank": 17,
}
MOE = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 4, "topk_group": 2}
# Many heads: where few do, no head often sees anything in many tokens, which then tie.
INDEX = {"index_topk": 7, "index_head_dim": 14, "index_n_heads": 12}
AXK2 = (
    {k: v for k, v in (MLA | MOE).items() if k not in ("n_group", "topk_group")}
    | INDEX
    | {"index_head_dim": 16, "gated_norm_rank": 8}
)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
HYBRID = {
    k: v for k, v in (MLA | MOE).items() if k not in ("q_lora_rank", "n_routed_experts", "first_k_dense_replace")
} | {"num_hidden_layers": 4, "num_local_experts": 12, "pad_token_id": 0}
BAILING = HYBRID | GROUPS | {"layer_group_size": 2, "head_dim": 12, "first_k_dense_replace": 1}
KIMI_LINEAR = HYBRID | {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_heads": 2,
    "linear_head_dim": 16,
}
# Transformers has the text model inside a wrapper alone.
GLM5 = (
    {k: v for k, v in (MLA | MOE).items() if k not in ("qk_rope_head_dim", "first_k_dense_replace")}
    | INDEX
    | {
        "num_hidden_layers": 5,
        "pad_token_id": 0,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "index_topk": 8,
        "index_kpool": 4,
        "index_head_dim": 16,
        "swiglu_limit": 0.4,
    }
)
TOWER = {"depth": 1, "num_heads": 2} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "projection_intermediate_size"), 16
)
LONGCAT = {k: v for k, v in MLA.items() if k not in ("num_hidden_layers", "intermediate_size")} | {
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 24,
    "n_routed_experts": 7,
    "zero_expert_num": 4,
    "moe_topk": 3,
    "head_dim": 8,  # of the rotary part
    "routed_scaling_factor": 1.7,
}
HY = (
    {k: v for k, v in (MLA | MOE).items() if k != "first_k_dense_replace"}
    | INDEX
    | {"num_hidden_layers": 4, "pad_token_id": 0, "hc_mult": 3, "swiglu_limit": 0.4, "rms_norm_eps": 1e-3}
)
# transformers turns halves of heads, the published weights pairs: see docs/models.md.
AS_TRANSFORMERS = {"rope_interleave": False}
GQA = BASE | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}

SHALLOW = {k: v for k, v in GQA.items() if k != "head_dim"} | {"num_hidden_layers": 2}
ROUTED = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Case:
    """One checkpoint: a transformers config, and changes made to the saved config.json before it is read."""

    name: str
    model_type: str
    config: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict)
    attention: str = "eager"


CASES = [
    Case(
        "v2-lite", "deepseek_v2", MLA | MOE | {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": MSCALE}
    ),
    Case(
        "v2-groups",
        "deepseek_v2",
        MLA
        | MOE
        | GROUPS
        | {
            "topk_method": "group_limited_greedy",
            "attention_bias": True,
            "mlp_bias": True,
            "n_shared_experts": 2,
            "rope_parameters": MSCALE | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    Case("v3", "deepseek_v3", MLA | MOE | GROUPS | {"rope_parameters": MSCALE}),
    Case(
        "v3-half-split",
        "deepseek_v3",
        MLA
        | MOE
        | NO_Q_LORA
        | {
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_parameters": YARN,
        },
    ),
    Case("v3-dense", "deepseek_v3", MLA | MOE | {"first_k_dense_replace": 3, "rope_parameters": LONGROPE}),
    Case(
        "kimi-k2",
        "deepseek_v3",
        MLA | MOE | {"rope_parameters": MSCALE | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        saved={"model_type": "kimi_k2"},
    ),
    Case("kimi-k2-groups", "deepseek_v3", MLA | MOE | GROUPS | NO_Q_LORA, saved={"model_type": "kimi_k2"}),
    Case("v32", "deepseek_v32", MLA | MOE | GROUPS | INDEX | {"rope_parameters": MSCALE}),
    Case(
        "v32-bias",
        "deepseek_v32",
        MLA
        | MOE
        | INDEX
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "index_head_dim": 8,
            "index_n_heads": 9,
            "index_topk": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        },
    ),
    Case("glm-dsa", "glm_moe_dsa", MLA | MOE | INDEX | {"index_topk_freq": 2, "rope_parameters": MSCALE}),
    Case(
        "glm-dsa-types",
        "glm_moe_dsa",
        MLA
        | MOE
        | GROUPS
        | INDEX
        | {
            "indexer_types": ["full", "shared", "shared"],
            "index_topk_freq": 1,
            "attention_bias": True,
            "index_head_dim": 8,
            "index_n_heads": 9,
            "index_topk": 5,
        },
    ),
    Case("glm-flash", "glm4_moe_lite", MLA | {k: v for k, v in MOE.items() if k != "first_k_dense_replace"}),
    Case(
        "glm-flash-groups",
        "glm4_moe_lite",
        MLA | MOE | GROUPS | NO_Q_LORA | {"mlp_layer_types": ["sparse", "dense", "sparse"], "rope_parameters": MSCALE},
    ),
    Case("axk2", "axk2", AXK2 | {"rope_parameters": MSCALE}),
    Case(
        "axk2-groups",
        "axk2",
        AXK2
        | GROUPS
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "index_topk": 4,
            "index_head_dim": 14,
            "gated_norm_rank": 5,
            "v_head_dim": 20,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        },
    ),
    Case("ling3", "bailing_hybrid", BAILING | {"rope_parameters": MSCALE}),
    Case(
        "ling3-softplus",
        "bailing_hybrid",
        BAILING
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "kda_safe_gate": False,
            "head_dim": 20,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "v_head_dim": 24,
        },
        saved={"architectures": ["BailingMoeV3ForCausalLM"], "partial_rotary_factor": 1.0},
    ),
    Case("kimi-linear", "kimi_linear", KIMI_LINEAR),
    Case(
        "kimi-linear-groups",
        "kimi_linear",
        KIMI_LINEAR
        | GROUPS
        | {
            "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "qk_rope_head_dim": 0,
            "q_lora_rank": 28,
            "linear_num_heads": 5,
            "linear_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_shared_experts": 2,
        },
    ),
    Case("glm5", "glm5_next", GLM5),
    Case(
        "glm5-shared",
        "glm5_next",
        GLM5
        | GROUPS
        | {
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "full_attention"],
            "indexer_types": ["full", "full", "shared", "full"],
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "num_hidden_layers": 4,
            "linear_lower_bound": None,
            "linear_num_heads": 3,
            "linear_head_dim": 8,
            "index_topk": 6,
            "index_kpool": 2,
            "index_head_dim": 8,
            "hc_mult": 3,
            "hc_sinkhorn_iters": 3,
            "hc_eps": 1e-3,
            "attention_bias": True,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        },
        saved={"tie_word_embeddings": True},
    ),
    Case(
        "longcat",
        "longcat_flash",
        LONGCAT | {"rope_parameters": MSCALE},
        # As published; transformers knows no other.
        saved={"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    ),
    Case(
        "longcat-mostly-zero-experts",
        "longcat_flash",
        LONGCAT
        | {
            "num_layers": 1,
            "n_routed_experts": 3,
            "zero_expert_num": 6,
            "moe_topk": 5,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "kv_lora_rank": 17,
            "v_head_dim": 24,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "rms_norm_eps": 1e-6,
        },
    ),
    Case("longcat-no-zero-experts", "longcat_flash", LONGCAT | {"num_layers": 1, "zero_expert_num": 0}),
    Case("hy4", "hy_v4", HY | {"rope_parameters": MSCALE}, saved=AS_TRANSFORMERS),
    Case(
        "hy4-groups",
        "hy_v4",
        HY
        | GROUPS
        | {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "v_head_dim": 24,
            "kv_lora_rank": 17,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "hc_mult": 2,
            "hc_magnitude": 1.3,
            "hc_eps": 0.05,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "indexer_types": ["full", "shared", "full"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        saved=AS_TRANSFORMERS,
    ),
    Case(
        "minicpm3",
        "minicpm3",
        MLA | {"dim_model_base": 20, "scale_emb": 7, "scale_depth": 1.1, "rope_parameters": LONGROPE},
    ),
    Case(
        "minicpm3-untied",
        "minicpm3",
        MLA
        | NO_Q_LORA
        | {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "rope_parameters": MSCALE,
            "hidden_size": 60,
            "v_head_dim": None,
        },
    ),
    Case("youtu", "youtu", MLA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1.6e6}}),
    Case(
        "youtu-untied",
        "youtu",
        MLA | NO_Q_LORA | {"tie_word_embeddings": False, "rope_interleave": False, "rope_parameters": MSCALE},
    ),
    Case("mistral4", "mistral4", MLA | MOE | {"rope_parameters": MSCALE | {"llama_4_scaling_beta": 0.4}}),
    Case(
        "mistral4-groups",
        "mistral4",
        MLA
        | MOE
        | GROUPS
        | NO_Q_LORA
        | {
            "rope_interleave": False,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "rope_parameters": MSCALE | {"llama_4_scaling_beta": 0.2},
        },
    ),
    Case("axk1", "axk1", MLA | MOE | GROUPS | {"rope_parameters": MSCALE}),
    Case(
        "axk1-alternating",
        "axk1",
        MLA
        | {k: v for k, v in MOE.items() if k != "first_k_dense_replace"}
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "attention_bias": True,
            "rope_interleave": False,
            "num_attention_heads": 7,
            "num_key_value_heads": 7,
            "rope_parameters": YARN,
        },
    ),
    Case("llama-gqa", "llama", GQA | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    Case(
        "llama-mqa",
        "llama",
        GQA
        | {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    Case("llama-mha", "llama", GQA | {"num_key_value_heads": 6, "head_dim": 10, "rope_parameters": YARN}),
    Case("mistral-window", "mistral", GQA | {"sliding_window": WINDOW}),
    Case(
        "mistral-mha", "mistral", GQA | {"num_key_value_heads": 6, "sliding_window": None, "rope_parameters": LONGROPE}
    ),
    Case("qwen2", "qwen2", {k: v for k, v in GQA.items() if k != "head_dim"} | {"rope_parameters": YARN}),
    Case(
        "qwen2-window",
        "qwen2",
        {k: v for k, v in GQA.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    Case("qwen3", "qwen3", GQA),
    Case(
        "granite",
        "granite",
        {k: v for k, v in GQA.items() if k != "head_dim"}
        | {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.11,
            "logits_scaling": 6.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("granite-plain", "granite", GQA | {"attention_multiplier": 0.2, "mlp_bias": True}),
    Case("phi3", "phi3", {k: v for k, v in GQA.items() if k != "head_dim"} | {"pad_token_id": 0}),
    Case(
        "phi3-part-window",
        "phi3",
        {k: v for k, v in GQA.items() if k != "head_dim"}
        | {"hidden_size": 96, "partial_rotary_factor": 0.75, "sliding_window": WINDOW, "pad_token_id": 0},
    ),
    Case("seed-oss", "seed_oss", GQA | {"attention_bias": True, "attention_out_bias": False}),
    Case("seed-oss-out", "seed_oss", GQA | {"attention_bias": False, "attention_out_bias": True}),
    Case(
        "qwen3-bias-window",
        "qwen3",
        GQA
        | {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
    Case("mixtral", "mixtral", SHALLOW | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW}),
    Case(
        "mixtral-mha",
        "mixtral",
        SHALLOW
        | {
            "num_key_value_heads": 6,
            "head_dim": 10,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
        },
    ),
    Case("olmoe", "olmoe", SHALLOW | ROUTED),
    Case(
        "olmoe-mha",
        "olmoe",
        SHALLOW
        | ROUTED
        | {
            "num_key_value_heads": 6,
            "attention_bias": True,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    Case(
        "qwen2-moe",
        "qwen2_moe",
        SHALLOW | ROUTED | {"shared_expert_intermediate_size": 40},
        saved={"sliding_window": None},
    ),
    Case(
        "qwen2-moe-window",
        "qwen2_moe",
        SHALLOW
        | ROUTED
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    Case("qwen3-moe", "qwen3_moe", SHALLOW | ROUTED | {"head_dim": 10, "norm_topk_prob": True}),
    Case(
        "qwen3-moe-window",
        "qwen3_moe",
        SHALLOW
        | ROUTED
        | {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
        },
        saved={"max_window_layers": 2},  # in published files, and of no consequence
    ),
    Case(
        "dots1",
        "dots1",
        SHALLOW | MOE | {"norm_topk_prob": True, "sliding_window": None},
        saved={"scoring_func": "noaux_tc"},
    ),
    Case(
        "dots1-groups",
        "dots1",
        SHALLOW
        | MOE
        | GROUPS
        | {
            "head_dim": 10,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "rope_parameters": YARN,
        },
    ),
    Case(
        "glm4-moe",
        "glm4_moe",
        SHALLOW | MOE | {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    Case(
        "glm4-moe-norm-groups",
        "glm4_moe",
        SHALLOW
        | MOE
        | GROUPS
        | {
            "head_dim": 16,
            "use_qk_norm": True,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.75},
        },
    ),
]

FIRST_CASES = list({case.model_type: case for case in reversed(CASES)}.values())
"""One of each family, for what its other cases, which differ in their config's values, would only repeat."""

KINDS = ["v3", "v32", "glm5", "longcat", "hy4", "kimi-linear", "llama-gqa", "qwen2-moe"]
"""One of each way in which layers keep their weights."""


def slow_but(cases: Iterable[Case], usual: Collection[str]) -> list[Any]:
    """Parameters of a test: all cases, of which the default run takes those that are named."""
    return [pytest.param(case, marks=() if case.name in usual else pytest.mark.slow) for case in cases]


FIRST_NAMES = {case.name for case in FIRST_CASES}
by_family = pytest.mark.parametrize("case", slow_but(CASES, FIRST_NAMES), ids=lambda case: case.name)
"""Every case, for what a family's cases should do alike: the default run takes the first of each family."""


def build(case: Case) -> PreTrainedModel:
    """The transformers model of a case (two text models are not among AutoModelForCausalLM's)."""
    if case.model_type == "glm5_next":
        text, tied = dict(case.config), case.saved.get("tie_word_embeddings", False)
        tower = TOWER | {"out_hidden_size": text["hidden_size"]}
        wrapped = Glm5NextConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied)
        return Glm5NextForConditionalGeneration._from_config(wrapped, attn_implementation=case.attention)
    config = AutoConfig.for_model(case.model_type, attn_implementation=case.attention, **case.config)
    kind = Mistral4ForCausalLM if case.model_type == "mistral4" else AutoModelForCausalLM
    return kind._from_config(config) if kind is Mistral4ForCausalLM else kind.from_config(config)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and buffer of the checkpoint random values; norms spread around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        is_norm = "norm" in name and tensor.ndim == 1
        noise = torch.randn(tensor.shape, generator=generator) * (0.3 if is_norm or "bias" in name else 0.2)
        with torch.no_grad():
            tensor.copy_(noise + 1 if is_norm else noise)


def save_checkpoint(case: Case, folder: Path) -> PreTrainedModel:
    """Write the case's checkpoint and return the transformers model that it was written from.

    The config of a text model that transformers wraps is written flat.
    """
    model = build(case).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    if "text_config" in saved:
        saved = saved["text_config"] | {"model_type": case.model_type}
    path.write_text(json.dumps(saved | case.saved))
    return model
