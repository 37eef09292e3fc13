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

_SHARD_BYTES = 10**9

SYNTHETIC: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "v2-lite": ("deepseek-v2-lite", {}),
    "v2-lite-4": ("deepseek-v2-lite", {"num_hidden_layers": 4, "vocab_size": 32768}),
    "v2-lite-8e": ("deepseek-v2-lite", {"n_routed_experts": 8}),
    "youtu-llm-2b": ("youtu-llm-2b", {}),
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
    config["bos_token_id"] = min(config["bos_token_id"], config["vocab_size"] - 2)
    config["eos_token_id"] = min(config["eos_token_id"], config["vocab_size"] - 1)
    return config


def write_synthetic(config: Mapping[str, Any], folder: Path, *, seed: int = 0) -> int:
    """Write a bf16 checkpoint of random weights; memory holds about one shard (1 GB) of it.

    Args:
        config: what config.json says.
        folder: made if need be.
        seed: of the weights.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: the config is not supported.
        CheckpointError: the disk is full or refuses.
    """
    with torch.device("meta"):
        decoder = Decoder(read_config(config))
    state = decoder.state_dict()
    write_checkpoint(
        folder,
        random_tensors(state, num_layers=decoder.config.num_layers, std=decoder.config.initializer_range, seed=seed),
        {**config, "dtype": "bfloat16"},
        max_shard_bytes=_SHARD_BYTES,
    )
    return sum(math.prod(tensor.shape) for tensor in state.values())


def random_tensors(
    state: Mapping[str, Tensor], *, num_layers: int, std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """A published name and a bf16 tensor for each weight of `state` (which may be on the meta device), as on day one.

    Matrices are normal(0, std), norms one, biases zero; each tensor depends on the seed and its name alone.
    """
    for name, like in export_names(state, num_layers=num_layers):
        if like.ndim > 1:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            yield name, torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
            yield name, torch.full(like.shape, value, dtype=dtype)
