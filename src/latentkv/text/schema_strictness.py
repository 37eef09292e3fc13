"""A JSON schema of a client's, as it can be held to: strictly, or with a note about what was left out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

from latentkv.errors import RequestError
from latentkv.text.schema_keywords import (
    ANNOTATIONS,
    ENFORCED,
    LISTED_SCHEMAS,
    NAMED_SCHEMAS,
    ONE_SCHEMA,
    without_idle_words,
)

MAX_DEPTH = 100
MAX_UNIQUE = 4
"""Values of a list without repetitions whose orders are all written out."""

# Lookaround and back references: a pattern of a grammar has none.
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")
_KIND = {"integer": "number"}
_JOINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}
"""Words that may ask for properties beside those that are listed."""
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class ReadSchema:
    """A schema, and what of it is not enforced.

    Attributes:
        schema: to be compiled.
        notes: a few words about each place; empty for a schema that is enforced as it is.
    """

    schema: dict[str, Any]
    notes: tuple[str, ...]


def read_schema(schema: Mapping[str, Any], *, strict: bool) -> ReadSchema:
    """Make a schema enforceable.

    Args:
        schema: as a client wrote it.
        strict: what cannot be enforced stays in the schema, to be refused; otherwise it is left out. Objects that do
            not say what other properties they may have get none; otherwise only those that list some, because a model
            that does not know the form would make up properties for ever.

    Raises:
        RequestError: it nests too deeply.
    """
    reader = _Reader(without_idle_words(dict(schema)), strict=strict)
    read = reader.read(reader.root, "#", 0)
    return ReadSchema(read, tuple(reader.notes))


class _Reader:
    def __init__(self, root: dict[str, Any], *, strict: bool) -> None:
        self.root = root
        self.strict = strict
        self._joins = _has_joined_parts(root)
        self.notes: list[str] = []

    def read(self, schema: Any, path: str, depth: int) -> Any:
        """A schema and those inside it."""
        if depth > MAX_DEPTH:
            raise RequestError("The JSON schema nests too deeply: simplify it.")
        if not isinstance(schema, dict):
            return schema
        found = self._with_enforceable_words(cast("dict[str, Any]", schema))
        found = self._with_any_of(found, path)
        found = self._closed(found if self.strict else self._loosened(found, path))
        for key, value in found.items():
            if key in NAMED_SCHEMAS and isinstance(value, dict):
                inside = cast("dict[str, Any]", value)
                found[key] = {name: self.read(each, f"{path}/{key}/{name}", depth + 1) for name, each in inside.items()}
            elif key in LISTED_SCHEMAS | ONE_SCHEMA and isinstance(value, list):
                parts = enumerate(cast("list[Any]", value))
                found[key] = [self.read(each, f"{path}/{key}/{i}", depth + 1) for i, each in parts]
            elif key in ONE_SCHEMA:
                found[key] = self.read(value, f"{path}/{key}", depth + 1)
        return found

    def _with_enforceable_words(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema in which words that cannot be enforced are said by others, where there are such."""
        found = self._unique(schema) if schema.get("uniqueItems") is True else dict(schema)
        names = found.get("propertyNames")
        if isinstance(names, dict) and "patternProperties" not in found:
            words = cast("dict[str, Any]", names).items()
            asked = {key: value for key, value in words if (key, value) != ("type", "string")}
            others = found.get("additionalProperties", True)
            own = cast("dict[str, Any]", found.get("properties", {}))
            allowed = _values(self._target(asked))
            if asked.keys() <= {"enum", "const", "$ref"} and allowed and all(isinstance(each, str) for each in allowed):
                del found["propertyNames"]
                named = {name: own.get(name, others) for name in allowed}
                found |= {"properties": named, "additionalProperties": False}
            elif asked.keys() == {"pattern"} and not own and not _LOOKS_AROUND.search(str(asked["pattern"])):
                del found["propertyNames"]
                found |= {"patternProperties": {asked["pattern"]: others}, "additionalProperties": False}
        return found

    def _unique(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A list without repetitions: at most one item, or all orders of a few values."""
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if type(most) is int and most <= 1:
            return {key: value for key, value in schema.items() if key != "uniqueItems"}
        values = _values(self._target(schema.get("items")))
        plain = schema.keys() <= {"type", "items", "uniqueItems", "minItems", "maxItems", *_DEFINITIONS, *ANNOTATIONS}
        if not 0 < len(values) <= MAX_UNIQUE or not plain or type(least) is not int:
            return dict(schema)
        most = min(most, len(values)) if type(most) is int else len(values)
        orders = [order for count in range(least, most + 1) for order in permutations(values, count)]
        if not orders:
            return dict(schema)
        defined = {key: schema[key] for key in _DEFINITIONS if key in schema}
        return {**defined, "anyOf": [_exactly(order) for order in orders]}

    def _with_any_of(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        """A schema whose `oneOf` is said by `anyOf`, where that is the same; and, unless strict, where it is not."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list):
            return schema
        if not self._exclude_each_other(cast("list[Any]", branches)):
            if self.strict:
                return schema
            self._note("oneOf", path, "taken for anyOf")
        found = {key: value for key, value in schema.items() if key != "oneOf"}
        if "anyOf" in found:
            return {**found, "allOf": [*found.get("allOf", ()), {"anyOf": branches}]}
        return {**found, "anyOf": branches}

    def _closed(self, schema: dict[str, Any]) -> dict[str, Any]:
        is_object = schema.get("type") == "object" or "properties" in schema
        if not is_object or "additionalProperties" in schema or not (self.strict or self._may_be_closed(schema)):
            return schema
        return {**schema, "additionalProperties": False}

    def _may_be_closed(self, schema: dict[str, Any]) -> bool:
        """Whether an object has values of its own without properties that it does not list."""
        listed = schema.get("properties")
        if not isinstance(listed, dict) or not listed or self._joins or not _JOINING.isdisjoint(schema):
            return False
        required, least = schema.get("required", []), schema.get("minProperties", 0)
        known = cast("dict[str, Any]", listed).keys()
        return (
            isinstance(required, list) and known >= set(map(str, cast("list[Any]", required))) and least <= len(known)
        )

    def _loosened(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "pattern" and _LOOKS_AROUND.search(str(value)):
                self._note(key, path)
            elif key == "patternProperties" and isinstance(value, dict):
                named = cast("dict[str, Any]", value)
                kept[key] = {name: each for name, each in named.items() if not _LOOKS_AROUND.search(name)}
                if len(kept[key]) < len(named):
                    self._note(key, path)
            elif key == "minProperties" and isinstance(value, int):
                required = schema.get("required")
                most = 1 + (len(cast("list[Any]", required)) if isinstance(required, list) else 0)
                kept[key] = min(value, most)
                if value > most:
                    self._note(key, path)
            elif key in ENFORCED or key.startswith("x-"):
                kept[key] = value
            else:
                self._note(key, path)
        return kept

    def _note(self, key: str, path: str, what: str = "not enforced") -> None:
        self.notes.append(f"{key} at {path} is {what}")

    def _exclude_each_other(self, branches: list[Any]) -> bool:
        """Whether no value can be of two branches, as far as is plain to see."""
        schemas = [self._target(each) for each in branches]
        kinds = [_KIND.get(str(kind), kind) for kind in (each.get("type") for each in schemas)]
        if all(isinstance(kind, str) for kind in kinds) and len(set(map(str, kinds))) == len(kinds):
            return True
        fixed = [_fixed_properties(each) for each in schemas]
        shared = set.intersection(*(set(each) for each in fixed)) if fixed else set[str]()
        return any(_disjoint([each[name] for each in fixed]) for name in shared)

    def _target(self, schema: Any) -> dict[str, Any]:
        """Of a reference within the schema, what it refers to."""
        for _ in range(MAX_DEPTH):
            reference = cast("dict[str, Any]", schema).get("$ref") if isinstance(schema, dict) else None
            if not (isinstance(reference, str) and reference.startswith("#/")):
                break
            schema = self.root
            for name in reference[2:].split("/"):
                schema = cast("dict[str, Any]", schema).get(name) if isinstance(schema, dict) else None
        return cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}


def _has_joined_parts(schema: Any) -> bool:
    """Whether some value must be of several schemas at once: if one is closed, the others' properties are shut out."""
    if isinstance(schema, list):
        return any(map(_has_joined_parts, cast("list[Any]", schema)))
    if not isinstance(schema, dict):
        return False
    found = cast("dict[str, Any]", schema)
    parts = found.get("allOf")
    if isinstance(parts, list) and len(cast("list[Any]", parts)) > 1:
        return True
    return any(map(_has_joined_parts, found.values()))


def _fixed_properties(schema: dict[str, Any]) -> dict[str, list[Any]]:
    """Of properties that must be there and have one of few values, these."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    return {
        name: values
        for name, each in cast("dict[str, Any]", properties).items()
        if name in required and isinstance(each, dict) and (values := _values(cast("dict[str, Any]", each)))
    }


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """The values of a schema that lists them; none of one that does not."""
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return schema["enum"]
    return [False, True] if schema.get("type") == "boolean" else []


def _disjoint(lists: Sequence[list[Any]]) -> bool:
    shown = [repr(value) for values in lists for value in values]
    return len(set(shown)) == len(shown)


def _exactly(items: Sequence[Any]) -> dict[str, Any]:
    count = len(items)
    fixed = {"prefixItems": [{"const": each} for each in items]} if items else {}
    return {"type": "array", **fixed, "items": False, "minItems": count, "maxItems": count}
