"""A checkpoint folder <-> a `Decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentkv.checkpoint.cuts import Cut
from latentkv.checkpoint.filling import Match, match_parameters
from latentkv.checkpoint.names import export_names, inside_wrapper, published_name
from latentkv.checkpoint.tensors import Tensors
from latentkv.checkpoint.unfused import stacked
from latentkv.checkpoint.wrapper import text_config
from latentkv.checkpoint.writer import write_checkpoint
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.config import ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.families import FAMILIES
from latentkv.models.packing import Packer, PackerOf, Packing, pack_module, takes_packed
from latentkv.models.stage import Stage
from latentkv.models.stored_config import DTYPE_NAMES, open_checkpoint, stacked_projections, stored_dtype
from latentkv.weights import QuantizedWeight, quantize_weight
from latentkv.weights.policy import choose_scheme

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXACT = (
    *("e_score_correction_bias", "expert_bias", "router.classifier.weight", "index_kpool_compress_ape"),
    *("A_log", "dt_bias", "_conv1d.weight"),
    *(f".hc{block}_{part}" for block in ("", "_head", "_attn", "_ffn") for part in ("fn", "base", "scale")),
)
"""Ends of the names of what is stored in float32, whatever the rest is stored in."""


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_context: int | None = None,
    packing: Packing | None = None,
    stage: Stage | None = None,
    lora: Path | None = None,
) -> Decoder:
    """Build the decoder of a checkpoint and fill it layer by layer.

    Quantised weights stay so if they are packed; otherwise they are dequantised to `dtype`.

    Args:
        folder: with config.json and safetensors.
        dtype: of the weights that are not packed and of the hidden states; None: the config's own, or where it
            names none that of the files.
        device: where the weights go.
        max_context: longest sequence it will see; None: the longest that it was made for.
        packing: pack each layer once it is read, so that memory never holds more than one layer unpacked; None: leave
            all as parameters.
        stage: the layers to load; nothing of the others is read. None: all.
        lora: folder of an adapter that is merged into the weights as they are read.

    Returns:
        The decoder in eval mode. MTP modules that the config counts but the files lack are left out.

    Raises:
        ConfigError: the config cannot be read or is not supported.
        CheckpointError: weights are missing, unexpected, damaged or misshapen.
    """
    config, reader = open_checkpoint(Path(folder), lora)
    decoder, match = match_decoder(config, reader, dtype=dtype, max_context=max_context, stage=stage)
    for name, part in decoder.parts():
        load_part(name, part, match, torch.device(device), packing)
    if packing is not None:
        pack_tied_head(decoder, match, packing)
    return decoder.eval()


def match_decoder(
    config: ModelConfig,
    reader: Tensors,
    *,
    dtype: torch.dtype | None,
    max_context: int | None,
    stage: Stage | None = None,
) -> tuple[Decoder, Match]:
    """The decoder of a checkpoint without storage, of what its files hold, and where each of its tensors lies there.

    With a stage the decoder is left with that; the files are held to the whole model all the same.

    Raises:
        CheckpointError: as `load_model`, but for damage that only the weights themselves show.
    """
    _require_tensors(config, reader)
    decoder = empty_decoder(config, dtype=dtype, max_context=max_context)
    match = _match(decoder, reader)
    decoder.drop_mtp_modules(keep=match.mtp_modules)
    if stage is not None:
        decoder.keep_stage(stage)
        if not stage.shard.is_whole:
            match = _cut_match(decoder, match)
    return decoder, match


def _cut_match(decoder: Decoder, match: Match) -> Match:
    """Where a shard's parts of tensors lie."""
    config, shard, names = decoder.config, decoder.stage.shard, list(decoder.state_dict())
    cuts = {name: cut for name in names if (cut := shard.cut(config, name)) is not None}
    if decoder.stage.is_first:
        rows = shard.head_rows(config.vocab_size)
        cuts[_HEAD] = Cut(-2, rows.start, rows.stop, config.vocab_size)
    return match.cut(cuts, zeros=filter(shard.lacks, names))


def empty_decoder(config: ModelConfig, *, dtype: torch.dtype | None, max_context: int | None) -> Decoder:
    """A decoder without storage, of the dtypes that it is loaded in."""
    with torch.device("meta"):
        decoder = Decoder(config, max_context=max_context)
    decoder = decoder.to(dtype or stored_dtype(config))
    decoder.keep_choices_exact()
    return decoder


def load_part(
    name: str,
    part: nn.Module,
    match: Match,
    device: torch.device,
    packing: Packing | None,
    packer_of: PackerOf = Packer,
) -> None:
    """Fill one of a decoder's parts, and pack it.

    Args:
        name: the part's, in the decoder.
        part: without storage.
        match: where its tensors lie.
        device: where they go.
        packing: how to pack them; None: not at all.
        packer_of: what packs each of its modules.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    state = {f"{name}.{leaf}": tensor for leaf, tensor in part.state_dict().items()}
    packed = takes_packed(part)
    taken = {f"{name}.{leaf}": state[f"{name}.{leaf}"] for leaf in part.state_dict() if packed(leaf)}
    quantized = {} if packing is None else match.quantized(taken)
    if packing is not None and packing.format is not None:
        quantized |= _rounded(match, {leaf: t for leaf, t in taken.items() if leaf not in quantized}, packing)
    # Not by `to_empty`, for which torch's compiler would be loaded.
    storage = {leaf: torch.empty(t.shape, dtype=t.dtype, device=device) for leaf, t in part.state_dict().items()}
    part.load_state_dict(storage, assign=True)
    match.fill({f"{name}.{leaf}": t for leaf, t in part.state_dict().items() if f"{name}.{leaf}" not in quantized})
    if packing is not None:
        pack_module(part, packing, prefix=name, quantized=quantized, packer_of=packer_of)


def _rounded(match: Match, state: Mapping[str, Tensor], packing: Packing) -> dict[str, QuantizedWeight]:
    """Those of some of a shard's tensors that are to be quantised; a row is, before it is cut, and is so everywhere."""
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in state.items():
        cut = match.cuts.get(name)
        if cut is None or packing.format is None:
            continue
        scheme = choose_scheme(
            published_name(name, num_layers=0), cut.whole(tensor.shape), packing.format, packing.group
        )
        if scheme is not None:
            quantize = partial(quantize_weight, fmt=scheme.format, group=scheme.group)
            if (weight := match.rounded(name, tensor, quantize)) is not None:
                found[name] = weight
    return found


def pack_tied_head(decoder: Decoder, match: Match, packing: Packing, packer_of: PackerOf = Packer) -> None:
    """Pack what belongs to no part of a decoder: an output head that is tied to the embedding, which is filled."""
    tied = decoder.is_tied and decoder.stage.is_first
    embedding = {_EMBEDDING: decoder.get_parameter(_EMBEDDING)} if tied else {}
    decoder.pack(packer_of(packing, decoder, "", match.quantized(embedding)))


def match_weights(config: ModelConfig, reader: Tensors) -> None:
    """Find every weight of a model in its checkpoint, from the headers alone.

    Raises:
        CheckpointError: as `load_model`, but for damage that only the weights themselves show.
    """
    _require_tensors(config, reader)
    with torch.device("meta"):
        _match(Decoder(config), reader)


def _require_tensors(config: ModelConfig, reader: Tensors) -> None:
    """Refuse a config that counts more than its files hold, before anything of that size is made."""
    if config.num_layers > len(reader.names):
        raise CheckpointError(
            f"{reader.folder} holds {len(reader.names)} tensors, and its config.json counts {config.num_layers:,} "
            "layers: the download is incomplete, or config.json belongs to another checkpoint"
        )


def _match(decoder: Decoder, reader: Tensors) -> Match:
    config = decoder.config
    return match_parameters(
        decoder.state_dict(),
        reader,
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        zero_if_absent=("e_score_correction_bias",) if FAMILIES[config.model_type].correction_bias_optional else (),
    )


def save_pretrained(decoder: Decoder, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint that transformers loads: config.json and safetensors with one tensor an expert.

    Args:
        decoder: its `config.source` becomes config.json.
        folder: made if it is missing.
        dtype: of the stored weights; None: as they are. Correction biases and what recurrences forget by stay float32.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before stays whole.
    """
    dtype = dtype or decoder.dtype
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"{dtype} is no dtype for a checkpoint; choose one of {', '.join(DTYPE_NAMES.values())}.")
    # Of a vision wrapper the text model alone is here, so its own config is what describes the files.
    config: dict[str, Any] = dict(text_config(decoder.config.source))
    family, stops = FAMILIES[decoder.config.model_type], list(decoder.config.eos_token_ids)
    config["model_type"] = family.saved_as or decoder.config.model_type
    config["dtype"] = DTYPE_NAMES[dtype]
    config["tie_word_embeddings"] = decoder.config.tie_word_embeddings
    # Stop ids that only generation_config.json named are kept too.
    config["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    experts = [layer.moe for layer in decoder.config.layers if layer.moe is not None]
    tensors = export_names(
        decoder.state_dict(),
        num_layers=decoder.config.num_layers,
        experts=family.expert_names,
        style=family.name_style,
        num_zero_experts=max((moe.num_zero_experts for moe in experts), default=0),
        empty_shared=bool(family.defaults.get("n_shared_experts"))
        and not any(moe.num_shared_experts for moe in experts),
    )
    tensors = stacked(tensors, stacked_projections(decoder.config))
    exact = (*_EXACT, ".learnable_sink_param")
    if decoder.config.exact_head:
        exact = (*exact, "lm_head.weight")
    if any(layer.indexer and layer.indexer.exact_norm for layer in decoder.config.layers):
        exact = (*exact, ".indexer.k_norm.weight", ".indexer.k_norm.bias")
    cast = ((name, t if name.endswith(exact) else t.to(dtype)) for name, t in tensors)
    if family.wrapper is not None:
        shared = {key: config[key] for key in ("dtype", "tie_word_embeddings")}
        config = {"model_type": family.wrapper, **shared, "text_config": config}
        cast = ((inside_wrapper(name), t) for name, t in cast)
    write_checkpoint(folder, cast, config)
