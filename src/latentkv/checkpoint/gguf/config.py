"""A GGUF file's metadata -> the `config.json` that they mean, in transformers' words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentkv.checkpoint.gguf.metadata import Metadata
from latentkv.checkpoint.gguf.rope import rope_parameters
from latentkv.errors import CheckpointError

MLA_ARCHITECTURES = ("deepseek2", "mistral4", "minicpm3")
GQA_ARCHITECTURES = ("llama", "qwen2", "qwen3")
ARCHITECTURES = MLA_ARCHITECTURES + GQA_ARCHITECTURES
"""What a file's `general.architecture` may be."""

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_SOFTMAX, _SIGMOID = 1, 2
_GLM_BLOCKS, _GLM_VOCABULARY = (47, 48), 154_880
# Groups of experts that DeepSeek-V3 and -V2 choose from, for files made before the metadata held them.
_GROUPS_BY_EXPERTS = {(_SIGMOID, 256): (8, 4), (_SOFTMAX, 160): (8, 3)}
# Keys that change the mathematics in ways that none of these architectures has here, and the value that does nothing.
_UNSUPPORTED: Mapping[str, float | bool] = {
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
}


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The config.json of a GGUF file's model; `models.read_config` checks the ranges of what is in it.

    Everything that a family's defaults could fill in is stated, so that nothing is guessed there.

    Args:
        metadata: the file's keys and values, arrays as lists.
        shapes: of its tensors, the contiguous dimension last.
        factors: the numbers of those of `rope.FACTOR_TENSORS` that the file holds.

    Raises:
        CheckpointError: the architecture is not supported, or a key is missing, of another kind, or asks for what is
            not supported.
    """
    meta = Metadata(metadata)
    architecture = meta.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"The GGUF file holds a model of the architecture {architecture!r:.60}, which is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}."
        )
    _refuse_unsupported(meta)
    if len(shapes.get(_EMBEDDING, ())) != 2:
        raise CheckpointError(f"The GGUF file has no matrix {_EMBEDDING}: it holds no whole language model.")
    layers, predicting = _layers(meta, shapes)
    context = meta.whole("context_length")
    common = {
        # The embedding's rows are the vocabulary: llama.cpp, too, passes over the key `vocab_size`.
        "vocab_size": shapes[_EMBEDDING][0],
        "hidden_size": meta.whole("embedding_length"),
        "intermediate_size": meta.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": predicting,
        "num_attention_heads": meta.whole("attention.head_count"),
        "max_position_embeddings": context,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": _HEAD not in shapes,
        "bos_token_id": meta.token_id("bos"),
        "eos_token_id": meta.end_ids() or None,
        "pad_token_id": meta.token_id("padding"),
    }
    is_mla = architecture in MLA_ARCHITECTURES
    particular = _latent_attention(meta) if is_mla else _grouped_attention(meta, shapes)
    rope = rope_parameters(meta, shapes, factors or {}, is_mla=is_mla)
    return common | {"rope_parameters": rope} | particular


def _refuse_unsupported(meta: Metadata) -> None:
    for key, neutral in _UNSUPPORTED.items():
        if not meta.has(key):
            continue
        value = meta.flag(key) if isinstance(neutral, bool) else meta.number(key)
        if value != neutral:
            raise CheckpointError(f"The GGUF file's metadata: {meta.architecture}.{key}={value} is not supported.")


def _layers(meta: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(layers of the model, blocks after them that predict further tokens).

    `block_count` counts both where the file was made with the latter. Some files count them and leave them out.
    """
    blocks, predicting = meta.whole("block_count"), meta.whole("nextn_predict_layers", 0)
    if not predicting:
        return blocks, 0
    if predicting >= blocks:
        raise CheckpointError(
            f"The GGUF file's metadata: {predicting} of {blocks} blocks are to predict further tokens, which leaves no "
            "model: the file is damaged."
        )
    layers = blocks - predicting
    if "blk.0.attn_norm.weight" not in shapes:
        raise CheckpointError(
            "The GGUF file holds only the blocks that predict further tokens (a drafter for another file): name the "
            "model's own file."
        )
    if f"blk.{layers}.nextn.eh_proj.weight" in shapes:
        return layers, predicting
    return (blocks if f"blk.{layers}.attn_norm.weight" in shapes else layers), 0


def _latent_attention(meta: Metadata) -> dict[str, Any]:
    heads, rope_dim = meta.whole("attention.head_count"), meta.whole("rope.dimension_count")
    # Files with k_b and v_b describe the cache as one head of latent and rotary key, and the heads by keys of their
    # own; older ones and the first with k_b and v_b describe the heads alone.
    split = meta.has("attention.key_length_mla")
    key = meta.whole("attention.key_length_mla" if split else "attention.key_length")
    # MiniCPM3's files do not say: as many as of the hidden size fall to a head.
    share = meta.whole("embedding_length") // max(heads, 1)
    value = meta.whole("attention.value_length_mla" if split else "attention.value_length", share)
    if key <= rope_dim:
        raise CheckpointError(
            f"The GGUF file's metadata: heads of {key} dimensions leave none beside {rope_dim} rotary ones: the file "
            "is damaged."
        )
    attention = {
        "num_key_value_heads": heads,
        # 0 is how some converters write that queries are not compressed.
        "q_lora_rank": meta.whole("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": meta.whole("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value,
        "attention_bias": False,
    }
    if meta.architecture == "minicpm3":
        # Constants of llama.cpp's code, and of the only model of this kind. It rotates halves, as its family does.
        return attention | {"model_type": "minicpm3", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    # deepseek2 and mistral4 rotate neighbours, and their weights are as published.
    return attention | {"rope_interleave": True} | _experts(meta)


def _experts(meta: Metadata) -> dict[str, Any]:
    """The router and its experts, and the family whose they are."""
    experts = meta.whole("expert_count", 0)
    if not experts:
        return {"model_type": "youtu"}  # latent attention without experts is that family, and nothing else in it
    scoring, normalizes = _gating(meta), meta.flag("expert_weights_norm", False)
    groups, chosen_groups = _GROUPS_BY_EXPERTS.get((scoring, experts), (1, 1))
    groups = meta.whole("expert_group_count", groups) or 1
    found = {
        "model_type": _family(meta, scoring, normalizes=normalizes),
        "n_routed_experts": experts,
        "num_experts_per_tok": meta.whole("expert_used_count"),
        "n_shared_experts": meta.whole("expert_shared_count", 0),
        "moe_intermediate_size": meta.whole("expert_feed_forward_length"),
        "first_k_dense_replace": meta.whole("leading_dense_block_count", 0),
        "moe_layer_freq": 1,
        "norm_topk_prob": normalizes,
        # 0 stands for none, as in llama.cpp.
        "routed_scaling_factor": meta.number("expert_weights_scale", 1.0) or 1.0,
        "scoring_func": "sigmoid" if scoring == _SIGMOID else "softmax",
        "n_group": groups,
        "topk_group": meta.whole("expert_group_used_count", chosen_groups) if groups > 1 else 1,
    }
    if scoring == _SIGMOID:
        return found | {"topk_method": "noaux_tc"}
    if found["model_type"] == "deepseek_v2":
        # Groups are scored by their best expert (DeepSeek-V2, section 2.2.2); without groups it is plain top-k.
        return found | {"topk_method": "group_limited_greedy" if groups > 1 else "greedy"}
    return found


def _family(meta: Metadata, scoring: int, *, normalizes: bool) -> str:
    """Whose semantics a router of `deepseek2` or `mistral4` has.

    A sigmoid with a correction bias is DeepSeek-V3's (Kimi-K2, Moonlight, GigaChat3, Kanana-2), and GLM-4.7-Flash's,
    which differs in nothing but its name. A softmax whose chosen weights are used as they are is DeepSeek-V2's. One
    whose weights are made to sum to 1 is Mistral's (Mistral Large 3 comes as deepseek2, Mistral 4 as mistral4).
    """
    if scoring == _SIGMOID:
        return "glm4_moe_lite" if _is_glm(meta) else "deepseek_v3"
    return "mistral4" if normalizes or meta.architecture == "mistral4" else "deepseek_v2"


def _gating(meta: Metadata) -> int:
    """How the router scores experts. Files that do not say are older than DeepSeek-V3, or GLM-4.7-Flash's first."""
    scoring = meta.whole("expert_gating_func", 0) or (_SIGMOID if _is_glm(meta) else _SOFTMAX)
    if scoring not in (_SOFTMAX, _SIGMOID):
        raise CheckpointError(
            f"The GGUF file's metadata: {meta.architecture}.expert_gating_func={scoring} is not supported; 1 (softmax) "
            "and 2 (sigmoid) are."
        )
    return scoring


def _is_glm(meta: Metadata) -> bool:
    if meta.architecture != "deepseek2" or meta.whole("block_count") not in _GLM_BLOCKS:
        return False
    if meta.has("vocab_size"):
        return meta.whole("vocab_size") == _GLM_VOCABULARY
    return meta.has("tokenizer.ggml.tokens") and len(meta.array("tokenizer.ggml.tokens", str)) == _GLM_VOCABULARY


def _grouped_attention(meta: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if meta.whole("expert_count", 0):
        raise CheckpointError(
            f"The GGUF file holds a {meta.architecture} model with {meta.whole('expert_count')} experts (Mixtral's "
            "kind), which is not supported."
        )
    heads = meta.whole("attention.head_count")
    head_dim = meta.whole("attention.key_length", meta.whole("embedding_length") // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := meta.whole(key, head_dim)) != head_dim:
            raise CheckpointError(
                f"The GGUF file's metadata: {meta.architecture}.{key}={found} beside heads of {head_dim} dimensions is "
                "not supported; they must be equal."
            )
    attention = {
        "model_type": meta.architecture,
        "num_key_value_heads": meta.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "use_sliding_window": False,
    }
    if meta.architecture != "llama":
        return attention
    window = meta.whole("attention.sliding_window", 0)
    if window:
        # Mistral 7B's first version, which comes as llama.
        return attention | {"model_type": "mistral", "sliding_window": window, "use_sliding_window": True}
    return attention | {
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
