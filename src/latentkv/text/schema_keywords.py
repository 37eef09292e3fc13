"""Which words of JSON Schema are enforced. Any other that demands something is refused: it would promise too much."""

import json
import re
from collections.abc import Iterator
from typing import Any, cast

from latentkv.errors import RequestError

ONE_SCHEMA = frozenset({"items", "additionalItems", "additionalProperties"})
LISTED_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COUNTS = frozenset({"minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"})
_PLAIN = frozenset({"$ref", "const", "enum", "type", "required", "pattern", "format"})
# They say something about the values, and nothing about which are valid; so do all that begin with "x-".
ANNOTATIONS = frozenset(
    {
        *("$anchor", "$comment", "$id", "$schema", "id", "title", "description", "default", "example", "examples"),
        *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"),
        *("discriminator", "externalDocs", "xml", "markdownDescription", "enumDescriptions", "enumNames"),
    }
)
ENFORCED = ONE_SCHEMA | LISTED_SCHEMAS | NAMED_SCHEMAS | _LIMITS | _COUNTS | _PLAIN | ANNOTATIONS
# Those of `format` that the grammar's compiler knows. Any other says what a text is for, as the standard has it.
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
# Words with these values demand nothing.
_IDLE: tuple[tuple[str, Any], ...] = (
    *(("uniqueItems", False), ("nullable", False), ("unevaluatedProperties", True), ("unevaluatedItems", True)),
    *(("dependentRequired", {}), ("dependentSchemas", {}), ("dependencies", {}), ("not", False)),
    ("propertyNames", True),
)
# Keys that the grammar's own compiler would read: they can turn the checks off.
_COMPILER_OPTIONS = "x-guidance"

# Without escapes by number (see lark.py) nothing can write these.
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*(\\u00..|\x7f)")

_Found = tuple[str, Any]


def without_idle_words(schema: Any) -> Any:
    """A schema without the words that demand nothing, in those inside it, too."""
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", schema).items():
        if _is_idle(key, value):
            continue
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            value = {name: without_idle_words(each) for name, each in cast("dict[str, Any]", value).items()}
        elif key in LISTED_SCHEMAS | ONE_SCHEMA and isinstance(value, list):
            value = [without_idle_words(each) for each in cast("list[Any]", value)]
        elif key in ONE_SCHEMA:
            value = without_idle_words(value)
        kept[key] = value
    return kept


def _is_idle(key: str, value: Any) -> bool:
    if key == "format":
        return isinstance(value, str) and value not in _FORMATS
    if key == "propertyNames" and isinstance(value, dict):  # names are strings anyway
        asked = {name: each for name, each in cast("dict[str, Any]", value).items() if name not in ANNOTATIONS}
        return asked in ({}, {"type": "string"})
    return any(key == word and value == idle and type(value) is type(idle) for word, idle in _IDLE)


def require_enforced(schema: dict[str, Any]) -> None:
    """Look through a schema and those inside it.

    Raises:
        RequestError: one has a keyword that would not be enforced, or a character; the message names it.
    """
    control = _CONTROL.search(json.dumps(schema, ensure_ascii=False))
    if control:
        raise RequestError(f"The JSON schema holds the control character {control[1]!a}, which cannot be enforced.")
    waiting: list[_Found] = [("#", schema)]
    while waiting:
        path, found = waiting.pop()
        if isinstance(found, dict):
            _check(path, cast("dict[str, Any]", found))
            waiting += _inside(path, cast("dict[str, Any]", found))


def _check(path: str, schema: dict[str, Any]) -> None:
    for key, value in schema.items():
        found = f"The JSON schema has {_short(repr(key))} at {_short(path)}"
        if key not in ENFORCED and (not key.startswith("x-") or key == _COMPILER_OPTIONS):
            raise RequestError(f"{found}, which cannot be enforced: leave it out.")
        if key == "$ref" and not str(value).startswith("#"):
            raise RequestError(f"{found} to {_short(repr(value))}, which is not fetched: put it under $defs.")
        if key in _LIMITS and type(value) not in (int, float):
            raise RequestError(f"{found} with the value {_short(repr(value))}, and it must be a number.")
        if key in _COUNTS and (type(value) is not int or value < 0):
            raise RequestError(f"{found} with the value {_short(repr(value))}, and it must be an integer, 0 or more.")
    # Keys that `properties` does not list may come twice, so that two of them may be one.
    required = schema.get("required")
    unlisted = schema.get("minProperties", 0) - (len(cast("list[Any]", required)) if isinstance(required, list) else 0)
    if unlisted > 1:
        raise RequestError(
            f"The JSON schema has minProperties={schema['minProperties']} at {_short(path)}, which can be enforced "
            "only up to one more than the properties that are required: lower it, or require properties."
        )


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:48]} ... {text[-48:]}"


def _inside(path: str, schema: dict[str, Any]) -> Iterator[_Found]:
    for key, value in schema.items():
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            yield from ((f"{path}/{key}/{name}", each) for name, each in cast("dict[str, Any]", value).items())
        elif key in LISTED_SCHEMAS | ONE_SCHEMA and isinstance(value, list):
            yield from ((f"{path}/{key}/{i}", each) for i, each in enumerate(cast("list[Any]", value)))
        elif key in ONE_SCHEMA:
            yield f"{path}/{key}", value
