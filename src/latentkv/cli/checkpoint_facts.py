"""What a checkpoint folder holds, from its config, the headers of its weights and its tokenizer; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentkv.checkpoint.names import layer_of, tensor_kind, text_model_names
from latentkv.checkpoint.tensors import Tensors
from latentkv.errors import CheckpointError
from latentkv.models.config import MLAConfig, ModelConfig
from latentkv.models.loading import match_weights
from latentkv.models.stored_config import DTYPE_NAMES, open_checkpoint, stored_dtype
from latentkv.plan import count_active_parameters, count_mtp_parameters, count_parameters, mha_bytes
from latentkv.state import bytes_per_token, sequence_bytes
from latentkv.text import has_tokenizer, load_tokenizer

_BUFFERS = ("e_score_correction_bias", "expert_bias")
"""Ends of the names of what is stored and is no parameter."""


@dataclass(frozen=True)
class TensorFact:
    """One stored tensor, from its file's header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class KindFact:
    """All tensors of a kind or dtype together."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class TokenizerFact:
    """The tokenizer; `chat_template` is "checkpoint" or "plain", `turn_end_id` what closes a turn in it."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str
    turn_end_id: int | None
    needed_size: int


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint.

    Attributes:
        dtype: that the model runs in where no other is asked for.
        parameters_stored: of the main model; they should be `parameters`, which its config implies.
        recurrent: the first of the recurrent layers, beside those of `attention`: its kind, and its sizes.
        residual_streams: how many, and how they are mixed; None: there is one.
        problem: why it will not load, in the words of what would refuse it; None where the headers say nothing against.
        shortcut_layers: of `moe_layers` those whose experts stand beside a dense block, at the end of a shortcut.
        notes: what of the files is not honoured, or not kept as it is.
    """

    folder: str
    model_type: str
    dtype: str
    problem: str | None
    notes: tuple[str, ...]
    attention: dict[str, Any]
    recurrent: dict[str, Any] | None
    recurrent_layers: int
    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    moe: dict[str, Any] | None
    moe_layers: int
    shortcut_layers: int
    sliding_window_layers: int
    indexer: dict[str, Any] | None
    indexer_layers: int
    selection_sharing_layers: int
    rope: dict[str, Any]
    residual_streams: dict[str, Any] | None
    parameters: int
    active_parameters: int
    parameters_stored: int
    mtp_layers_in_config: int
    mtp_layers_stored: int
    mtp_parameters: int
    by_kind: dict[str, KindFact]
    by_dtype: dict[str, KindFact]
    cache_bytes_per_token: int
    cache_bytes_per_sequence: int
    mha_cache_bytes_per_token: int
    tokenizer: TokenizerFact | None
    tensors: tuple[TensorFact, ...]


def read_facts(folder: Path) -> CheckpointFacts:
    """Look at a checkpoint folder.

    Raises:
        ConfigError: the config cannot be read or is not supported.
        CheckpointError: a file of weights is missing or damaged.
        TokenizerError: the tokenizer cannot be read.
    """
    config, reader = open_checkpoint(folder)
    tensors = tuple(_tensor_facts(reader, config))
    main = [t for t in tensors if t.kind not in ("mtp", "other") and not t.name.endswith(_BUFFERS)]
    indexers = [layer.own_indexer for layer in config.layers if layer.own_indexer is not None]
    recurrent = config.recurrent
    attention = config.cached_attention
    kind = "MLA" if isinstance(attention, MLAConfig) else "GQA"
    return CheckpointFacts(
        folder=str(folder),
        model_type=config.model_type,
        dtype=DTYPE_NAMES[stored_dtype(config)],
        problem=_problem(config, reader),
        notes=reader.notes,
        attention={"kind": kind, **asdict(attention)},
        recurrent={"kind": recurrent.name, **asdict(recurrent)} if recurrent else None,
        recurrent_layers=config.num_recurrent_layers,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context=config.max_positions,
        tied_embeddings=config.tie_word_embeddings,
        moe=asdict(config.moe) if config.moe else None,
        moe_layers=sum(layer.moe is not None for layer in config.layers),
        shortcut_layers=sum(layer.shortcut == "ends" for layer in config.layers),
        sliding_window_layers=sum(layer.sliding_window is not None for layer in config.layers),
        indexer=asdict(indexers[0]) if indexers else None,
        indexer_layers=len(indexers),
        selection_sharing_layers=sum(layer.shares_selection for layer in config.layers),
        rope=asdict(config.rope),
        residual_streams=asdict(config.hyper_connections) if config.hyper_connections else None,
        parameters=count_parameters(config),
        active_parameters=count_active_parameters(config),
        parameters_stored=sum(math.prod(t.shape) for t in main),
        mtp_layers_in_config=config.num_mtp_layers,
        mtp_layers_stored=len({t.name.split(".eh_proj")[0] for t in tensors if ".eh_proj." in t.name}),
        mtp_parameters=count_mtp_parameters(config),
        by_kind=_grouped(tensors, lambda tensor: tensor.kind),
        by_dtype=_grouped(tensors, lambda tensor: tensor.dtype),
        cache_bytes_per_token=bytes_per_token(config.specs("bf16")),
        cache_bytes_per_sequence=sequence_bytes(config.specs("bf16")),
        mha_cache_bytes_per_token=mha_bytes(config),
        tokenizer=_tokenizer_fact(folder),
        tensors=tensors,
    )


def _problem(config: ModelConfig, reader: Tensors) -> str | None:
    """Why weights would not load."""
    try:
        match_weights(config, reader)
    except CheckpointError as error:
        return str(error)
    return None


def _tensor_facts(reader: Tensors, config: ModelConfig) -> Iterable[TensorFact]:
    names = text_model_names(reader.names, nested=reader.nests_text_model, tied=config.tie_word_embeddings)
    published = {name: known_as for known_as, name in names.items()}
    for name in reader.names:
        yield TensorFact(
            name=name,
            kind=_kind(published.get(name), config),
            shape=reader.shape(name),
            dtype=reader.shown_dtype(name),
            bytes=reader.nbytes(name),
        )


def _kind(published: str | None, config: ModelConfig) -> str:
    if published is None or (config.tie_word_embeddings and published.startswith("lm_head")):
        return "other"  # of no use to the text model: vision, or a second copy of the embedding
    layer = layer_of(published)
    if layer is not None and layer >= config.num_layers:
        return "mtp"
    return tensor_kind(published)


def _grouped(tensors: Iterable[TensorFact], key: Callable[[TensorFact], str]) -> dict[str, KindFact]:
    groups: dict[str, list[TensorFact]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return {
        name: KindFact(len(group), sum(math.prod(t.shape) for t in group), sum(t.bytes for t in group))
        for name, group in groups.items()
    }


def _tokenizer_fact(folder: Path) -> TokenizerFact | None:
    if not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    return TokenizerFact(
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tuple(sorted(tokenizer.eos_ids)),
        tokenizer.chat_template_source,
        tokenizer.turn_end_id,
        tokenizer.needed_size,
    )
