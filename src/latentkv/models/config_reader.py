"""config.json -> `ModelConfig`: published DeepSeek-style files and those that transformers 5 writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from latentkv.checkpoint.gguf.tensors import GGUFTensors, is_gguf
from latentkv.checkpoint.layouts import ORIGINAL, describe_folder, foreign_quantization, why_missing
from latentkv.checkpoint.locate import CONFIG_FILE, holds_weights
from latentkv.checkpoint.wrapper import config_levels, outermost
from latentkv.errors import ConfigError
from latentkv.json_files import read_json
from latentkv.models.config import (
    GQAConfig,
    HyperConnectionConfig,
    IndependentHyperConnectionConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    RecurrentConfig,
)
from latentkv.models.families import ALIASES, FAMILIES, SPELLINGS, TEXT_MODEL_OF, Family, family_of
from latentkv.models.fields import names_layers, read_flag, read_number, read_positive, shown
from latentkv.models.hybrid_reader import read_hybrid_layers
from latentkv.models.indexer_reader import read_indexer, sharing_layers
from latentkv.models.moe_reader import read_moe, read_swiglu_limit, sparse_layers
from latentkv.models.rope_reader import longest_context, read_rope
from latentkv.token_ids import read_token_id, read_token_ids

TIED = "tie_word_embeddings"
"""The key that says whether the output head is the embedding."""

# Keys that change the mathematics, with the values that mean "off": refused where the family has no default for them.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "final_logit_softcapping": (None,),
    "index_topk": (None,),
    "index_n_heads": (None,),
    "attention_chunk_size": (None,),
    "layer_scale": (None,),
    "clip_qkv": (None,),
    "num_kv_shared_layers": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "moe_router_enable_expert_bias": (None, True),
    "mla_use_nope": (None, True),
    "gated_norm_rank": (None, 0),
    "hc_mult": (None, 0),
    "index_kpool": (None, 0, 1),
    "swiglu_limit": (None, 0),
    "no_kda_lora": (None, True),
    "use_kda_lora": (None, False),
    "use_mla_nope": (None, False),
    "use_nGPT": (None, False),
    "scale_router_input": (None, False),
    "up_proj_norm": (None, False),
    "value_norm": (None, False),
    "router_bias": (None, False),
    "zero_expert_type": (None, "identity"),
    "attention_method": (None, "mla", "MLA"),
    "ngram_vocab_size_ratio": (None, 0),
    "oe_vocab_size_ratio": (None, 0),
}

# Other names of a router's activation: dots.llm1 names that of DeepSeek-V3 by its bias.
_SCORINGS = {"noaux_tc": "sigmoid"}

# No model has more; a damaged file may say so, and every layer costs memory before the first weight is read. Any
# product of these that is the size of a tensor stays within 64 bits.
_LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 4096,
    "num_layers": 2048,
    "num_nextn_predict_layers": 64,
    "n_routed_experts": 65_536,
    "zero_expert_num": 65_536,
    "n_shared_experts": 65_536,
    "num_attention_heads": 65_536,
    "num_key_value_heads": 65_536,
    "head_dim": 65_536,
    "qk_nope_head_dim": 65_536,
    "qk_rope_head_dim": 65_536,
    "v_head_dim": 65_536,
    "index_n_heads": 65_536,
    "index_head_dim": 65_536,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "hc_mult": 16,
    "hc_sinkhorn_iters": 1000,
}
_LARGEST_SIZE = 2**24


def read_config(source: Path | str | Mapping[str, Any]) -> ModelConfig:
    """Read a model's configuration.

    Args:
        source: a checkpoint folder, a config file, a GGUF file, or the parsed JSON. Of a folder, generation_config.json
            is read too: its end-of-sequence ids join those of config.json.

    Raises:
        ConfigError: the file is missing or malformed, the architecture is unknown, or a field is not supported.
    """
    generation: Mapping[str, Any] = {}
    if isinstance(source, Mapping):
        raw = source
    elif is_gguf(path := Path(source)):
        raw = GGUFTensors(path).config
    elif path.is_dir():
        raw = read_model_json(path / CONFIG_FILE)
        if (path / "generation_config.json").exists():
            generation = read_model_json(path / "generation_config.json")
    else:
        raw = read_model_json(path)
    try:
        return _from_dict(raw, generation)
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:
        # A word for a number, a list for an object.
        raise ConfigError(f"config.json holds a value of the wrong kind: {error}.") from error


def read_model_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder.

    Raises:
        ConfigError: it cannot be read; where the file is missing, the sentence says what is there instead.
    """
    if not path.exists() or (path.is_file() and why_missing(path)):
        raise ConfigError(_why_absent(path))
    return read_json(path, ConfigError)


def _why_absent(path: Path) -> str:
    """What stands in place of a file that is not there."""
    if reason := why_missing(path):
        return f"{reason}."
    if path.name != CONFIG_FILE or holds_weights(path.parent):
        return f"{path.parent} has no {path.name}; a model folder needs one."
    return f"{path.parent} has no {path.name}: {describe_folder(path.parent)}."


def _from_dict(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    levels = config_levels(raw)
    inner = levels[-1]
    # What weights are stored as comes first: it is the likeliest reason why a config is of no use.
    _refuse_quantization(outermost(raw, "quantization_config"), outermost(raw, "quantization"))
    model_type = _model_type(levels)
    family = family_of(model_type, inner)
    fields = Fields(inner, family)
    _refuse_other_architectures(fields, family, model_type)
    _refuse_unsupported(fields, family)
    hidden_size = fields.size("hidden_size")
    bos_token_id, eos_token_ids = _token_ids(levels, family, generation, vocab_size=fields.size("vocab_size"))
    layers = _read_layers(fields, family)
    embedding, residual, logit = _multipliers(fields, len(layers))
    rotating = [layer.rope for layer in layers if layer.rope and not isinstance(layer.attention, RecurrentConfig)]
    if not rotating:
        raise ConfigError("config.json: no layer reads past tokens; that is not supported.")
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_heads=fields.size("num_attention_heads"),
        intermediate_size=fields.size("intermediate_size"),
        max_positions=longest_context(rotating[0], fields.size("max_position_embeddings")),
        layers=layers,
        rms_norm_eps=fields.positive("rms_norm_eps", 0.0),
        mlp_bias=fields.flag("mlp_bias"),
        num_mtp_layers=fields.count("num_nextn_predict_layers") if family.mtp else 0,
        gated_norm_rank=fields.count("gated_norm_rank"),
        hyper_connections=_hyper_connections(fields),
        swiglu_limit=None if family.limits_routed else read_swiglu_limit(fields),
        exact_head=family.exact_head,
        embedding_multiplier=embedding,
        residual_multiplier=residual,
        logit_multiplier=logit,
        tie_word_embeddings=stated if (stated := stated_tying(raw)) is not None else fields.flag(TIED),
        initializer_range=fields.positive("initializer_range", 0.02),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        source=dict(raw),
    )


def stated_tying(raw: Mapping[str, Any]) -> bool | None:
    """Whether a config.json ties the output head to the embedding; None where it does not say, or says both.

    Then the files decide (`models.stored_config`), and without files the family's default.
    """
    stated = {read_flag(level[TIED], TIED) for level in config_levels(raw) if level.get(TIED) is not None}
    return stated.pop() if len(stated) == 1 else None


def _model_type(levels: tuple[Mapping[str, Any], ...]) -> str:
    named = levels[-1].get("model_type")
    if not isinstance(named, str | None):
        raise ConfigError(f"config.json: model_type must be a text, not {shown(named)}.")
    if named is None:
        named = next(
            (TEXT_MODEL_OF[t] for level in levels if (t := str(level.get("model_type"))) in TEXT_MODEL_OF), None
        )
    if named is None:
        raise ConfigError(f"config.json names no model_type; supported: {', '.join(FAMILIES)}.")
    model_type = ALIASES.get(named, named)
    if model_type not in FAMILIES:
        raise ConfigError(f"Model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}.")
    return model_type


class Fields:
    """The keys of one config.json, an absent one replaced by its family's default."""

    def __init__(self, raw: Mapping[str, Any], family: Family) -> None:
        others = {key: name for key, names in SPELLINGS.items() for name in names if name in raw and key not in raw}
        self.raw = {**raw, **{key: raw[name] for key, name in others.items()}}
        self._defaults = family.defaults

    def get(self, key: str) -> Any:
        """The key's value, the family's default if it is absent, None if there is none."""
        return self.raw[key] if key in self.raw else self._defaults.get(key)

    def size(self, key: str) -> int:
        """A positive whole number."""
        return self.whole(key, self.get(key))

    def count(self, key: str) -> int:
        """A whole number that may be 0, which null stands for, too."""
        return self.whole(key, 0 if self.get(key) is None else self.get(key), least=0)

    def number(self, key: str) -> float:
        """A finite number."""
        return read_number(self.get(key), key)

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0; the default where the key is absent, null or 0."""
        return read_positive(self.get(key), key, default)

    def flag(self, key: str) -> bool:
        """True or false, which null stands for, too."""
        return read_flag(self.get(key), key)

    def whole(self, key: str, value: Any, *, least: int = 1) -> int:
        """A whole number that stands somewhere else."""
        most = _LARGEST.get(key, _LARGEST_SIZE)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"config.json: {key} must be a whole number from {least} to {most:,}, not {shown(value)}."
            )
        return value


def _multipliers(fields: Fields, num_layers: int) -> tuple[float, float, float]:
    """Of embeddings, residual branches and logits, as MiniCPM or Granite states them; others have none of the keys."""
    depth, hidden_size = fields.get("scale_depth"), fields.size("hidden_size")
    return (
        fields.positive("scale_emb", 1.0) * fields.positive("embedding_multiplier", 1.0),
        (1.0 if depth is None else fields.number("scale_depth") / math.sqrt(num_layers))
        * fields.positive("residual_multiplier", 1.0),
        fields.positive("dim_model_base", hidden_size) / hidden_size / fields.positive("logits_scaling", 1.0),
    )


def _refuse_other_architectures(fields: Fields, family: Family, model_type: str) -> None:
    architectures = fields.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else []:
        if name in family.other_architectures:
            raise ConfigError(
                f"config.json: architectures names {name}: {family.other_architectures[name]}. That is not supported; "
                f"of model type {model_type!r} others are."
            )


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    for key, allowed in _UNSUPPORTED.items():
        if key in fields.raw and key not in family.defaults and fields.raw[key] not in allowed:
            raise ConfigError(f"config.json: {key}={fields.raw[key]!r} is not supported; only {allowed[-1]!r} is.")
    if fields.get("hidden_act") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act={fields.get('hidden_act')!r} is not supported; only 'silu' is.")
    scoring = fields.get("scoring_func")
    if family.scoring and scoring not in (None, family.scoring) and _SCORINGS.get(scoring) != family.scoring:
        raise ConfigError(f"config.json: scoring_func={scoring!r} is not supported here; only {family.scoring!r} is.")
    method = fields.get("topk_method")
    if family.topk_methods and method is not None and method not in family.topk_methods:
        supported = " and ".join(sorted(map(repr, family.topk_methods)))
        raise ConfigError(f"config.json: topk_method={method!r} is not supported here; {supported} are.")
    if family.scoring and fields.flag("norm_topk_prob") and not family.normalizes_weights:
        raise ConfigError("config.json: norm_topk_prob=true is not supported for this model type; only false is.")


def _refuse_quantization(*described: Any) -> None:
    for quantization in described:
        if quantization and not isinstance(quantization, Mapping):
            raise TypeError(f"quantization_config is {quantization!r}")
        if quantization and (method := foreign_quantization(quantization)):
            raise ConfigError(f"Weights quantised by {method} are not supported: {ORIGINAL}.")


def _read_layers(fields: Fields, family: Family) -> tuple[LayerConfig, ...]:
    attention, moe = _read_attention(fields, family), read_moe(fields, family)
    rope = read_rope(fields, family, attention)
    if family.paired:
        fields.size("n_routed_experts")  # a layer whose experts are all zero experts is none
        layer = LayerConfig(attention, rope, shortcut="begins")
        return (layer, replace(layer, moe=moe, shortcut="ends")) * fields.size("num_layers")
    num_layers = fields.size("num_hidden_layers")
    sparse = sparse_layers(fields, num_layers) if moe else (False,) * num_layers
    indexer = read_indexer(fields, family, attention, rope) if isinstance(attention, MLAConfig) else None
    hybrid = family.recurrent is not None
    shares = sharing_layers(fields, num_layers, first_is_full=not hybrid) if indexer else (False,) * num_layers
    if hybrid:
        return read_hybrid_layers(fields, family, LayerConfig(attention, rope, moe, indexer=indexer), sparse, shares)
    windows = _sliding_windows(fields, family, num_layers)
    return tuple(
        LayerConfig(attention, rope, moe if has_experts else None, window, indexer, shared)
        for has_experts, window, shared in zip(sparse, windows, shares, strict=True)
    )


def _read_attention(fields: Fields, family: Family) -> MLAConfig | GQAConfig:
    heads = fields.size("num_attention_heads")
    bias = fields.flag("attention_bias")
    if family.attention == "mla":
        if family.query_gate and fields.get("q_lora_rank") is None:
            raise ConfigError("config.json: q_lora_rank is needed: the output's gate is projected from its latent.")
        v_head_dim = _head_share(fields, heads) if fields.get("v_head_dim") is None else fields.size("v_head_dim")
        return MLAConfig(
            kv_lora_rank=fields.size("kv_lora_rank"),
            qk_nope_head_dim=fields.size("qk_nope_head_dim"),
            qk_rope_head_dim=fields.whole(
                "qk_rope_head_dim", fields.get("qk_rope_head_dim"), least=1 if family.rotates else 0
            ),
            v_head_dim=v_head_dim,
            q_lora_rank=None if fields.get("q_lora_rank") is None else fields.size("q_lora_rank"),
            latent_norm_eps=fields.number(
                "rms_norm_eps" if fields.get("latent_norm_eps") is None else "latent_norm_eps"
            ),
            bias=bias,
            output_gate=_read_output_gate(fields, family),
            q_lora_scale=_read_lora_scale(fields, "q_lora"),
            kv_lora_scale=_read_lora_scale(fields, "kv_lora"),
            sinks=family.sinks,
        )
    kv_heads = heads if fields.get("num_key_value_heads") is None else fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly.")
    return GQAConfig(
        num_kv_heads=kv_heads,
        head_dim=_head_share(fields, heads) if fields.get("head_dim") is None else fields.size("head_dim"),
        qkv_bias=family.qkv_bias if isinstance(family.qkv_bias, bool) else fields.flag(family.qkv_bias),
        output_bias=family.output_bias if isinstance(family.output_bias, bool) else fields.flag(family.output_bias),
        qk_norm=family.qk_norm if isinstance(family.qk_norm, bool) else fields.flag(family.qk_norm),
        qk_norm_per_head=family.qk_norm_per_head,
        scale=fields.number("attention_multiplier") if "attention_multiplier" in family.defaults else None,
    )


def _read_lora_scale(fields: Fields, lora: str) -> float:
    """What makes up for a bottleneck's rank, where the config says that something does."""
    if not fields.flag(f"mla_scale_{lora}"):
        return 1.0
    return math.sqrt(fields.size("hidden_size") / fields.size(f"{lora}_rank"))


def _read_output_gate(fields: Fields, family: Family) -> Literal["head", "element", "with queries"] | None:
    if family.element_gate:
        return "element"
    if not family.output_gate:
        return "with queries" if family.query_gate else None
    key = "gated_attention_proj_granularity_type"
    kinds: Mapping[str, Literal["head", "element"]] = {"head_wise": "head", "element_wise": "element"}
    kind = fields.get(key) or "head_wise"
    if kind not in kinds:
        raise ConfigError(f"config.json: {key}={shown(kind)} is not supported; {' and '.join(kinds)} are.")
    return kinds[kind]


def _head_share(fields: Fields, heads: int) -> int:
    hidden_size = fields.size("hidden_size")
    if heads > hidden_size:
        raise ConfigError(f"config.json: hidden_size={hidden_size} leaves nothing for each of {heads} attention heads.")
    return hidden_size // heads


def _hyper_connections(fields: Fields) -> HyperConnectionConfig | IndependentHyperConnectionConfig | None:
    if fields.get("hc_mult") is None:
        return None
    streams, eps = fields.size("hc_mult"), fields.number("hc_eps")
    if fields.get("hc_magnitude") is not None:
        return IndependentHyperConnectionConfig(streams, eps, fields.number("hc_magnitude"))
    return HyperConnectionConfig(streams, eps, fields.size("hc_sinkhorn_iters"))


def _sliding_windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    if family.attention == "mla":
        if window is not None:
            raise ConfigError(f"config.json: sliding_window={window!r} is not supported with latent attention.")
        return (None,) * num_layers
    kinds = fields.raw.get("layer_types")
    if kinds is not None and not names_layers(kinds, num_layers, ("full_attention", "sliding_attention")):
        raise ConfigError(
            f"config.json: layer_types must name each of {num_layers} layers 'full_attention' or 'sliding_attention'."
        )
    if window is None or not fields.flag("use_sliding_window"):
        return (None,) * num_layers
    window = fields.size("sliding_window")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.count("max_window_layers")
    ranges = {"all": range(num_layers), "from": range(first, num_layers), "even until": range(0, first, 2)}
    sliding = ranges[family.sliding_layers]
    return tuple(window if i in sliding else None for i in range(num_layers))


def _token_ids(
    levels: Sequence[Mapping[str, Any]],
    family: Family,
    generation: Mapping[str, Any],
    *,
    vocab_size: int,
) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a text, and all that end one, in order; a family's defaults only where they can be meant."""
    defaults = {
        key: value
        for key in ("bos_token_id", "eos_token_id")
        if type(value := family.defaults.get(key)) is int and value < vocab_size
    }
    inner, *outer = reversed(levels)
    bos = read_token_id(
        inner.get("bos_token_id", defaults.get("bos_token_id")),
        "config.json: bos_token_id",
        ConfigError,
        vocab_size=vocab_size,
    )
    # Padding is never looked up, so that an id past the embeddings does no harm.
    for level in levels:
        read_token_id(level.get("pad_token_id"), "config.json: pad_token_id", ConfigError)
    ends = (
        ("config.json", inner.get("eos_token_id", defaults.get("eos_token_id"))),
        *(("config.json", level.get("eos_token_id")) for level in outer),
        ("generation_config.json", generation.get("eos_token_id")),
    )
    eos = [read_token_ids(value, f"{file}: eos_token_id", ConfigError, vocab_size=vocab_size) for file, value in ends]
    for key, size in (("bos_token_id", vocab_size), ("pad_token_id", None)):
        read_token_id(generation.get(key), f"generation_config.json: {key}", ConfigError, vocab_size=size)
    return bos, tuple(dict.fromkeys(token for ids in eos for token in ids))
