"""Which models can be converted, and why others cannot."""

from __future__ import annotations

from pathlib import Path

from latentkv.errors import ConfigError
from latentkv.models.config import GQAConfig, ModelConfig, MoEConfig

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "seed_oss", "qwen3_moe", "mixtral")


def require_convertible_model(folder: Path, config: ModelConfig) -> GQAConfig:
    """The attention of a model that can be converted.

    Raises:
        ConfigError: it cannot, and why.
    """
    attention = config.attention
    if not isinstance(attention, GQAConfig):
        raise ConfigError(f"{folder} has latent attention already: there is nothing to convert.")
    if config.model_type not in _FAMILIES:
        raise ConfigError(f"{config.model_type} cannot be converted yet: only {', '.join(_FAMILIES)} can.")
    if any((layer.sliding_window or config.max_positions) < config.max_positions for layer in config.layers):
        raise ConfigError(f"{folder} has sliding windows, which no latent attention here can express.")
    if config.rope.dim < attention.head_dim:
        raise ConfigError(
            f"{folder} rotates {config.rope.dim} of the {attention.head_dim} dimensions of a head, which cannot be "
            "converted yet: models that rotate all of them can."
        )
    if config.mlp_bias:
        raise ConfigError(f"{folder} has biases in its feed-forward layers, for which DeepSeek-V3 has no place.")
    if config.moe is not None:
        _require_experts(folder, config, config.moe)
    return attention


def _require_experts(folder: Path, config: ModelConfig, moe: MoEConfig) -> None:
    """Raise `ConfigError` for experts that a Mistral-4 checkpoint cannot say."""
    sparse = [layer.moe is not None for layer in config.layers]
    behind = [index for index, has_experts in enumerate(sparse) if not has_experts and index > sparse.index(True)]
    if behind:
        dense = ", ".join(map(str, behind))
        raise ConfigError(
            f"{folder} has dense layers ({dense}) behind layers with experts, and the converted model's must come "
            "first: a model without mlp_only_layers and decoder_sparse_step can be converted."
        )
    if moe.num_experts < 2:
        raise ConfigError(f"{folder} has a single expert, which is no choice for a router: it takes two or more.")
