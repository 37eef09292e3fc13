"""Write a LatentKV or Hugging Face checkpoint with latent attention as a GGUF file that llama.cpp runs.

    python convert.py CHECKPOINT MODEL.gguf               bf16
    python convert.py MODEL.gguf OUT.gguf --type q8_0     what `llama-quantize` makes of it (or q4_0)

Tensor names and the split of kv_b_proj are those of llama.cpp's own converter (architecture "deepseek2"). A byte-level
BPE tokenizer (tokenizer.json) is taken along, for llama-server; `latentkv bench model` sends token ids and needs none.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType

from checkpoint import as_float32, open_checkpoint

FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama.h, enum llama_ftype

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_FLOAT32 = {"ffn_gate_inp"}  # like the norms: llama.cpp wants the router in float32


class Tensor(NamedTuple):
    """One tensor of the file: float32 if `float32`, else bf16; `read` gives its bits or numbers."""

    name: str
    shape: tuple[int, ...]
    float32: bool
    read: Callable[[], np.ndarray]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint folder, or a bf16 GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, help="quantise SOURCE, a GGUF file, to this")
    parser.add_argument("--threads", type=int, default=0, help="of the quantisation; 0: all")
    args = parser.parse_args()
    if args.type is None:
        write_gguf(args.source, args.out)
    else:
        quantize(args.source, args.out, args.type, args.threads)


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Stream a checkpoint folder into a bf16 GGUF file, one tensor in memory at a time."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(out, "deepseek2")
    add_metadata(writer, config)
    add_tokenizer(writer, checkpoint, config["vocab_size"])
    tensors = list(gguf_tensors(open_checkpoint(checkpoint), config))
    for tensor in tensors:
        count = int(np.prod(tensor.shape))
        if tensor.float32:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * count)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint16), 2 * count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = tensor.read()
        writer.write_tensor_data(np.ascontiguousarray(as_float32(data) if tensor.float32 else data))
    writer.close()


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """What llama.cpp's deepseek2 loader reads. Its cache of latents is multi-query attention: one head of L + R."""
    layers, latent, rope = config["num_hidden_layers"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    experts = config.get("n_routed_experts")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    # llama.cpp takes a model for V2-Lite by its 27 layers; with any other number it wants this key, 0 meaning none.
    writer.add_q_lora_rank(config.get("q_lora_rank") or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    add_yarn(writer, config.get("rope_scaling"))
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 0) if experts else layers)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"] if experts else config["intermediate_size"])
    writer.add_expert_shared_count(config.get("n_shared_experts", 0) if experts else 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The words of a byte-level BPE; llama.cpp splits text in GPT-2's manner first, much as the checkpoint does."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    names = [special.get(i) or words.get(i) or f"[UNUSED{i}]" for i in range(vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(vocab_size)])
    writer.add_token_merges(merges)
    ids = {content: index for index, content in special.items()}
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_add_bos_token(True)


def add_yarn(writer: GGUFWriter, scaling: Mapping[str, Any] | None) -> None:
    """YaRN as the converter writes it; 0.1 is a factor that the loader takes out again."""
    if scaling is None:
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(float(scaling["beta_fast"]))
    writer.add_rope_scaling_yarn_beta_slow(float(scaling["beta_slow"]))
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def gguf_tensors(stored: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of the file, in its order."""
    for name, renamed in _TOP.items():
        if name in stored:
            yield _tensor(renamed, stored[name])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, renamed in _LAYER.items():
            if (weight := stored.get(f"{prefix}{name}.weight")) is not None:
                yield _tensor(f"blk.{layer}.{renamed}.weight", weight)
        yield from _kv_b(f"blk.{layer}.", stored[f"{prefix}self_attn.kv_b_proj.weight"], config)
        if f"{prefix}mlp.gate.weight" in stored:
            yield from _experts(f"blk.{layer}.", f"{prefix}mlp.experts.", stored, config["n_routed_experts"])


def _tensor(name: str, weight: np.ndarray) -> Tensor:
    return Tensor(name, weight.shape, weight.ndim == 1 or name.split(".")[-2] in _FLOAT32, lambda: weight)


def _kv_b(prefix: str, weight: np.ndarray, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """W_UK [H, L, Dn] (transposed: it is applied to the query) and W_UV [H, Dv, L]."""
    heads, nope, latent = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    joined = weight.reshape(heads, nope + config["v_head_dim"], latent)
    yield Tensor(f"{prefix}attn_k_b.weight", (heads, latent, nope), False, lambda: joined[:, :nope].transpose(0, 2, 1))
    yield Tensor(f"{prefix}attn_v_b.weight", (heads, config["v_head_dim"], latent), False, lambda: joined[:, nope:])


def _experts(prefix: str, source: str, stored: Mapping[str, np.ndarray], count: int) -> Iterator[Tensor]:
    for part in ("gate", "up", "down"):
        names = [f"{source}{expert}.{part}_proj.weight" for expert in range(count)]
        shape = (count, *stored[names[0]].shape)
        yield Tensor(
            f"{prefix}ffn_{part}_exps.weight", shape, False, lambda names=names: np.stack([stored[n] for n in names])
        )


def quantize(source: Path, out: Path, file_type: str, threads: int) -> None:
    """As `llama-quantize` does."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[file_type], threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantise {source}.")


if __name__ == "__main__":
    main()
