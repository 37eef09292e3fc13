"""Small random models with grouped-query attention, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

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
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 128}),
}


WITH_NORMS = Qwen3Config(**SIZES)
"""Norms on queries and keys, which latent attention does not have."""


def write_source(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of this kind; its biases and norms are random, too."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(WITH_NORMS if name == "qwen3" else CONFIGS[name], dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def some_tokens(sequences: int = 8, length: int = 64, vocab_size: int = 160) -> torch.Tensor:
    """Random ids."""
    return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
