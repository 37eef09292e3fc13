"""The config of a checkpoint folder, with what its config.json leaves to the files settled by them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentkv.checkpoint.adapter import Adapter
from latentkv.checkpoint.merged import MergedTensors
from latentkv.checkpoint.names import text_model_names
from latentkv.checkpoint.tensors import Tensors, open_tensors
from latentkv.checkpoint.unfused import Stack, UnfusedTensors
from latentkv.checkpoint.wrapper import config_levels
from latentkv.errors import ConfigError
from latentkv.models.config import GQAConfig, ModelConfig
from latentkv.models.config_reader import TIED, read_config, stated_tying
from latentkv.models.families import FAMILIES

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}
"""What a config.json calls the dtypes that models run in."""

_OTHER_NAMES = {"float": "float32", "half": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_AS_STORED = (None, "", "auto")


def open_checkpoint(folder: Path, lora: Path | None = None) -> tuple[ModelConfig, Tensors]:
    """Read a checkpoint's config and the headers of its files.

    Where config.json does not say whether the output head is the embedding, it is if the files hold one of the two, and
    not if they differ. Where it names no dtype, or "auto", it is that of most of the weights.

    Args:
        folder: with config.json and safetensors.
        lora: folder of an adapter that is merged into the weights as they are read.

    Raises:
        ConfigError: the config cannot be read or is not supported.
        CheckpointError: the files are damaged, or of a kind that is not read; or the adapter cannot be merged.
    """
    config, reader = read_config(folder), open_tensors(folder)
    if stack := stacked_projections(config):
        reader = UnfusedTensors(reader, stack)
    config = settle_by_files(config, reader)
    if lora is not None:
        reader = MergedTensors(reader, Adapter(lora), tied=config.tie_word_embeddings)
    return config, reader


def stacked_projections(config: ModelConfig) -> Stack:
    """What files of a model of this family may have stacked in one tensor."""
    if not FAMILIES[config.model_type].stacked or not isinstance(attention := config.attention, GQAConfig):
        return {}
    query, key = (count * attention.head_dim for count in (config.num_heads, attention.num_kv_heads))
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
        "mlp.gate_up_proj": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size),
    }


def settle_by_files(config: ModelConfig, reader: Tensors) -> ModelConfig:
    """A config with what it leaves open taken from a checkpoint's files."""
    settled: dict[str, Any] = {}
    if stated_tying(config.source) is None:
        tied = _is_tied(reader, config.tie_word_embeddings)
        config, settled[TIED] = replace(config, tie_word_embeddings=tied), tied
    if _named_dtype(config.source) is None and (stored := _commonest_dtype(reader)) is not None:
        settled["dtype"] = DTYPE_NAMES[stored]
    return replace(config, source={**config.source, **settled})


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that a config names, float32 if none.

    Raises:
        ConfigError: models do not run in it.
    """
    named = _named_dtype(config.source)
    if named is None:
        return torch.float32
    plain = str(named).removeprefix("torch.")
    plain = _OTHER_NAMES.get(plain, plain)
    if plain not in _DTYPES:
        raise ConfigError(
            f"config.json: dtype {named!r} is not supported; supported: {', '.join(_DTYPES)}. Or say which: --dtype "
            'bf16, LLM(dtype="bf16").'
        )
    return _DTYPES[plain]


def _named_dtype(source: Mapping[str, Any]) -> Any:
    levels = reversed(config_levels(source))
    named = (level.get(key) for level in levels for key in ("dtype", "torch_dtype"))
    return next((name for name in named if name not in _AS_STORED), None)


def _is_tied(reader: Tensors, otherwise: bool) -> bool:
    found = text_model_names(reader.names, nested=reader.nests_text_model)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return otherwise if head is embedding else True
    if reader.shape(head) != reader.shape(embedding) or reader.dtype(head) != reader.dtype(embedding):
        return False
    return otherwise and torch.equal(reader.read(head), reader.read(embedding))


def _commonest_dtype(reader: Tensors) -> torch.dtype | None:
    """Of the text model's weights by their number, as one that models run in: float64 is read as float32, what is
    quantised as bfloat16."""
    elements: Counter[torch.dtype] = Counter()
    for name in text_model_names(reader.names, nested=reader.nests_text_model).values():
        if reader.why_unreadable(name) is None:
            stored = reader.dtype(name)
            run_in = torch.float32 if stored == torch.float64 else stored
            elements[run_in if run_in in DTYPE_NAMES else torch.bfloat16] += math.prod(reader.shape(name))
    return elements.most_common(1)[0][0] if elements else None
