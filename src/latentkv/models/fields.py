"""Values of a config.json, read by their kind: what is something else is refused, not taken for what it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentkv.errors import ConfigError

_MOST = 1e30
"""Beyond any number that a config means, and of which products stay finite."""


def read_number(value: Any, key: str) -> float:
    """A finite number.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST < value < _MOST:
        raise ConfigError(f"config.json: {key} must be a number, not {shown(value)}.")
    return float(value)


def read_optional(value: Any, key: str) -> float | None:
    """A finite number, or None for null.

    Raises:
        ConfigError: it is something else.
    """
    return None if value is None else read_number(value, key)


def read_positive(value: Any, key: str, default: float) -> float:
    """A finite number above 0; the default for null and 0.

    Raises:
        ConfigError: it is something else.
    """
    number = default if value is None or (value == 0 and type(value) is not bool) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < _MOST:
        raise ConfigError(f"config.json: {key} is {shown(value)}: it must be a finite number above 0.")
    return float(number)


def read_flag(value: Any, key: str) -> bool:
    """True or false; null is false.

    Raises:
        ConfigError: it is something else; the text "false" would count as true otherwise.
    """
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, not {shown(value)}.")
    return bool(value)


def shown(value: Any) -> str:
    """A value as a sentence can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def names_layers(kinds: Any, num_layers: int, allowed: Sequence[str]) -> bool:
    """Whether this is a list that says of each layer one of the allowed kinds."""
    return isinstance(kinds, list) and len(kinds) == num_layers and all(kind in allowed for kind in kinds)
