"""Small random models with grouped-query attention, written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama3 scaling": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mha": LlamaConfig(**SIZES | {"num_key_value_heads": 8}),
    "mqa": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "mqa tied": LlamaConfig(
        **SIZES | {"num_key_value_heads": 1, "rope_theta": 500.0}, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.11,
        logits_scaling=6.0,
        attention_bias=True,
    ),
    "granite tied": GraniteConfig(
        **SIZES, tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.2, logits_scaling=6.0
    ),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 128}, pad_token_id=0),
    "seed_oss": SeedOssConfig(**SIZES, attention_out_bias=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=3),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 128}),
}


EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
WITH_NORMS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "qwen3 moe, dense first": Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 3}, **EXPERTS, norm_topk_prob=False, mlp_only_layers=[0], attention_bias=True
    ),
}
"""Norms on queries and keys, which latent attention does not have."""


def write_source(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of this kind; its biases and norms are random, too."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config((CONFIGS | WITH_NORMS)[name], dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def their_model(folder: Path) -> PreTrainedModel:
    """A checkpoint in transformers, in float32, none of whose tensors is missing or left over.

    By the class that its config.json names: AutoModelForCausalLM of transformers 5.23 does not know Mistral4.
    """
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, found = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Those of transformers, [B, S, V]."""
    with torch.no_grad():
        return their_model(folder)(tokens).logits


def some_tokens(sequences: int = 8, length: int = 64, vocab_size: int = 160) -> torch.Tensor:
    """Random ids."""
    return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
