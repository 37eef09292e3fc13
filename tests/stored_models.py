"""Tiny checkpoints for what happens between starts: large enough for several pages, strong in their opinions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentkv import SamplingParams
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained

_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
MLA = {
    **_SHAPE,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GQA = {**_SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}

PROMPT = [3 + (7 * i + i // 5) % 57 for i in range(300)]  # four pages of 64 tokens, and the beginning of a fifth
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def write_model(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    decoder = Decoder(read_config(config))
    for tensor in [*decoder.parameters(), *decoder.buffers()]:
        tensor.data.normal_(std=0.3)
    save_pretrained(decoder, folder)
    return folder
