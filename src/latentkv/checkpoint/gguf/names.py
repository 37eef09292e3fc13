"""What a GGUF file's tensors are in a published checkpoint: names and shapes, all settled before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentkv.checkpoint.gguf.recipes import JoinedHeads, Recipe, Rows
from latentkv.checkpoint.gguf.rope import FACTOR_TENSORS
from latentkv.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_NAMED_AT_MOST = 3
_PERMUTED = ("llama", "mistral")  # the architecture "llama": its converter puts rotary dimensions in another order
_MLP = (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
# Repeat what the model has; files may hold them or not.
_OPTIONAL_OF_MTP = {"nextn.embed_tokens": "embed_tokens", "nextn.shared_head_head": "shared_head.head"}


def sources_of(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Recipe]:
    """Every tensor of a published checkpoint of this model, and how it is made of the file's.

    Experts are named one by one, `model.layers.3.mlp.experts.7.up_proj.weight`; those of a layer share their `source`,
    and `stacked_experts` names them whole. Blocks that predict further tokens come after the layers, as published.

    Args:
        config: what `config_of` said.
        shapes: of the file's tensors, the contiguous dimension last.

    Raises:
        CheckpointError: tensors are missing, of another shape, or left over; the sentence names them.
    """
    found = dict(_all(config, shapes))
    used = {source for recipe in found.values() for source in recipe.sources} | set(FACTOR_TENSORS)
    left = [name for name in shapes if name not in used and not _is_spare(name, used)]
    if left:
        raise CheckpointError(
            f"The GGUF file holds {_listed([f'{name} {list(shapes[name])}' for name in left])}, which its metadata "
            "have no place for: the file is damaged, or made by a converter that is not known here."
        )
    return found


def stacked_experts(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Rows]:
    """The experts of each layer whole, [E, O, D], by the names that one expert's have without its number.

    `model.layers.3.mlp.experts.up_proj.weight`; `take` gives the file's own rows, one expert after the other.

    Args:
        config: what `config_of` said.
        shapes: of the file's tensors.

    Raises:
        CheckpointError: as `sources_of`.
    """
    return {
        f"model.layers.{layer}.mlp.experts.{leaf}.weight": stack
        for layer in range(_blocks(config))
        if _is_sparse(config, layer)
        for leaf, stack in _stacks(config, shapes, layer)
    }


def _all(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, Recipe]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", _whole(shapes, "token_embd.weight", (vocab, hidden))
    yield "model.norm.weight", _whole(shapes, "output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _whole(shapes, "output.weight", (vocab, hidden))
    for layer in range(_blocks(config)):
        block, published = f"blk.{layer}.", f"model.layers.{layer}."
        yield f"{published}input_layernorm.weight", _whole(shapes, f"{block}attn_norm.weight", (hidden,))
        yield f"{published}post_attention_layernorm.weight", _whole(shapes, f"{block}ffn_norm.weight", (hidden,))
        attend = _latent_attention if config.get("kv_lora_rank") else _grouped_attention
        for name, recipe in attend(config, shapes, block):
            yield f"{published}self_attn.{name}", recipe
        feed_forward = _experts if _is_sparse(config, layer) else _dense
        for name, recipe in feed_forward(config, shapes, layer):
            yield f"{published}mlp.{name}", recipe
        if layer >= config["num_hidden_layers"]:
            for name, recipe in _predicting(hidden, vocab, shapes, block):
                yield f"{published}{name}.weight", recipe


def _latent_attention(config: Mapping[str, Any], shapes: Shapes, block: str) -> Iterator[tuple[str, Recipe]]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if low := config["q_lora_rank"]:
        yield "q_a_proj.weight", _whole(shapes, f"{block}attn_q_a.weight", (low, hidden))
        yield "q_a_layernorm.weight", _whole(shapes, f"{block}attn_q_a_norm.weight", (low,))
        yield "q_b_proj.weight", _whole(shapes, f"{block}attn_q_b.weight", (heads * (nope + rope), low))
    else:
        yield "q_proj.weight", _whole(shapes, f"{block}attn_q.weight", (heads * (nope + rope), hidden))
    yield "kv_a_proj_with_mqa.weight", _whole(shapes, f"{block}attn_kv_a_mqa.weight", (latent + rope, hidden))
    yield "kv_a_layernorm.weight", _whole(shapes, f"{block}attn_kv_a_norm.weight", (latent,))
    yield "kv_b_proj.weight", _kv_b(shapes, block, heads, nope, value, latent)
    yield "o_proj.weight", _whole(shapes, f"{block}attn_output.weight", (hidden, heads * value))


def _kv_b(shapes: Shapes, block: str, heads: int, nope: int, value: int, latent: int) -> Recipe:
    """Older files hold it as published, newer ones in two parts, some both."""
    shape, whole = (heads * (nope + value), latent), f"{block}attn_kv_b.weight"
    keys, values = f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"
    if whole in shapes or not (keys in shapes or values in shapes):
        return _whole(shapes, whole, shape)
    _require(shapes, keys, (heads, latent, nope), (heads * latent, nope))
    _require(shapes, values, (heads, value, latent), (heads * value, latent))
    return JoinedHeads(keys, values, heads, shape)


def _grouped_attention(config: Mapping[str, Any], shapes: Shapes, block: str) -> Iterator[tuple[str, Recipe]]:
    hidden, dim, model_type = config["hidden_size"], config["head_dim"], config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    permuted = model_type in _PERMUTED
    has_bias = model_type == "qwen2" or config.get("attention_bias", False)
    for name, leaf, groups, is_rotated in (
        ("attn_q", "q_proj", heads, permuted),
        ("attn_k", "k_proj", kv_heads, permuted),
        ("attn_v", "v_proj", kv_heads, False),
    ):
        for end, shape in (("weight", (groups * dim, hidden)), ("bias", (groups * dim,))):
            if end == "weight" or has_bias:
                source = f"{block}{name}.{end}"
                _require(shapes, source, shape)
                yield f"{leaf}.{end}", Rows(source, shape, heads=groups if is_rotated else 0)
    yield "o_proj.weight", _whole(shapes, f"{block}attn_output.weight", (hidden, heads * dim))
    if has_bias and model_type != "qwen2":
        yield "o_proj.bias", _whole(shapes, f"{block}attn_output.bias", (hidden,))
    if model_type == "qwen3":
        yield "q_norm.weight", _whole(shapes, f"{block}attn_q_norm.weight", (dim,))
        yield "k_norm.weight", _whole(shapes, f"{block}attn_k_norm.weight", (dim,))


def _dense(config: Mapping[str, Any], shapes: Shapes, layer: int) -> Iterator[tuple[str, Recipe]]:
    yield from _mlp(config, shapes, f"blk.{layer}.ffn_%s", config["intermediate_size"])


def _mlp(config: Mapping[str, Any], shapes: Shapes, pattern: str, width: int) -> Iterator[tuple[str, Recipe]]:
    hidden = config["hidden_size"]
    for part, leaf in _MLP:
        source, shape = pattern % part, (hidden, width) if part == "down" else (width, hidden)
        yield f"{leaf}.weight", _whole(shapes, f"{source}.weight", shape)
        if config.get("mlp_bias", False):
            yield f"{leaf}.bias", _whole(shapes, f"{source}.bias", shape[:1])


def _experts(config: Mapping[str, Any], shapes: Shapes, layer: int) -> Iterator[tuple[str, Recipe]]:
    block, count, hidden = f"blk.{layer}.", config["n_routed_experts"], config["hidden_size"]
    yield "gate.weight", _whole(shapes, f"{block}ffn_gate_inp.weight", (count, hidden))
    if config["scoring_func"] == "sigmoid":
        yield "gate.e_score_correction_bias", _whole(shapes, f"{block}exp_probs_b.bias", (count,))
    for leaf, stack in _stacks(config, shapes, layer):
        _, rows, width = stack.shape
        for expert in range(count):
            start = stack.start + expert * (stack.stride or rows)
            yield f"experts.{expert}.{leaf}.weight", Rows(stack.source, (rows, width), start)
    if shared := config["n_shared_experts"]:
        for name, recipe in _mlp(config, shapes, f"{block}ffn_%s_shexp", shared * config["moe_intermediate_size"]):
            yield f"shared_experts.{name}", recipe


def _stacks(config: Mapping[str, Any], shapes: Shapes, layer: int) -> Iterator[tuple[str, Rows]]:
    """A layer's experts whole: gate over up in one tensor (the newest files), or each in its own."""
    count, hidden, width = config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"]
    fused = f"blk.{layer}.ffn_gate_up_exps.weight"
    if fused in shapes:
        _require(shapes, fused, (count, 2 * width, hidden))
        yield "gate_proj", Rows(fused, (count, width, hidden), 0, 2 * width)
        yield "up_proj", Rows(fused, (count, width, hidden), width, 2 * width)
    for part, leaf in _MLP[2:] if fused in shapes else _MLP:
        shape = (count, hidden, width) if part == "down" else (count, width, hidden)
        yield leaf, _whole(shapes, f"blk.{layer}.ffn_{part}_exps.weight", shape)


def _predicting(hidden: int, vocab: int, shapes: Shapes, block: str) -> Iterator[tuple[str, Recipe]]:
    yield "eh_proj", _whole(shapes, f"{block}nextn.eh_proj.weight", (hidden, 2 * hidden))
    yield "enorm", _whole(shapes, f"{block}nextn.enorm.weight", (hidden,))
    yield "hnorm", _whole(shapes, f"{block}nextn.hnorm.weight", (hidden,))
    norm = f"{block}nextn.shared_head_norm.weight"
    # Without a norm of its own it is the model's, as in llama.cpp.
    yield "shared_head.norm", _whole(shapes, norm if norm in shapes else "output_norm.weight", (hidden,))
    for name, published in _OPTIONAL_OF_MTP.items():
        if (source := f"{block}{name}.weight") in shapes:
            yield published, _whole(shapes, source, (vocab, hidden))


def _blocks(config: Mapping[str, Any]) -> int:
    return config["num_hidden_layers"] + config["num_nextn_predict_layers"]


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    return bool(config.get("n_routed_experts")) and layer >= config["first_k_dense_replace"]


def _is_spare(name: str, used: set[str]) -> bool:
    """Whether a tensor says again what another one does: the parts of a kv_b that is there whole."""
    stem = name.removesuffix("_k_b.weight").removesuffix("_v_b.weight")
    return stem != name and f"{stem}_kv_b.weight" in used


def _whole(shapes: Shapes, source: str, shape: tuple[int, ...]) -> Rows:
    _require(shapes, source, shape)
    return Rows(source, shape)


def _require(shapes: Shapes, name: str, *allowed: tuple[int, ...]) -> None:
    if name not in shapes:
        raise CheckpointError(
            f"The GGUF file lacks {name} {list(allowed[0])}: the download is incomplete, or a part of a split file is "
            "missing."
        )
    if tuple(shapes[name]) not in allowed:
        raise CheckpointError(
            f"GGUF tensor {name} has the shape {list(shapes[name])}, and the metadata ask for "
            f"{' or '.join(str(list(shape)) for shape in allowed)}: the file is damaged."
        )


def _listed(items: list[str]) -> str:
    more = len(items) - _NAMED_AT_MOST
    return ", ".join(items[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
