"""Latent attention without a norm -> the checkpoint of DeepSeek-V3, whose latents pass through an RMSNorm.

The norm w c / sqrt(mean c^2 + eps) is linear where c is small beside sqrt(eps): the latent's rows are multiplied by
2^-40, which is exact in bf16 and float32 and leaves a mean square below 1e-20 beside eps = 1e-6. The norm is then the
constant 1 / sqrt(eps), which its weight (a power of two) and kv_b undo. A bias of the queries goes through the query's
own bottleneck in the same way, with one latent that is the constant one.

Engines read such a checkpoint differently. transformers gives the latents' norms eps = 1e-6 whatever the config says,
ties the head to the embedding where the config does, and reads any frequencies through longrope's factors. vLLM 0.32
gives them rms_norm_eps, never ties the head, reads a plain RoPE or YaRN, and drops biases without a word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentkv.convert.attention import MLAWeights
from latentkv.convert.layer import LayerPlan
from latentkv.convert.options import Export
from latentkv.convert.source import SourceModel

DOWN_EXPONENT = -40
NORM_EXPONENT = 30
TRANSFORMERS_EPS = 1e-6
# rank + rope-dim that the latent attention of vLLM 0.32 takes; it runs others with VLLM_MLA_DISABLE=1 alone.
VLLM_LATENT_WIDTHS = (320, 512, 576)
BIAS_COLUMNS = 16  # the constant one and zeros, so that the width stays a multiple of 16


def latent_norm_eps(source: SourceModel, export: Export) -> float:
    """What the engine gives the latents' norms."""
    return source.config.rms_norm_eps if export == "vllm" else TRANSFORMERS_EPS


def read_by(source: SourceModel, export: Export) -> tuple[str, ...]:
    """The engines that read the checkpoint as it is meant."""
    if export == "transformers":
        return ("latentkv", "transformers")
    both = latent_norm_eps(source, export) == TRANSFORMERS_EPS
    return ("latentkv", "vllm", "transformers") if both else ("latentkv", "vllm")


def export_layer(weights: MLAWeights, *, eps: float) -> dict[str, Tensor]:
    """{name under self_attn: tensor} of DeepSeek-V3's attention, float64.

    Args:
        weights: of the layer.
        eps: of the latents' norms, see `latent_norm_eps`.
    """
    down = 2.0**DOWN_EXPONENT
    restore = 2.0 ** -(DOWN_EXPONENT + NORM_EXPONENT) * math.sqrt(eps)
    rank = weights.kv_b.shape[1]
    kv_a = weights.kv_a.clone()
    kv_a[:rank] *= down
    tensors = {
        "kv_a_proj_with_mqa.weight": kv_a,
        "kv_a_layernorm.weight": torch.full((rank,), 2.0**NORM_EXPONENT, dtype=torch.float64),
        "kv_b_proj.weight": weights.kv_b * restore,
        "o_proj.weight": weights.o,
    }
    if not has_biases(weights):
        return tensors | {"q_proj.weight": weights.q}
    hidden = weights.q.shape[1]
    q_a = torch.cat([torch.eye(hidden, dtype=torch.float64), torch.zeros(BIAS_COLUMNS, hidden, dtype=torch.float64)])
    one = torch.zeros(hidden + BIAS_COLUMNS, dtype=torch.float64)
    one[hidden] = 1
    q_b = torch.zeros(weights.q.shape[0], hidden + BIAS_COLUMNS, dtype=torch.float64)
    q_b[:, :hidden] = weights.q
    if weights.q_bias is not None:
        q_b[:, hidden] = weights.q_bias
    zeros = torch.zeros(len(kv_a), dtype=torch.float64)
    return tensors | {
        "q_a_proj.weight": q_a * down,
        "q_a_proj.bias": one * down,
        "q_a_layernorm.weight": torch.full((len(q_a),), 2.0**NORM_EXPONENT, dtype=torch.float64),
        "q_b_proj.weight": q_b * restore,
        "kv_a_proj_with_mqa.bias": zeros if weights.kv_a_bias is None else weights.kv_a_bias,
        "o_proj.bias": torch.zeros(len(weights.o), dtype=torch.float64) if weights.o_bias is None else weights.o_bias,
    }


def has_biases(weights: MLAWeights) -> bool:
    """Whether DeepSeek's `attention_bias` is needed."""
    return any(bias is not None for bias in (weights.q_bias, weights.kv_a_bias, weights.o_bias))


def export_config(
    source: SourceModel, plan: LayerPlan, frequencies: Tensor, *, biases: bool, dtype: str, export: Export
) -> dict[str, Any]:
    """config.json of the converted model.

    Args:
        source: what was converted.
        plan: its sizes.
        frequencies: [R / 2] of the shared key's pairs.
        biases: whether the layers have any.
        dtype: of the weights.
        export: the engine that it is for.
    """
    config, shape, raw = source.config, source.shape, source.config.source
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "attention_dropout")
    eps = latent_norm_eps(source, export)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{key: raw[key] for key in kept if key in raw},
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        **({} if eps == TRANSFORMERS_EPS else {"latent_norm_eps": eps}),
        "tie_word_embeddings": ties_head(source, export),
        "attention_bias": biases,
        "q_lora_rank": config.hidden_size + BIAS_COLUMNS if biases else None,
        "kv_lora_rank": plan.rank,
        "qk_nope_head_dim": shape.head_dim,
        "qk_rope_head_dim": plan.rope_dim,
        "v_head_dim": shape.head_dim,
        "rope_interleave": True,
        **export_rope(frequencies, config.rope.theta, config.max_positions, export),
        # All layers are dense; the keys of the experts must be there and make sense all the same.
        "first_k_dense_replace": config.num_layers,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config.intermediate_size,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def ties_head(source: SourceModel, export: Export) -> bool:
    """Whether the head is the embedding, which is then written once."""
    return source.config.tie_word_embeddings and export != "vllm"


def export_rope(frequencies: Tensor, theta: float, max_positions: int, export: Export) -> dict[str, Any]:
    """Frequencies as `rope_theta` and `rope_scaling`.

    For transformers any of them, as longrope's factors by which the plain series of the source's base is divided. For
    vLLM those of a plain series, by its base; YaRN by a factor of 1 changes nothing, and keeps vLLM from its CPU kernel
    for plain RoPE, which takes the heads of a latent attention's queries for tokens.

    Args:
        frequencies: [R / 2] float64, for vLLM a grid (see `grid_steps`).
        theta: of the source.
        max_positions: of the source.
        export: the engine that it is for.
    """
    count = len(frequencies)
    if export == "vllm":
        base = theta if count == 1 else float(f"{float(frequencies[1]) ** -count:.12g}")
        scaling = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": max_positions}
        return {"rope_theta": base, "rope_scaling": scaling}
    plain = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    factors = (plain / frequencies).tolist()
    if all(abs(factor - 1) < 1e-9 for factor in factors):
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
        "short_factor": factors,
        "long_factor": factors,
    }
    return {"rope_theta": theta, "rope_scaling": scaling}
