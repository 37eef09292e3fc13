"""Checkpoints of published shapes with random weights: speed and memory depend on the shape, not on what it learned."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.checkpoint.names import export_names
from latentkv.checkpoint.writer import write_checkpoint
from latentkv.errors import RequestError
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.weights import CodeFormat
from latentkv.weights.files.compressed_config import build_config
from latentkv.weights.files.compressed_tensors import PACKED, SCALE, SHAPE, packed_layout
from latentkv.weights.policy import WeightScheme, choose_scheme

_SHARD_BYTES = 10**9

SYNTHETIC: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "v2-lite": ("deepseek-v2-lite", {}),
    "v2-lite-4": ("deepseek-v2-lite", {"num_hidden_layers": 4, "vocab_size": 32768}),
    "v2-lite-8e": ("deepseek-v2-lite", {"n_routed_experts": 8}),
    "youtu-llm-2b": ("youtu-llm-2b", {}),
    "a.x-k2-light": ("a.x-k2-light", {}),
    "a.x-k2-light-8": ("a.x-k2-light", {"num_hidden_layers": 8, "vocab_size": 32768}),
    "ling-3.0-tiny": ("ling-3.0-tiny", {}),
    "ling-3.0-tiny-8": ("ling-3.0-tiny", {"num_hidden_layers": 8, "vocab_size": 32768}),
}
"""Name -> the published shape that it is (of `latentkv plan`), and what is changed to fit a small machine."""


def synthetic_config(shape: str) -> dict[str, Any]:
    """The config.json of one of `SYNTHETIC`.

    Raises:
        RequestError: there is no such shape.
    """
    if shape not in SYNTHETIC:
        raise RequestError(f"{shape!r} is not a known shape; choose from {', '.join(SYNTHETIC)}.")
    published, changes = SYNTHETIC[shape]
    text = (files("latentkv.plan") / "published" / f"{published}.json").read_text(encoding="utf-8")
    config = json.loads(text)["config"] | changes
    # The published ids lie outside a smaller vocabulary; a random model never means them anyway.
    for key, most in (("bos_token_id", config["vocab_size"] - 2), ("eos_token_id", config["vocab_size"] - 1)):
        if config.get(key) is not None:
            config[key] = min(config[key], most)
    return config


def write_synthetic(
    config: Mapping[str, Any], folder: Path, *, seed: int = 0, weights: CodeFormat | None = None
) -> int:
    """Write a checkpoint of random weights; memory holds about one shard (1 GB) of it.

    Args:
        config: what config.json says.
        folder: made if need be.
        seed: of the weights.
        weights: None: bf16. Else as `latentkv quantize` stores them, but codes are drawn instead of quantised: a model
            whose bf16 weights fit nowhere can be written too.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: the config is not supported.
        CheckpointError: the disk is full or refuses.
    """
    with torch.device("meta"):
        decoder = Decoder(read_config(config))
    layers, std = decoder.config.num_layers, decoder.config.initializer_range
    published = {name: like.shape for name, like in export_names(decoder.state_dict(), num_layers=layers)}
    schemes = {
        name: None if weights is None else choose_scheme(name, shape, weights) for name, shape in published.items()
    }
    written = dict(config) | {"dtype": "bfloat16"}
    if weights is not None:
        written["quantization_config"] = _quantization_config(published, schemes)
    tensors = (part for name, shape in published.items() for part in _random(name, shape, schemes[name], std, seed))
    write_checkpoint(folder, tensors, written, max_shard_bytes=_SHARD_BYTES)
    return sum(math.prod(shape) for shape in published.values())


def _quantization_config(
    published: Mapping[str, torch.Size], schemes: Mapping[str, WeightScheme | None]
) -> dict[str, Any]:
    """As `latentkv quantize` writes it: what is quantised, and the linear layers that are not."""
    modules = {name.removesuffix(".weight"): schemes[name] for name, shape in published.items() if len(shape) == 2}
    kept = [name for name, scheme in modules.items() if scheme is None and not name.endswith("embed_tokens")]
    return build_config({name: scheme for name, scheme in modules.items() if scheme is not None}, kept)


def _random(
    name: str, shape: torch.Size, scheme: WeightScheme | None, std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the parts of a quantised one, as on day one: matrices of deviation `std`, norms one, biases zero.

    It depends on the seed and its name alone.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    if len(shape) == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        yield name, torch.full(shape, value, dtype=dtype)
    elif scheme is None:
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)
    else:
        layout = packed_layout((shape[0], shape[1]), scheme)
        # Every code is as likely as every other: their deviation is 2^bits / sqrt(12).
        scale = std * math.sqrt(12) / 2**scheme.format.bits
        dtype, packed_shape = layout[PACKED]
        yield name + PACKED, torch.empty(packed_shape, dtype=dtype).random_(-(2**31), 2**31 - 1, generator=generator)
        yield name + SCALE, torch.full(layout[SCALE][1], scale, dtype=layout[SCALE][0])
        yield name + SHAPE, torch.tensor(shape)
