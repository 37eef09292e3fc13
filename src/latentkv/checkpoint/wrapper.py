"""The text model inside a config.json: itself, or an object nested in it beside vision, audio and the like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

# Keys under which text models lie, the surest first; then any other `*_config` that has the sizes of one.
_TEXT_KEYS = ("text_config", "language_config", "llm_config", "language_model_config", "thinker_config")
_OTHERS = re.compile(
    r"vision|visual|image|video|audio|speech|talker|token2wav|code2wav|codec|code_predictor|encoder|projector|draft|quantization"
)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_MOST_LEVELS = 4


def config_levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A config.json and the objects down to its text model, outermost first; only itself where nothing is nested."""
    levels = [config]
    while len(levels) < _MOST_LEVELS and (inner := _nested(levels[-1])) is not None:
        levels.append(inner)
    return tuple(levels)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object of a config.json that describes its text model."""
    return config_levels(config)[-1]


def outermost(config: Mapping[str, Any], key: str) -> Any:
    """A key's value at the outermost level that has one; None where none has."""
    return next((level[key] for level in config_levels(config) if level.get(key) is not None), None)


def without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of a config.json without a key, at whichever level it stands."""
    levels = config_levels(config)
    copy = {name: value for name, value in config.items() if name != key}
    if len(levels) > 1:
        name = next(name for name, value in config.items() if value is levels[1])
        copy[name] = without(levels[1], key)
    return copy


def _nested(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    named = [config.get(key) for key in _TEXT_KEYS]
    others = [config[key] for key in config if key.endswith("_config") and not _OTHERS.search(key)]
    for inner in named:
        if isinstance(inner, Mapping) and inner:
            return cast("Mapping[str, Any]", inner)
    if any(key in config for key in _SIZES):
        return None
    for inner in others:
        if isinstance(inner, Mapping) and all(key in inner for key in _SIZES):
            return cast("Mapping[str, Any]", inner)
    return None
