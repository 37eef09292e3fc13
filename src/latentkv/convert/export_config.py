"""config.json of the converted model, as the engine reads it that it is for.

Dense models become DeepSeek-V3's, mixtures of experts Mistral-4's, whose routers are softmax. Engines read such a
checkpoint differently. transformers gives the latents' norms eps = 1e-6 whatever the config says, ties the head to the
embedding where the config does, and reads any frequencies through longrope's factors. vLLM 0.32 gives them
rms_norm_eps, never ties the head, reads a plain RoPE or YaRN, and drops biases without a word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentkv.convert.export import BIAS_COLUMNS
from latentkv.convert.layer import LayerPlan
from latentkv.convert.options import Export
from latentkv.convert.source import SourceModel

TRANSFORMERS_EPS = 1e-6
# rank + rope-dim that the latent attention of vLLM 0.32 takes; it runs others with VLLM_MLA_DISABLE=1 alone.
VLLM_LATENT_WIDTHS = (320, 512, 576)


def latent_norm_eps(source: SourceModel, export: Export) -> float:
    """What the engine gives the latents' norms."""
    return source.config.rms_norm_eps if export == "vllm" else TRANSFORMERS_EPS


def read_by(source: SourceModel, export: Export) -> tuple[str, ...]:
    """The engines that read the checkpoint as it is meant."""
    if export == "transformers":
        return ("latentkv", "transformers")
    both = latent_norm_eps(source, export) == TRANSFORMERS_EPS
    return ("latentkv", "vllm", "transformers") if both else ("latentkv", "vllm")


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
    moe, dense_layers = config.moe, sum(layer.moe is None for layer in config.layers)
    family, architecture = _family(source)
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "attention_dropout")
    eps = latent_norm_eps(source, export)
    return {
        "architectures": [architecture],
        "model_type": family,
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
        **_rope(source, plan, frequencies, export),
        "first_k_dense_replace": dense_layers,
        # Where all layers are dense, the keys of the experts must be there and make sense all the same.
        "n_routed_experts": moe.num_experts if moe else 8,
        "n_shared_experts": 0 if moe else 1,
        "num_experts_per_tok": moe.experts_per_token if moe else 2,
        "moe_intermediate_size": moe.intermediate_size if moe else config.intermediate_size,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": moe.normalize_weights if moe else True,
        "routed_scaling_factor": moe.scaling_factor if moe else 1.0,
        "num_nextn_predict_layers": 0,
    }


def _family(source: SourceModel) -> tuple[str, str]:
    """The model type and the class that say what the source is."""
    if source.config.moe is None:
        return "deepseek_v3", "DeepseekV3ForCausalLM"
    return "mistral4", "Mistral4ForCausalLM"


def _rope(source: SourceModel, plan: LayerPlan, frequencies: Tensor, export: Export) -> dict[str, Any]:
    """The keys of the RoPE in the family's form."""
    config, head = source.config, source.shape.head_dim + plan.rope_dim
    found = export_rope(frequencies, config.rope.theta, config.max_positions, export)
    if _family(source)[0] == "deepseek_v3":
        return found
    # transformers 5.23 takes a plain RoPE of Mistral-4 for one of whole heads, and asks for a scale of queries.
    scaling = found["rope_scaling"] or longrope([1.0] * len(frequencies), found["rope_theta"], config.max_positions)
    share = plan.rope_dim / head
    if int(head * share) < plan.rope_dim:  # it rounds down
        share = math.nextafter(share, 1.0)
    return {"rope_parameters": scaling | {"partial_rotary_factor": share, "llama_4_scaling_beta": 0.0}}


def ties_head(source: SourceModel, export: Export) -> bool:
    """Whether the head is the embedding, which is then written once."""
    return source.head_is_embedding and export != "vllm"


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
    return {"rope_theta": theta, "rope_scaling": longrope(factors, theta, max_positions)}


def longrope(factors: list[float], theta: float, max_positions: int) -> dict[str, Any]:
    """The RoPE of base `theta` whose frequencies are divided by `factors`, one a pair, whatever the length."""
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
        "short_factor": factors,
        "long_factor": factors,
    }
