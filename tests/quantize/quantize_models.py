"""Tiny random checkpoints to quantise, and how their copies are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}


LONGCAT: dict[str, Any] = {
    "model_type": "longcat_flash",
    "architectures": ["LongcatFlashForCausalLM"],
    "num_layers": 1,
    "n_shared_experts": 0,
    "zero_expert_num": 3,
    "num_experts_per_tok": 3,
}
"""What makes another family of `CONFIG`."""


def random_decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(read_config(CONFIG | changes))
    for tensor in [*decoder.parameters(), *decoder.buffers()]:
        tensor.data.normal_(std=0.2)
    return decoder


def save_random(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    save_pretrained(random_decoder(**changes), folder, dtype=dtype)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the files of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
