"""Arguments that come as bare text, as JSON of the type that the tool's schema gives them."""

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from latentkv.text.tools.json_text import is_json

_MAX_NESTING = 8  # of anyOf and oneOf within each other
_INTEGER = re.compile(r"-?\d+(\.0+)?")
_TEXT = frozenset(["string"])
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def allowed_types(schema: object, nesting: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows, as far as it names them; empty where it does not."""
    match schema:
        case {"type": str(name)}:
            return frozenset([name])
        case {"type": [*names]}:
            return frozenset(name for name in cast(list[Any], names) if isinstance(name, str))
        case {"enum": [*values]}:
            return frozenset(_type_of(json.dumps(value)) for value in cast(list[Any], values))
        case {"const": value}:
            return frozenset([_type_of(json.dumps(value))])
        case {"anyOf": [*choices]} | {"oneOf": [*choices]} if nesting < _MAX_NESTING:
            types = [allowed_types(choice, nesting + 1) for choice in cast(list[Any], choices)]
            return frozenset[str]().union(*types) if all(types) else frozenset()
        case _:
            return frozenset()


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value can only be a string."""
    return allowed_types(schema) == _TEXT


def value_as_json(text: str, schema: Mapping[str, Any]) -> str:
    """Writes a bare value as JSON.

    JSON of a type that the schema allows stays as it is, and so does any JSON where the schema names no type. "True",
    "False" and "None" are taken for what they mean where that is allowed. All else is a string, a text in quotation
    marks too.
    """
    types = allowed_types(schema)
    bare = text.strip()
    if types == _TEXT:
        return as_string(text)
    if bare in _PYTHON_WORDS and _type_of(_PYTHON_WORDS[bare]) in types:
        return _PYTHON_WORDS[bare]
    if bare and bare[0] != '"' and is_json(bare):
        kind = _type_of(bare)
        if not types or kind in types or (kind == "integer" and "number" in types):
            return bare
    return as_string(text)


def as_string(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _type_of(value: str) -> str:
    """The JSON schema type of a JSON text."""
    match value[0]:
        case '"':
            return "string"
        case "{":
            return "object"
        case "[":
            return "array"
        case "t" | "f":
            return "boolean"
        case "n":
            return "null"
        case _:
            return "integer" if _INTEGER.fullmatch(value) else "number"
