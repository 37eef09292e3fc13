"""Sizes as people write them ("128k", "24GiB") and as they like to read them."""

from __future__ import annotations

import re

from latentkv.errors import RequestError

_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)


def parse_tokens(text: str) -> int:
    """Read a number of tokens; k and m count in 1024s, as context lengths do ("128k" is 131,072).

    Raises:
        RequestError: if `text` is not such a number, or less than one token.
    """
    match = _TOKENS.fullmatch(text.strip())
    tokens = int(float(match[1]) * 1024 ** _POWER[match[2].lower()]) if match else 0
    if tokens < 1:
        raise RequestError(f"{text!r} is not a number of tokens; write for example 4096, 128k or 1M.")
    return tokens


def parse_bytes(text: str) -> int:
    """Read a number of bytes: "24GiB" and "24G" count in 1024s, "24GB" in 1000s.

    Raises:
        RequestError: if `text` is not such a number, or less than one byte.
    """
    match = _BYTES.fullmatch(text.strip())
    size = 0
    if match:
        decimal = match[2] and match[4] and not match[3]
        size = int(float(match[1]) * (1000 if decimal else 1024) ** _POWER[match[2].lower()])
    if size < 1:
        raise RequestError(f"{text!r} is not an amount of memory; write for example 24GiB, 512MiB or 80GB.")
    return size


def parse_share(text: str) -> float:
    """Read a part of one: 1/4 or 0.25.

    Raises:
        RequestError: if `text` is no such number.
    """
    try:
        part, _, whole = text.partition("/")
        return float(part) / float(whole or "1")
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"{text!r} is no share; write 1/4 or 0.25.") from None


def format_tokens(tokens: int) -> str:
    """Write a number of tokens as `parse_tokens` reads it: 32k."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def format_bytes(size: float) -> str:
    """Write bytes for reading: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def format_count(count: float) -> str:
    """Write a number of parameters for reading: 15.7B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 100 * size else f"{count / size:.0f}{unit}"
    return f"{count:.0f}"
