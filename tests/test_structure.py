import json

import pytest

from latentkv.engine import SamplingParams, Structure
from latentkv.errors import RequestError


def test_equal_structures_are_one_key_of_a_cache():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert Structure.json_schema(schema) == Structure.json_schema(json.dumps(schema))
    params = SamplingParams(structure=Structure.json_schema(schema))
    assert params.structure is not None
    hash(params.structure)


def test_the_order_of_properties_is_kept():
    schema = {"properties": {"b": {}, "a": {}}}
    assert json.dumps(schema) == Structure.json_schema(schema).source


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (Structure.json_schema, "[1]", "must be a JSON object, not list"),
        (Structure.json_schema, "{", "is not JSON"),
        (Structure.json_schema, "[" * 60_000, "is not JSON"),
        (Structure.json_schema, {"const": {1, 2}}, "cannot be written as JSON"),
        (Structure.json_schema, {"const": float("nan")}, "cannot be written as JSON"),
        (Structure.json_schema, {"const": "\ud800"}, "lone surrogate"),
        (Structure.json_schema, None, "must be a JSON object, not NoneType"),
        (Structure.regex, "", "0 bytes is not allowed"),
        (Structure.regex, "é" * 32_769, "65,538 bytes is not allowed: it has 1 to 65,536"),
        (Structure.regex, 3, "must be a string, not int"),
        (Structure.regex, "\udc00", "lone surrogate"),
        (Structure.grammar, b"start: A", "must be a string, not bytes"),
        (Structure.choice, [], "1 to 1,024 strings"),
        (Structure.choice, ["a"] * 1_025, "1 to 1,024 strings"),
        (Structure.choice, ["a", ""], "none of them empty"),
        (Structure.choice, ["a", 1], "1 to 1,024 strings"),
        (Structure.choice, "yes", "must be a list"),
        (Structure.choice, 3, "must be a list"),
    ],
)
def test_what_cannot_be_a_structure_is_refused_at_once(make, value, message):
    with pytest.raises(RequestError, match=message):
        make(value)


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(RequestError, match="structure kind 'xml' is unknown: choose json_schema, regex, grammar"):
        Structure("xml", "<a>")  # type: ignore[arg-type]
