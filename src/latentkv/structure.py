"""`Structure`: the form that a completion's text must have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from latentkv.errors import RequestError

StructureKind = Literal["json_schema", "regex", "grammar"]

MAX_SOURCE_BYTES = 1 << 16
MAX_CHOICES = 1024
_SIGNS = re.compile(r"[!-/:;=?@\[-`{-~]")
"""That mean something in a regular expression, or may be escaped there all the same; \\< and \\> are ends of words."""


@dataclass(frozen=True)
class Structure:
    """The form of a text, checked for type and size; `json_schema` and its siblings make one.

    Attributes:
        kind: what language `source` is written in.
        source: a JSON object, a regular expression or a Lark grammar; at most 65,536 bytes of UTF-8.

    Raises:
        RequestError: a source is of the wrong type, empty, too long, or not the JSON that it should be.
    """

    kind: StructureKind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructureKind):
            raise RequestError(f"structure kind {self.kind!r} is unknown: choose {', '.join(get_args(StructureKind))}.")
        size = _num_bytes(self.kind, self.source)
        if not 0 < size <= MAX_SOURCE_BYTES:
            raise RequestError(f"A {self.kind} of {size:,} bytes is not allowed: it has 1 to {MAX_SOURCE_BYTES:,}.")
        if self.kind == "json_schema":
            _require_object(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Structure:
        """JSON that a JSON schema (draft 2020-12), given as an object or as its text, validates."""
        return cls("json_schema", schema if isinstance(schema, str) else _as_json("json_schema", schema))

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """A text that a regular expression matches as a whole; without lookaround and back references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Structure:
        """One of up to 1,024 texts."""
        texts = _texts("choice", choices)
        return cls("grammar", "start: CHOICE\nCHOICE: " + " | ".join(_as_json("choice", text) for text in texts))

    @classmethod
    def without(cls, texts: Iterable[str]) -> Structure:
        """Any text in which none of these up to 1,024 occurs."""
        given = _texts("without", texts)
        forbidden = "|".join(_SIGNS.sub(r"\\\g<0>", text).replace("\n", r"\n").replace("\r", r"\r") for text in given)
        return cls("grammar", f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)({forbidden})(?s:.*)/")

    @classmethod
    def grammar(cls, lark: str) -> Structure:
        """A text that a context-free grammar derives from `start`, in llguidance's dialect of Lark."""
        return cls("grammar", lark)


def _texts(name: str, given: Iterable[str]) -> tuple[str, ...]:
    known = isinstance(cast(object, given), Iterable) and not isinstance(given, (str, bytes))
    texts = tuple(given) if known else ()
    if not 0 < len(texts) <= MAX_CHOICES or not all(isinstance(cast(object, text), str) and text for text in texts):
        raise RequestError(f"{name} must be a list of 1 to {MAX_CHOICES:,} strings, none of them empty.")
    return texts


def _num_bytes(kind: str, source: object) -> int:
    if not isinstance(source, str):
        raise RequestError(f"A {kind} must be a string, not {type(source).__name__}.")
    try:
        return len(source.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"The {kind} is not valid Unicode: lone surrogate at {error.start}.") from None


def _as_json(name: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} cannot be written as JSON: {error}.") from error


def _require_object(source: str) -> None:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The json_schema is not JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise RequestError(f"A json_schema must be a JSON object, not {type(schema).__name__}.")
