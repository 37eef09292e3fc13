"""How many parameters a model has and how many bytes they take, from its config alone.

The tensors listed here are those of `models.Decoder` (tests hold the two together); nothing is built to count them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from latentkv.checkpoint.quantization import quantization_method
from latentkv.checkpoint.shard import entry_bytes
from latentkv.checkpoint.wrapper import outermost
from latentkv.errors import ConfigError
from latentkv.models.config import (
    GQAConfig,
    IndependentHyperConnectionConfig,
    IndexerConfig,
    KDAConfig,
    LayerConfig,
    LightningConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
)
from latentkv.models.stored_config import stored_dtype
from latentkv.ops.kda import TAPS
from latentkv.weights.files import awq, gptq, modelopt
from latentkv.weights.files.compressed_config import METHOD, PackedSchemes
from latentkv.weights.files.compressed_tensors import packed_layout
from latentkv.weights.files.deepseek_fp8 import read_float8_scheme
from latentkv.weights.files.four_bit_floats import NVFP4_GROUP
from latentkv.weights.formats import FP4, FP8, INT4, INT8, ROUNDED_TO, CodeFormat
from latentkv.weights.policy import choose_scheme

Kind = Literal[
    "embedding",
    "attention",
    "dense mlp",
    "shared experts",
    "routed experts",
    "router",
    "norm",
    "hyper-connections",
    "lm head",
    "mtp",
]
_FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WEIGHT_DTYPES = (*_FLOAT_BYTES, FP8.name, FP4.name, *ROUNDED_TO)
_ALL = 2**62  # outputs or inputs: more than there are
_TORCH_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class TensorGroup:
    """`count` tensors of one shape, of which each token uses `used`, on average.

    `linear` marks the weights that an fp8 checkpoint quantises; `buffer` those that are not trained by gradient;
    `exact` those that are float32 whatever the rest is.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    count: int = 1
    used: float = 1
    linear: bool = False
    buffer: bool = False
    exact: bool = False

    @property
    def published(self) -> str:
        """What one of them is called in a checkpoint, the number of its layer left at 0."""
        name = self.name if self.name == "lm_head" else f"model.layers.0.{self.name}"
        return name if ".experts." in name else f"{name}.weight"

    @property
    def numel(self) -> int:
        """Elements of one of the tensors."""
        return math.prod(self.shape)


def tensor_groups(config: ModelConfig, *, mtp: bool = False) -> Iterator[TensorGroup]:
    """Every tensor of the model, with those of its multi-token-prediction layers if `mtp`."""
    hidden = config.hidden_size
    # A token reads one row of the embedding, but all of it where it is the output head too.
    rows_used = config.vocab_size if config.tie_word_embeddings else 1
    yield TensorGroup("embedding", "embed_tokens", (hidden,), config.vocab_size, rows_used)
    for layer in config.layers:
        yield from _layer(config, layer)
    yield TensorGroup("norm", "norm", (hidden,))
    if isinstance(config.hyper_connections, IndependentHyperConnectionConfig):
        yield from _hyper_connection(config, "hc_head", rows=1, scales=1)
    if not config.tie_word_embeddings:
        yield TensorGroup("lm head", "lm_head", (config.vocab_size, hidden), exact=config.exact_head)
    for _ in range(config.num_mtp_layers if mtp else 0):
        yield from _mtp_layer(config)


def count_parameters(config: ModelConfig) -> int:
    """All parameters of the main model (without multi-token prediction)."""
    return sum(g.count * g.numel for g in tensor_groups(config) if not g.buffer)


def count_active_parameters(config: ModelConfig) -> int:
    """Parameters that take part for one token: of the routed experts those chosen, of the embedding its row.

    Where zero experts are among the choices, that is an average, all experts being chosen equally often: with 256 of
    them beside 512, 8 of 12 choices compute (LongCat-Flash, arXiv 2509.01322, section 2.1, whose router is held to it).
    """
    return round(sum(g.used * g.numel for g in tensor_groups(config) if not g.buffer))


def count_mtp_parameters(config: ModelConfig) -> int:
    """Parameters of the multi-token-prediction layers (embedding and head are the main model's)."""
    return sum(g.count * g.numel for g in tensor_groups(config, mtp=True) if g.kind == "mtp" and not g.buffer)


def checkpoint_dtype(config: ModelConfig) -> str:
    """How the checkpoint's config says that most weights are stored: fp8, int8 or int4, else its torch dtype."""
    if schemes := _packed_schemes(config, ()):
        return schemes.asked.format.name
    quantization = _quantization(config)
    method = quantization_method(quantization)
    if method in (gptq.METHOD, awq.METHOD):
        return (INT8 if quantization.get("bits") == 8 else INT4).name
    if method == modelopt.METHOD and "FP4" in (modelopt.algorithm_of(quantization) or ""):
        return FP4.name
    return FP8.name if _fp8_block(config) else _TORCH_NAMES[stored_dtype(config)]


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the main model's weights.

    Args:
        config: the model.
        dtype: fp32, bf16 or fp16; fp8: linear layers as e4m3 with one float32 scale a block (128 x 128 unless the
            checkpoint says otherwise) and everything else bf16, as DeepSeek-V3 is published (arXiv 2412.19437, 3.3);
            fp4: linear layers as E2M1 with a scale of one byte for 16 weights (32 where the checkpoint says so);
            int8 or int4: what `latentkv quantize` stores, in groups of the checkpoint's size if it is of this format.

    Raises:
        ConfigError: if `dtype` is none of these.
    """
    _require_dtype(dtype)
    groups = list(tensor_groups(config))
    stored = _packed_schemes(config, groups) if dtype in ROUNDED_TO else None
    return sum(group.count * _tensor_bytes(group, dtype, config, stored) for group in groups)


def layer_weight_bytes(config: ModelConfig, dtype: str) -> tuple[tuple[int, ...], int]:
    """Bytes of each layer's weights, and of what belongs to no layer, modules of multi-token prediction among it.

    Args:
        config: the model.
        dtype: as in `weight_bytes`.

    Raises:
        ConfigError: if `dtype` is unknown.
    """
    _require_dtype(dtype)
    every = list(tensor_groups(config, mtp=True))
    stored = _packed_schemes(config, every) if dtype in ROUNDED_TO else None

    def total(groups: Iterable[TensorGroup]) -> int:
        return sum(group.count * _tensor_bytes(group, dtype, config, stored) for group in groups)

    layers = tuple(total(_layer(config, layer)) for layer in config.layers)
    return layers, total(every) - sum(layers)


def layer_groups(config: ModelConfig, layer: int | None) -> list[TensorGroup]:
    """The tensors of one layer; None: those of the main model that belong to no layer."""
    if layer is not None:
        return list(_layer(config, config.layers[layer]))
    return list(tensor_groups(replace(config, layers=())))


def group_bytes(config: ModelConfig, group: TensorGroup, dtype: str) -> int:
    """Bytes of one of the tensors of a group, as in `weight_bytes`."""
    return _tensor_bytes(group, dtype, config, _packed_schemes(config, [group]) if dtype in ROUNDED_TO else None)


def layer_reads(config: ModelConfig, dtype: str, rows: int) -> tuple[tuple[float, ...], float]:
    """Bytes of each layer's weights that `rows` tokens read, about, and of those that belong to no layer.

    Of experts those that one of the tokens at least has chosen, all being chosen equally often.

    Raises:
        ConfigError: if `dtype` is unknown.
    """
    _require_dtype(dtype)
    layers = tuple(reads_of(config, layer_groups(config, layer), dtype, rows) for layer in range(config.num_layers))
    return layers, reads_of(config, layer_groups(config, None), dtype, rows)


def reads_of(config: ModelConfig, groups: Iterable[TensorGroup], dtype: str, rows: int) -> float:
    """Bytes that `rows` tokens read of some tensors, as `layer_reads` counts them."""
    chosen = {group: 1 - (1 - group.used / group.count) ** rows for group in groups}
    return sum(part * group.count * group_bytes(config, group, dtype) for group, part in chosen.items())


def _require_dtype(dtype: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"{dtype!r} is not a dtype for weights; choose from {', '.join(WEIGHT_DTYPES)}.")


def _tensor_bytes(group: TensorGroup, dtype: str, config: ModelConfig, stored: PackedSchemes | None) -> int:
    # An output head is quantised like any other.
    if group.buffer or (group.exact and (group.kind != "lm head" or dtype not in ROUNDED_TO)):
        return 4 * group.numel
    if dtype in _FLOAT_BYTES:
        return _FLOAT_BYTES[dtype] * group.numel
    if dtype == FP8.name:
        return _fp8_bytes(group, config)
    if dtype == FP4.name:
        return _fp4_bytes(group, config)
    return _packed_bytes(group, ROUNDED_TO[dtype], stored)


def _fp8_bytes(group: TensorGroup, config: ModelConfig) -> int:
    if not group.linear:
        return 2 * group.numel
    rows, columns = group.shape
    block = _fp8_block(config) or (128, 128)
    return group.numel + 4 * math.ceil(rows / block[0]) * math.ceil(columns / block[1])


def _fp4_bytes(group: TensorGroup, config: ModelConfig) -> int:
    schemes = _packed_schemes(config, [group])
    if not group.linear or (schemes and schemes.ignores(_module(group))):
        return 2 * group.numel
    shared = (schemes.asked.group if schemes else None) or NVFP4_GROUP
    rows, columns = group.shape
    return group.numel // 2 + rows * math.ceil(columns / shared)


def _packed_bytes(group: TensorGroup, fmt: CodeFormat, stored: PackedSchemes | None) -> int:
    if stored is not None and stored.asked.format != fmt:
        stored = None  # the checkpoint is of another format than the one that is asked about
    scheme = choose_scheme(group.published, group.shape, fmt, stored.asked.group if stored else None)
    if scheme is None or (stored is not None and stored.ignores(_module(group))):
        return 2 * group.numel
    rows, columns = group.shape
    return sum(entry_bytes(entry) for entry in packed_layout((rows, columns), scheme).values())


def _quantization(config: ModelConfig) -> Mapping[str, Any]:
    return outermost(config.source, "quantization_config") or {}


def _fp8_block(config: ModelConfig) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if weights are not fp8."""
    quantization = _quantization(config)
    method = quantization_method(quantization)
    if schemes := _packed_schemes(config, ()):
        asked = schemes.asked
        return (asked.rows or _ALL, asked.group or _ALL) if asked.format is FP8 else None
    if not quantization or method in (gptq.METHOD, awq.METHOD):
        return None
    if method == modelopt.METHOD:
        return 1, _ALL
    return read_float8_scheme(quantization).block_size or (128, 128)


def _packed_schemes(config: ModelConfig, groups: Iterable[TensorGroup]) -> PackedSchemes | None:
    """How weights are packed as integers; None if they are not."""
    quantization = _quantization(config)
    return PackedSchemes(quantization, map(_module, groups)) if quantization.get("quant_method") == METHOD else None


def _module(group: TensorGroup) -> str:
    return group.published.removesuffix(".weight")


def _layer(config: ModelConfig, layer: LayerConfig) -> Iterator[TensorGroup]:
    attention = layer.attention
    if isinstance(attention, MLAConfig):
        yield from _mla(config, attention)
    elif isinstance(attention, KDAConfig):
        yield from _kda(config, attention)
    elif isinstance(attention, LightningConfig):
        yield from _lightning(config, attention)
    else:
        yield from _gqa(config, attention)
    if layer.own_indexer is not None and isinstance(attention, MLAConfig):
        yield from _indexer(config, attention, layer.own_indexer)
    if (streams := config.hyper_connections) is not None:
        independent = isinstance(streams, IndependentHyperConnectionConfig)
        rows, scales = (2, 2) if independent else (2 + streams.num_streams, 3)
        for block in ("attn", "ffn"):
            yield from _hyper_connection(config, f"hc_{block}", rows=rows, scales=scales)
    yield from _norm(config, "input_layernorm", gated=True)
    yield from _norm(config, "post_attention_layernorm", gated=not layer.is_dense)
    if layer.is_dense:
        yield from _mlp("dense mlp", "mlp", config, config.intermediate_size)
    if layer.moe is not None:
        yield from _moe(config, layer.moe)


def _linear(kind: Kind, name: str, out_features: int, in_features: int, bias: bool = False) -> Iterator[TensorGroup]:
    yield TensorGroup(kind, name, (out_features, in_features), linear=True)
    if bias:
        yield TensorGroup(kind, f"{name}.bias", (out_features,))


def _mla(config: ModelConfig, mla: MLAConfig) -> Iterator[TensorGroup]:
    hidden, heads, rank = config.hidden_size, config.num_heads, mla.kv_lora_rank
    query_dim, gated = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim), mla.output_gate == "with queries"
    if mla.q_lora_rank is None:
        yield from _linear("attention", "self_attn.q_proj", query_dim, hidden)
    else:
        yield from _linear("attention", "self_attn.q_a_proj", mla.q_lora_rank, hidden, mla.bias)
        yield TensorGroup("norm", "self_attn.q_a_layernorm", (mla.q_lora_rank,))
        q_b = (query_dim + heads * mla.v_head_dim, 2 * mla.q_lora_rank) if gated else (query_dim, mla.q_lora_rank)
        yield from _linear("attention", "self_attn.q_b_proj", *q_b)
    yield from _linear("attention", "self_attn.kv_a_proj_with_mqa", rank + mla.qk_rope_head_dim, hidden, mla.bias)
    yield TensorGroup("norm", "self_attn.kv_a_layernorm", (rank,))
    yield from _linear("attention", "self_attn.kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), rank)
    if mla.output_gate in ("head", "element"):
        gates = heads if mla.output_gate == "head" else heads * mla.v_head_dim
        yield from _linear("attention", "self_attn.g_proj", gates, hidden)
    yield from _linear("attention", "self_attn.o_proj", hidden, heads * mla.v_head_dim, mla.bias)
    if mla.sinks:
        yield TensorGroup("attention", "self_attn.sinks", (heads,), exact=True)


def _hyper_connection(config: ModelConfig, name: str, *, rows: int, scales: int) -> Iterator[TensorGroup]:
    """Of so many rows for each stream."""
    n = config.hyper_connections.num_streams if config.hyper_connections else 0
    for part, shape in (("fn", (rows * n, n * config.hidden_size)), ("base", (rows * n,)), ("scale", (scales,))):
        yield TensorGroup("hyper-connections", f"{name}_{part}", shape, exact=True)


def _norm(config: ModelConfig, name: str, *, gated: bool) -> Iterator[TensorGroup]:
    hidden, rank = config.hidden_size, config.gated_norm_rank
    if not gated or not rank:
        yield TensorGroup("norm", name, (hidden,))
        return
    yield TensorGroup("norm", f"{name}.norm", (hidden,))
    yield TensorGroup("norm", f"{name}.W_down", (rank, hidden))
    yield TensorGroup("norm", f"{name}.W_up", (hidden, rank))


def _kda(config: ModelConfig, kda: KDAConfig) -> Iterator[TensorGroup]:
    hidden, width = config.hidden_size, kda.num_heads * kda.head_dim
    for name in ("q", "k", "v"):
        yield from _linear("attention", f"self_attn.{name}_proj", width, hidden)
        yield TensorGroup("attention", f"self_attn.{name}_conv1d", (width, 1, TAPS), exact=True)
    for name in ("f", "g"):
        if kda.low_rank_gates:
            yield from _linear("attention", f"self_attn.{name}_a_proj", kda.head_dim, hidden)
            yield from _linear("attention", f"self_attn.{name}_b_proj", width, kda.head_dim)
        else:
            yield from _linear("attention", f"self_attn.{name}_proj", width, hidden)
    yield from _linear("attention", "self_attn.b_proj", kda.num_heads, hidden)
    yield TensorGroup("attention", "self_attn.A_log", (kda.num_heads,), exact=True)
    yield TensorGroup("attention", "self_attn.dt_bias", (width,), exact=True)
    yield TensorGroup("norm", "self_attn.o_norm", (kda.head_dim,))
    yield from _linear("attention", "self_attn.o_proj", hidden, width)


def _lightning(config: ModelConfig, lightning: LightningConfig) -> Iterator[TensorGroup]:
    hidden, width = config.hidden_size, lightning.num_heads * lightning.head_dim
    yield from _linear("attention", "self_attn.query_key_value", 3 * width, hidden)
    yield TensorGroup("norm", "self_attn.query_layernorm", (lightning.head_dim,))
    yield TensorGroup("norm", "self_attn.key_layernorm", (lightning.head_dim,))
    yield from _linear("attention", "self_attn.g_proj", width, hidden)
    yield TensorGroup("norm", "self_attn.g_norm", (width,))
    yield from _linear("attention", "self_attn.o_proj", hidden, width)


def _indexer(config: ModelConfig, mla: MLAConfig, indexer: IndexerConfig) -> Iterator[TensorGroup]:
    queries = indexer.num_heads * indexer.head_dim
    yield from _linear("attention", "self_attn.indexer.wq_b", queries, mla.q_lora_rank or 0)
    yield from _linear("attention", "self_attn.indexer.wk", indexer.head_dim, config.hidden_size)
    for name in ("k_norm", "k_norm.bias"):
        yield TensorGroup("norm", f"self_attn.indexer.{name}", (indexer.head_dim,), exact=indexer.exact_norm)
    yield TensorGroup("attention", "self_attn.indexer.weights_proj", (indexer.num_heads, config.hidden_size))
    if indexer.pool is not None:
        gate = "self_attn.indexer.index_kpool_compress_gate"
        yield TensorGroup("attention", gate, (indexer.head_dim, config.hidden_size))
        ape = "self_attn.indexer.index_kpool_compress_ape"
        yield TensorGroup("attention", ape, (indexer.pool, indexer.head_dim), exact=True)


def _gqa(config: ModelConfig, gqa: GQAConfig) -> Iterator[TensorGroup]:
    hidden, query_dim, kv_dim = config.hidden_size, config.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim
    yield from _linear("attention", "self_attn.q_proj", query_dim, hidden, gqa.qkv_bias)
    yield from _linear("attention", "self_attn.k_proj", kv_dim, hidden, gqa.qkv_bias)
    yield from _linear("attention", "self_attn.v_proj", kv_dim, hidden, gqa.qkv_bias)
    yield from _linear("attention", "self_attn.o_proj", hidden, query_dim, gqa.output_bias)
    if gqa.qk_norm:
        yield TensorGroup("norm", "self_attn.q_norm", (gqa.head_dim if gqa.qk_norm_per_head else query_dim,))
        yield TensorGroup("norm", "self_attn.k_norm", (gqa.head_dim if gqa.qk_norm_per_head else kv_dim,))


def _mlp(kind: Kind, name: str, config: ModelConfig, intermediate: int) -> Iterator[TensorGroup]:
    yield from _linear(kind, f"{name}.gate_proj", intermediate, config.hidden_size, config.mlp_bias)
    yield from _linear(kind, f"{name}.up_proj", intermediate, config.hidden_size, config.mlp_bias)
    yield from _linear(kind, f"{name}.down_proj", config.hidden_size, intermediate, config.mlp_bias)


def _moe(config: ModelConfig, moe: MoEConfig) -> Iterator[TensorGroup]:
    hidden, experts, used, width = config.hidden_size, moe.num_experts, moe.computed_per_token, moe.intermediate_size
    yield TensorGroup("router", "mlp.gate", (moe.num_choices, hidden), exact=moe.exact_router)
    if moe.correction_bias:
        yield TensorGroup("router", "mlp.gate.e_score_correction_bias", (moe.num_choices,), buffer=True)
    yield TensorGroup("routed experts", "mlp.experts.gate_up_proj", (width, hidden), 2 * experts, 2 * used, linear=True)
    yield TensorGroup("routed experts", "mlp.experts.down_proj", (hidden, width), experts, used, linear=True)
    if moe.num_shared_experts:
        yield from _mlp("shared experts", "mlp.shared_experts", config, moe.num_shared_experts * width)
    if moe.gated_shared_size:
        yield from _mlp("shared experts", "mlp.shared_expert", config, moe.gated_shared_size)
        yield TensorGroup("router", "mlp.shared_expert_gate", (1, hidden))
    if moe.post_norm:
        yield TensorGroup("norm", "mlp.post_mlp_layernorm", (hidden,))


def _mtp_layer(config: ModelConfig) -> Iterator[TensorGroup]:
    hidden = config.hidden_size
    for name in ("enorm", "hnorm", "norm"):
        yield TensorGroup("mtp", name, (hidden,))
    yield TensorGroup("mtp", "eh_proj", (hidden, 2 * hidden))
    for group in _layer(config, config.mtp_layer):
        yield replace(group, kind="mtp")
