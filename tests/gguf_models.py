"""Published checkpoints as GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from latentkv.checkpoint import CheckpointReader

TypeOf = Callable[[str, tuple[int, ...]], Type]
"""The type of a matrix, by its name in the file and its shape."""

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def write_deepseek2(folder: Path, out: Path, type_of: TypeOf = lambda name, shape: Type.BF16) -> Path:
    """A checkpoint with latent attention and DeepSeek-V3's router, without its MTP layers."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "deepseek2")
    _add_metadata(writer, config)
    _add_tokenizer(writer, folder, config)
    for name, weight in _tensors(CheckpointReader(folder), config):
        kind = Type.F32 if weight.ndim == 1 or "ffn_gate_inp" in name else type_of(name, weight.shape)
        data = weight if kind == Type.F32 else gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    if scaling := config["rope_scaling"]:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    if not (folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    numbers = range(config["vocab_size"])
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if i in words else gguf.TokenType.UNUSED
        for i in numbers
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([special.get(i) or words.get(i) or f"[UNUSED{i}]" for i in numbers])
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)


def _tensors(stored: CheckpointReader, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    def read(name: str) -> np.ndarray:
        return stored.read(name).float().numpy()

    for name, renamed in _TOP.items():
        if name in stored:
            yield renamed, read(name)
    heads, nope, latent = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    for layer in range(config["num_hidden_layers"]):
        published, block = f"model.layers.{layer}.", f"blk.{layer}."
        for name, renamed in _LAYER.items():
            if published + name in stored:
                yield block + renamed, read(published + name)
        joined = read(f"{published}self_attn.kv_b_proj.weight").reshape(heads, -1, latent)
        yield f"{block}attn_k_b.weight", np.ascontiguousarray(joined[:, :nope].transpose(0, 2, 1))
        yield f"{block}attn_v_b.weight", np.ascontiguousarray(joined[:, nope:])
        if f"{published}mlp.gate.weight" in stored:
            for part in ("gate", "up", "down"):
                experts = [f"{published}mlp.experts.{e}.{part}_proj.weight" for e in range(config["n_routed_experts"])]
                yield f"{block}ffn_{part}_exps.weight", np.stack([read(name) for name in experts])
