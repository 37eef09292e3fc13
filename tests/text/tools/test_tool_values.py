import json
from typing import Any

import pytest

from latentkv.text.tools.values import allowed_types, value_as_json


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        (" a\n", {"type": "string"}, " a\n"),
        ("12", {"type": "integer"}, 12),
        (" 12 ", {"type": "number"}, 12),
        ("1e3", {"type": "number"}, 1000.0),
        ("12.0", {"type": "integer"}, 12.0),
        ("12.5", {"type": "integer"}, "12.5"),
        ("twelve", {"type": "integer"}, "twelve"),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("True", {}, "True"),
        ("None", {"type": ["string", "null"]}, None),
        ("null", {"type": ["string", "null"]}, None),
        ("nullify", {"type": ["string", "null"]}, "nullify"),
        ('[{"a": 1}]', {"type": "array"}, [{"a": 1}]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1', {"type": "object"}, '{"a": 1'),
        ('{"a": 1}', {}, {"a": 1}),
        ("12", {}, 12),
        ("words", {}, "words"),
        ('"words"', {}, '"words"'),
        ("", {}, ""),
        ("NaN", {"type": "number"}, "NaN"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"const": "2"}, "2"),
        ("2", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "2"),
        ("2", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, 2),
        ("2", {"anyOf": [{"type": "string"}, {}]}, 2),
    ],
)
def test_a_bare_value_gets_the_type_of_its_schema(text: str, schema: dict[str, Any], value: object) -> None:
    assert json.loads(value_as_json(text, schema)) == value
    assert type(json.loads(value_as_json(text, schema))) is type(value)


def test_schemas_that_nest_without_end_say_nothing() -> None:
    schema: dict[str, Any] = {}
    schema["anyOf"] = [schema]
    assert allowed_types(schema) == frozenset()
