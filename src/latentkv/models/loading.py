"""A checkpoint folder <-> a `Decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentkv.checkpoint.filling import Match, match_parameters
from latentkv.checkpoint.names import export_names
from latentkv.checkpoint.reader import CheckpointReader
from latentkv.checkpoint.writer import write_checkpoint
from latentkv.errors import ConfigError
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.families import FAMILIES
from latentkv.models.packing import Packer, Packing, pack_module

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_context: int | None = None,
    packing: Packing | None = None,
) -> Decoder:
    """Build the decoder of a checkpoint and fill it layer by layer.

    Quantised weights stay so if they are packed; otherwise they are dequantised to `dtype`.

    Args:
        folder: with config.json and safetensors.
        dtype: of the weights that are not packed and of the hidden states; None: the config's own (float32 if it names
            none).
        device: where the weights go.
        max_context: longest sequence it will see; None: the config's `max_position_embeddings`.
        packing: pack each layer once it is read, so that memory never holds more than one layer unpacked; None: leave
            all as parameters.

    Returns:
        The decoder in eval mode. MTP modules that the config counts but the files lack are left out.

    Raises:
        ConfigError: the config cannot be read or is not supported.
        CheckpointError: weights are missing, unexpected, damaged or misshapen.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config, max_context=max_context)
    decoder = decoder.to(dtype or stored_dtype(config))
    decoder.keep_routing_bias_exact()
    match = match_parameters(
        decoder.state_dict(),
        CheckpointReader(folder),
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        zero_if_absent=("e_score_correction_bias",) if FAMILIES[config.model_type].correction_bias_optional else (),
    )
    decoder.drop_mtp_modules(keep=match.mtp_modules)
    for name, part in decoder.parts():
        _load_part(name, part, match, torch.device(device), packing)
    if packing is not None:
        decoder.pack(Packer(packing, decoder, ""))
    return decoder.eval()


def _load_part(name: str, part: nn.Module, match: Match, device: torch.device, packing: Packing | None) -> None:
    state = {f"{name}.{leaf}": tensor for leaf, tensor in part.state_dict().items()}
    quantized = {} if packing is None else match.quantized(state)
    part.to_empty(device=device)
    match.fill({f"{name}.{leaf}": t for leaf, t in part.state_dict().items() if f"{name}.{leaf}" not in quantized})
    if packing is not None:
        pack_module(part, packing, prefix=name, quantized=quantized)


def save_pretrained(decoder: Decoder, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint that transformers loads: config.json and safetensors with one tensor an expert.

    Args:
        decoder: its `config.source` becomes config.json.
        folder: made if it is missing.
        dtype: of the stored weights; None: as they are. Correction biases stay float32.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before stays whole.
    """
    dtype = dtype or decoder.dtype
    names = {stored: name for name, stored in _DTYPES.items()}
    if dtype not in names:
        raise ConfigError(f"{dtype} is no dtype for a checkpoint; choose one of {', '.join(_DTYPES)}.")
    source = decoder.config.source
    # Of a vision wrapper the text model alone is here, so its own config is what describes the files.
    config: dict[str, Any] = dict(source.get("text_config") or source)
    family, stops = FAMILIES[decoder.config.model_type], list(decoder.config.eos_token_ids)
    config["model_type"] = family.saved_as or decoder.config.model_type
    config["dtype"] = names[dtype]
    config["tie_word_embeddings"] = decoder.config.tie_word_embeddings
    # Stop ids that only generation_config.json named are kept too.
    config["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    tensors = export_names(
        decoder.state_dict(),
        num_layers=decoder.config.num_layers,
        fused_experts=family.fused_experts,
    )
    cast = ((name, t if name.endswith("e_score_correction_bias") else t.to(dtype)) for name, t in tensors)
    write_checkpoint(folder, cast, config)


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that a config names, float32 if none."""
    inner = config.source.get("text_config") or {}
    named = (
        inner.get("dtype") or inner.get("torch_dtype") or config.source.get("dtype") or config.source.get("torch_dtype")
    )
    if named is None:
        return torch.float32
    if named not in _DTYPES:
        raise ConfigError(f"config.json: dtype {named!r} is not supported; supported: {', '.join(_DTYPES)}.")
    return _DTYPES[named]
