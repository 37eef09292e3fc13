"""Where a plan's config comes from: a published shape in this package, or wherever a model may lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from latentkv.checkpoint.gguf.tensors import is_gguf
from latentkv.checkpoint.locate import holds_weights
from latentkv.checkpoint.names import layer_of
from latentkv.checkpoint.quantization import quantization_method, quantization_of
from latentkv.checkpoint.source import resolve_config
from latentkv.checkpoint.tensors import open_tensors
from latentkv.errors import ConfigError
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.stored_config import open_checkpoint
from latentkv.weights.files import awq, compressed_config, gptq, modelopt
from latentkv.weights.formats import ROUNDED_TO

_PUBLISHED = files("latentkv.plan") / "published"

BUILT_IN: tuple[str, ...] = tuple(
    sorted(entry.name.removesuffix(".json") for entry in _PUBLISHED.iterdir() if entry.name.endswith(".json"))
)
"""Names of the published shapes that need no download."""


def load_config(model: str) -> ModelConfig:
    """Read the config of `model`: a built-in shape, or as `checkpoint.source.resolve_config` takes it.

    Of a repository only its config is fetched, never the weights. Where a folder holds weights, they decide what its
    config leaves open.

    Raises:
        ConfigError: there is no such model, or its config is not one that LatentKV supports.
        CheckpointError: the folder's weights are damaged.
    """
    if model.lower() in BUILT_IN:
        published = json.loads((_PUBLISHED / f"{model.lower()}.json").read_text(encoding="utf-8"))
        return read_config(published["config"])
    try:
        source = resolve_config(model)
    except ConfigError as error:
        raise ConfigError(f"{error}; or a built-in shape: {', '.join(BUILT_IN)}.") from error
    with_weights = is_gguf(source) or (source.is_dir() and holds_weights(source))
    return open_checkpoint(source)[0] if with_weights else read_config(source)


@dataclass(frozen=True)
class StoredWeights:
    """The weights in a model's files.

    Attributes:
        types: of the tensors, those with the most bytes first, as "Q4_K, Q6_K, F32".
        nbytes: of the main model, without layers of multi-token prediction.
    """

    types: str
    nbytes: int


def stored_weights(model: str, config: ModelConfig) -> StoredWeights | None:
    """What a GGUF file, or a copy quantised by another tool, holds; None for all others, of which their config says it.

    Args:
        model: as `load_config` takes it.
        config: what that gave.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the file is damaged.
    """
    if model.lower() in BUILT_IN:
        return None
    path = resolve_config(model)
    is_copy = path.is_dir() and holds_weights(path) and _is_foreign(quantization_of(path, config.source))
    if not is_gguf(path) and not is_copy:
        return None
    tensors, sizes = open_tensors(path), Counter[str]()
    for name in tensors.names:
        layer = layer_of(name)
        if layer is None or layer < config.num_layers:
            sizes[tensors.shown_dtype(name)] += tensors.nbytes(name)
    return StoredWeights(", ".join(kind for kind, _ in sizes.most_common()), sizes.total())


def _is_foreign(quantization: Mapping[str, Any] | None) -> bool:
    """Whether weights are quantised otherwise than `latentkv quantize` or DeepSeek does it."""
    method = quantization_method(quantization)
    if method == compressed_config.METHOD and quantization is not None:
        return compressed_config.PackedSchemes(quantization, ()).asked.format not in ROUNDED_TO.values()
    return method in (gptq.METHOD, awq.METHOD, modelopt.METHOD)
