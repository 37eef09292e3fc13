import re

import pytest

from latentkv.errors import RequestError
from latentkv.text.schema_keywords import require_enforced, without_idle_words


@pytest.mark.parametrize(
    ("schema", "key", "path"),
    [
        ({"uniqueItems": True}, "uniqueItems", "#"),
        ({"properties": {"a": {"not": {}}}}, "not", "#/properties/a"),
        ({"anyOf": [{}, {"if": {}}]}, "if", "#/anyOf/1"),
        ({"items": {"additionalProperties": {"contains": {}}}}, "contains", "#/items/additionalProperties"),
        ({"$defs": {"x": {"prefixItems": [{"nullable": True}]}}}, "nullable", "#/$defs/x/prefixItems/0"),
        ({"patternProperties": {"^a": {"maxLenght": 3}}}, "maxLenght", "#/patternProperties/^a"),
        ({"x-guidance": {"lenient": True}}, "x-guidance", "#"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "contains": {}}, "contains", "#"),
    ],
)
def test_a_keyword_that_is_not_enforced_is_refused_by_name_and_place(schema, key, path):
    with pytest.raises(RequestError, match=re.escape(f"{key!r} at {path}, which cannot be enforced")):
        require_enforced(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "T", "description": "d", "default": {"not": 1}, "examples": [{"if": 1}], "deprecated": True},
        {"$comment": "c", "readOnly": True, "x-order": 3, "$schema": "https://json-schema.org/draft/2020-12/schema"},
        {"properties": {"not": {"type": "string"}, "if": True}, "required": ["not"]},
        {"enum": [{"uniqueItems": True}], "const": {"not": 1}},
        {"$defs": {"uniqueItems": {"type": "null"}}, "$ref": "#/$defs/uniqueItems"},
        {"items": False, "additionalProperties": True},
    ],
)
def test_annotations_and_names_that_look_like_keywords_are_fine(schema):
    require_enforced(schema)


@pytest.mark.parametrize(
    "reference", ["http://localhost/x", "https://example.com/s.json#/a", "other.json", "file:///etc"]
)
def test_a_reference_out_of_the_schema_is_refused(reference):
    with pytest.raises(RequestError, match="is not fetched: put it under"):
        require_enforced({"properties": {"a": {"$ref": reference}}})


@pytest.mark.parametrize(
    "schema", [{"exclusiveMinimum": True}, {"minimum": "1"}, {"maxItems": 2.5}, {"minLength": -1}, {"maxLength": True}]
)
def test_a_limit_of_the_wrong_type_is_refused(schema):
    with pytest.raises(RequestError, match="it must be"):
        require_enforced(schema)


def test_only_as_many_properties_are_promised_as_cannot_be_the_same():
    require_enforced({"minProperties": 1})
    require_enforced({"minProperties": 3, "required": ["a", "b"]})
    with pytest.raises(RequestError, match="minProperties=2 at #"):
        require_enforced({"minProperties": 2})


def test_a_message_stays_short_whatever_the_schema_says():
    with pytest.raises(RequestError) as caught:
        require_enforced({"properties": {"a" * 50_000: {"b" * 50_000: 1}}})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("character", ["\x00", "\x1f", "\x7f"])
def test_a_control_character_without_an_escape_of_its_own_is_refused(character):
    with pytest.raises(RequestError, match="control character"):
        require_enforced({"enum": ["\\" + character]})
    require_enforced({"enum": ["\n\t\r\b\f", "\\u0001", "\\\\u0001"]})


def test_a_deep_schema_is_looked_through():
    schema: dict = {"oops": 1}
    for _ in range(300):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="'oops'"):
        require_enforced(schema)


@pytest.mark.parametrize(
    "idle",
    [
        {"uniqueItems": False},
        {"propertyNames": {"type": "string", "title": "Name"}},
        {"propertyNames": {}},
        {"nullable": False},
        {"format": "password"},
        {"unevaluatedProperties": True},
        {"dependentRequired": {}},
    ],
)
@pytest.mark.parametrize(
    "around",
    [lambda schema: schema, lambda schema: {"properties": {"format": schema}}, lambda schema: {"items": [schema]}],
)
def test_words_that_demand_nothing_are_left_out_wherever_they_stand(idle, around):
    found = without_idle_words(around({"type": "object", **idle}))
    assert found == around({"type": "object"})
    require_enforced(found)


@pytest.mark.parametrize(
    "schema",
    [
        {"format": "uuid"},
        {"uniqueItems": True},
        {"uniqueItems": 0},
        {"propertyNames": {"pattern": "^a"}},
        {"nullable": True},
        {"enum": [{"uniqueItems": False}], "const": {"format": "x"}, "default": {"nullable": False}},
        {"properties": {"nullable": False}},
    ],
)
def test_words_that_demand_something_and_values_stay(schema):
    assert without_idle_words(schema) == schema
