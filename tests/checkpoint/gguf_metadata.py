"""Metadata and shapes of small GGUF files, as llama.cpp's converters write them, of each architecture and age."""

import struct

H, L, N, R, V, D, VOCAB = 4, 32, 24, 8, 16, 64, 128


def f32(value):
    """What a number becomes in the file."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def deepseek(architecture="deepseek2", *, age="new", q_lora=48, experts=8, blocks=3, **others):
    """deepseek2 and mistral4; `age` "new" (k_b and v_b), "old" (kv_b), "ik" (k_b and v_b without keys of their own)."""
    new = age == "new"
    values = {
        "block_count": blocks,
        "context_length": 4096,
        "embedding_length": D,
        "feed_forward_length": 160,
        "vocab_size": VOCAB,
        "attention.head_count": H,
        "attention.head_count_kv": 1 if new else H,
        "attention.kv_lora_rank": L,
        "attention.key_length": L + R if new else N + R,
        "attention.value_length": L if new else V,
        "attention.layer_norm_rms_epsilon": f32(1e-6),
        "rope.dimension_count": R,
        "rope.freq_base": 10000.0,
        "expert_feed_forward_length": 40,
        "expert_shared_count": 1 if experts else 0,
        "leading_dense_block_count": 1 if experts else blocks,
    }
    if new:
        values |= {"attention.key_length_mla": N + R, "attention.value_length_mla": V}
    if q_lora:
        values["attention.q_lora_rank"] = q_lora
    if experts:
        values |= {"expert_count": experts, "expert_used_count": 2}
    return _named(architecture, values | others)


def deepseek_shapes(*, age="new", q_lora=48, experts=8, blocks=3, sparse_from=1, sigmoid=True, fused=False, tied=False):
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, D)}
    for block in range(blocks):
        layer = {"attn_norm": (D,), "ffn_norm": (D,), "attn_kv_a_mqa": (L + R, D), "attn_kv_a_norm": (L,)}
        layer |= {"attn_output": (D, H * V)}
        if q_lora:
            layer |= {"attn_q_a": (q_lora, D), "attn_q_a_norm": (q_lora,), "attn_q_b": (H * (N + R), q_lora)}
        else:
            layer |= {"attn_q": (H * (N + R), D)}
        if age in ("old", "ik"):
            layer |= {"attn_kv_b": (H * (N + V), L)}
        if age in ("new", "ik"):
            flat = age == "ik"
            layer |= {"attn_k_b": (H * L, N) if flat else (H, L, N), "attn_v_b": (H * V, L) if flat else (H, V, L)}
        if not experts or block < sparse_from:
            layer |= {"ffn_gate": (160, D), "ffn_up": (160, D), "ffn_down": (D, 160)}
        else:
            layer |= {"ffn_gate_inp": (experts, D), "ffn_down_exps": (experts, D, 40)}
            layer |= {f"ffn_{part}_shexp": (40, D) for part in ("gate", "up")} | {"ffn_down_shexp": (D, 40)}
            if fused:
                layer |= {"ffn_gate_up_exps": (experts, 80, D)}
            else:
                layer |= {f"ffn_{part}_exps": (experts, 40, D) for part in ("gate", "up")}
            if sigmoid:
                shapes[f"blk.{block}.exp_probs_b.bias"] = (experts,)
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def predicting_shapes(block):
    """What a block that predicts a further token has beside its layer."""
    parts = {"eh_proj": (D, 2 * D), "enorm": (D,), "hnorm": (D,), "shared_head_norm": (D,)}
    return {f"blk.{block}.nextn.{name}.weight": shape for name, shape in parts.items()}


def grouped(architecture="llama", *, heads=4, kv_heads=2, head_dim=16, **others):
    """llama, qwen2 and qwen3."""
    values = {
        "block_count": 2,
        "context_length": 2048,
        "embedding_length": D,
        "feed_forward_length": 160,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": f32(1e-5),
        "rope.freq_base": 500000.0,
    }
    if head_dim * heads != D:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return _named(architecture, values | others)


def grouped_shapes(architecture="llama", *, heads=4, kv_heads=2, head_dim=16, tied=True):
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, D)}
    for block in range(2):
        rows = {"attn_q": heads * head_dim, "attn_k": kv_heads * head_dim, "attn_v": kv_heads * head_dim}
        layer = {f"{name}.weight": (count, D) for name, count in rows.items()}
        layer |= {"attn_norm.weight": (D,), "ffn_norm.weight": (D,), "attn_output.weight": (D, heads * head_dim)}
        layer |= {"ffn_gate.weight": (160, D), "ffn_up.weight": (160, D), "ffn_down.weight": (D, 160)}
        if architecture == "qwen2":
            layer |= {f"{name}.bias": (count,) for name, count in rows.items()}
        if architecture == "qwen3":
            layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in layer.items()}
    return shapes


def minicpm3(**others):
    values = {
        "block_count": 2,
        "context_length": 32768,
        "embedding_length": D,
        "feed_forward_length": 160,
        "attention.head_count": H,
        "attention.head_count_kv": H,
        "attention.layer_norm_rms_epsilon": f32(1e-5),
        "attention.q_lora_rank": 48,
        "attention.kv_lora_rank": L,
        "attention.key_length": N + R,
        "rope.dimension_count": R,
    }
    return _named("minicpm3", values | others)


def minicpm3_shapes():
    shapes = deepseek_shapes(age="old", experts=0, blocks=2, tied=True)
    return shapes | {f"rope_factors_{kind}.weight": (R // 2,) for kind in ("long", "short")}


def _named(architecture, values):
    ends = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    return {"general.architecture": architecture} | ends | {f"{architecture}.{key}": v for key, v in values.items()}
