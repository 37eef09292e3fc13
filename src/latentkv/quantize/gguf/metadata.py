"""A model's config -> the metadata of a GGUF file, which say it all or are not written."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentkv.checkpoint.gguf.config import config_of
from latentkv.errors import CheckpointError, LatentKVError
from latentkv.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from latentkv.models.config_reader import read_config
from latentkv.models.rope import attention_factor, inverse_frequencies

FREQUENCY_DIVISORS = "rope_freqs.weight"
"""The tensor of Llama 3's divisors of frequencies."""

_SOFTMAX, _SIGMOID = 1, 2
_TOLERANCE = 1e-5
# llama.cpp knows DeepSeek-V2-Lite, GigaChat3 and Kanana-2, whose queries are not compressed, by their layers (the last
# by its vocabulary, too), and looks for no q_lora_rank there.
_LAYERS_WITHOUT_Q_LORA = (26, 27)


@dataclass(frozen=True)
class ConfigMetadata:
    """What a GGUF file says of a model.

    Attributes:
        architecture: its `general.architecture`.
        values: by key; floats are stored as float32.
        divisors: of the rotary frequencies, float32 [dim / 2], where they are a tensor; None: there is none.
        notes: what people should know of the file, a sentence each.
    """

    architecture: str
    values: Mapping[str, Any]
    divisors: Tensor | None = None
    notes: tuple[str, ...] = ()


def config_metadata(config: ModelConfig) -> ConfigMetadata:
    """The metadata of a model; `require_said` tells whether they say it all.

    Raises:
        CheckpointError: the model is a hybrid, or has another part of one.
    """
    if (reason := _what_is_of_hybrids(config)) is not None:
        raise CheckpointError(
            f"This {config.model_type} model cannot be written as GGUF ({reason}): quantize it to a folder with "
            "--weights instead"
        )
    attention, rope = config.attention, config.rope
    architecture = _architecture(config)
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        # Readers stretch a linear one's themselves.
        "context_length": rope.original_max_positions if rope.kind == "linear" else config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rope.dim,
        "rope.freq_base": float(rope.theta),
    }
    values |= _latent(attention) if isinstance(attention, MLAConfig) else _grouped(attention)
    if isinstance(attention, MLAConfig):
        values |= _experts(config)
    values |= _rope(config)
    divisors = None
    if rope.kind == "llama3":
        plain = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim)
        divisors = (plain / inverse_frequencies(rope, max_context=config.max_positions)).float()
    full = {"general.architecture": architecture}
    full |= {f"{architecture}.{key}": value for key, value in values.items()}
    return ConfigMetadata(architecture, full, divisors, tuple(_notes(config)))


def _architecture(config: ModelConfig) -> str:
    attention = config.attention
    if isinstance(attention, MLAConfig):
        return "deepseek2"
    if attention.qk_norm:
        return "qwen3"
    return "qwen2" if attention.qkv_bias and not attention.output_bias else "llama"


def _latent(attention: MLAConfig) -> dict[str, Any]:
    """The cache of latents is described as one head, the heads by keys of their own."""
    latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.q_lora_rank or 0,  # which llama.cpp wants to see, 0 for none
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": attention.qk_nope_head_dim + rope,
        "attention.value_length_mla": attention.v_head_dim,
    }


def _grouped(attention: GQAConfig) -> dict[str, Any]:
    return {
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp wants the first three of every model with latent attention."""
    moe = config.moe
    if moe is None:
        return {
            "leading_dense_block_count": config.num_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
        }
    groups = moe.num_groups if moe.group_score else 1  # all groups chosen is none, which llama.cpp insists on
    return {
        "leading_dense_block_count": sum(layer.moe is None for layer in config.layers),
        "expert_feed_forward_length": moe.intermediate_size,
        "expert_shared_count": moe.num_shared_experts,
        "expert_count": moe.num_experts,
        "expert_used_count": moe.experts_per_token,
        "expert_weights_scale": float(moe.scaling_factor),
        "expert_weights_norm": moe.normalize_weights,
        "expert_gating_func": _SIGMOID if moe.scoring == "sigmoid" else _SOFTMAX,
        "expert_group_count": groups,
        "expert_group_used_count": moe.topk_group if groups > 1 else 1,
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.kind not in ("linear", "yarn"):
        return {}
    found: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        found |= {
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if rope.mscale_all_dim:
            # llama.cpp's loader takes the 0.1 out again where attention is latent.
            part = 0.1 if isinstance(config.attention, MLAConfig) else 1.0
            found["rope.scaling.yarn_log_multiplier"] = part * rope.mscale_all_dim
    return found


def _notes(config: ModelConfig) -> list[str]:
    notes: list[str] = []
    if config.num_mtp_layers:
        notes.append(
            "layers that predict further tokens (MTP) are left out: llama.cpp's deepseek2 has no place for them"
        )
    if config.moe is not None and config.moe.group_score == "max":
        notes.append(
            "llama.cpp scores groups of experts by their two best, this model by the best: it may choose other experts"
        )
    attention = config.attention
    if isinstance(attention, MLAConfig) and not math.isclose(attention.latent_norm_eps, config.rms_norm_eps):
        notes.append(
            f"llama.cpp normalises latents with the model's epsilon, {config.rms_norm_eps:g}; this model with "
            f"{attention.latent_norm_eps:g}"
        )
    return notes


def as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as a reader finds them: floats rounded to float32."""
    return {
        key: struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value
        for key, value in values.items()
    }


def require_said(config: ModelConfig, metadata: ConfigMetadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Read the metadata back, and compare what they mean with the model.

    Args:
        config: of the model.
        metadata: what `config_metadata` made of it.
        shapes: of the file's tensors.

    Raises:
        CheckpointError: they mean another model; the sentence names the difference.
    """
    architecture = metadata.architecture
    wrong = _what_is_not_written(config)
    try:
        factors = {} if metadata.divisors is None else {FREQUENCY_DIVISORS: metadata.divisors.tolist()}
        found = read_config(config_of(as_stored(metadata.values), shapes, factors))
    except LatentKVError as error:
        wrong = wrong or f"what would be written cannot be read again: {error}"
    else:
        differences = (
            _difference(name, mine, theirs, config.rope.kind)
            for name, (mine, theirs) in _compared(config, found).items()
            if not _same(mine, theirs)
        )
        wrong = wrong or next(differences, None) or _what_llama_cpp_takes_otherwise(config)
    if wrong is not None:
        raise CheckpointError(
            f"This {config.model_type} model cannot be written as GGUF's {architecture} exactly ({wrong}): quantize it "
            "to a folder with --weights instead"
        )


def _what_is_of_hybrids(config: ModelConfig) -> str | None:
    attention = config.cached_attention
    if config.recurrent is not None:
        return f"its {config.num_recurrent_layers} layers of {config.recurrent.name} are not written"
    if isinstance(attention, MLAConfig) and attention.output_gate is not None:
        return "the gate of its latent attention is not written"
    if config.rope.kind == "none":
        return "attention without rotary embedding is not written"
    if any(layer.shortcut for layer in config.layers):
        return "experts beside dense blocks are not written"
    if config.hyper_connections is not None:
        return "several residual streams are not written"
    if any(layer.moe and (layer.moe.swiglu_limit or layer.moe.shared_swiglu_limit) for layer in config.layers):
        return "limits of activations are not written"
    return None


def _what_is_not_written(config: ModelConfig) -> str | None:
    if isinstance(config.attention, GQAConfig) and config.moe is not None:
        return "the experts of models without latent attention are not written"
    return None


def _compared(one: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """What makes a model compute what it computes, by names for people; of both."""
    mine, theirs = _meaning(one), _meaning(other)
    return {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    plain = (
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions", "rms_norm_eps", "hidden_act"),
        *("mlp_bias", "tie_word_embeddings"),
        *("embedding_multiplier", "residual_multiplier", "logit_multiplier"),
    )
    found = {name: getattr(config, name) for name in plain}
    found["moe_layers"] = tuple(layer.moe is not None for layer in config.layers)
    found["sliding_windows"] = tuple(layer.sliding_window for layer in config.layers)
    found["layers with sparse attention"] = sum(layer.indexer is not None for layer in config.layers)
    if not all(found["moe_layers"]):
        found["intermediate_size"] = config.intermediate_size
    attention, rope = config.attention, config.rope
    found |= {f"attention {name}": value for name, value in vars(attention).items() if name != "latent_norm_eps"}
    # An epsilon of the norms of latents is no key: llama.cpp takes the model's, its readers here the family's.
    found |= {
        "rope dimensions": rope.dim,
        "rope interleaved": rope.interleaved,
        "rotary frequencies": inverse_frequencies(rope, max_context=config.max_positions).tolist(),
        "rope attention_factor": attention_factor(rope),
        "rope softmax factor": rope.softmax_factor if isinstance(attention, MLAConfig) else 1.0,
        "rope query_scaling_beta": rope.query_scaling_beta,
    }
    return found | (_router(config.moe) if config.moe is not None else {})


def _router(moe: MoEConfig) -> dict[str, Any]:
    found = {f"router {name}": value for name, value in vars(moe).items()}
    return found if moe.group_score else found | {"router num_groups": 1, "router topk_group": 1}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_TOLERANCE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _what_llama_cpp_takes_otherwise(config: ModelConfig) -> str | None:
    """What the metadata say, and llama.cpp computes in another way."""
    rope, attention = config.rope, config.attention
    if not isinstance(attention, MLAConfig):
        return None
    if rope.kind == "yarn" and not math.isclose(attention_factor(rope), 1.0, rel_tol=_TOLERANCE):
        return f"YaRN multiplies its rotary angles by {attention_factor(rope):.4g}, which llama.cpp does not"
    if attention.q_lora_rank and config.num_layers in _LAYERS_WITHOUT_Q_LORA:
        return f"llama.cpp takes models of {config.num_layers} layers for such without q_lora_rank"
    return None


def _difference(name: str, mine: Any, theirs: Any, rope_kind: str) -> str:
    if isinstance(mine, list):
        return f"the {name} of its rope type {rope_kind!r} with these options are none that a file can ask for"
    return f"{name} is {mine!s:.60}, and the file would say {theirs!s:.60}"
