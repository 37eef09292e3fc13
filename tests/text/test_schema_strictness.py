from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from latentkv.errors import RequestError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.text import load_tokenizer
from latentkv.text.grammar import GrammarCompiler
from latentkv.text.schema_strictness import read_schema

STRING = {"type": "string"}
A = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}


def kind(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]}


@pytest.fixture(scope="module")
def holds() -> Callable[..., bool]:
    """Whether a text is complete under a schema."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)

    def check(schema: dict[str, Any], text: str, *, strict: bool) -> bool:
        source = json.dumps(read_schema(schema, strict=strict).schema)
        state = compiler.compile("json_schema", source).start()
        for token in tokenizer.encode(text, add_bos=False):
            if not state.allowed[token]:
                return False
            state.accept(token)
        return state.may_end

    return check


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "boolean"}},
         ['{"y": true}', "{}"], ['{"z": true}', '{"x": 1}']),
        ({"type": "object", "propertyNames": {"type": "string", "pattern": "^x+$"}, "additionalProperties": STRING},
         ['{"xx": "a"}'], ['{"y": "a"}', '{"x": true}']),
        ({"type": "array", "items": {"enum": ["p", "q"]}, "uniqueItems": True}, ["[]", '["q", "p"]'], ['["p", "p"]']),
        ({"type": "array", "items": {"$ref": "#/$defs/c"}, "uniqueItems": True, "minItems": 1,
          "$defs": {"c": {"enum": ["p", "q"]}}}, ['["q"]'], ["[]"]),
        ({"type": "array", "items": STRING, "uniqueItems": True, "maxItems": 1}, ['["q"]'], ['["q", "r"]']),
        ({"uniqueItems": False, "items": {"type": "boolean", "nullable": False}}, ["[true, true]"], ["[1]"]),
        ({"oneOf": [kind("x"), kind("y")]}, ['{"kind": "y"}'], ['{"kind": "z"}']),
        ({"oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}], "$defs": {"x": kind("x"), "y": kind("y")}},
         ['{"kind": "y"}'], ['{"kind": "z"}']),
        ({"oneOf": [{"type": "integer"}, STRING]}, ["1", '"s"'], ["true"]),
        ({"type": "string", "format": "path", "markdownDescription": "m"}, ['"a/b"'], ["1"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_be_enforced_is_and_nothing_is_noted(
    holds: Callable[..., bool], schema: dict, valid: list[str], invalid: list[str]
) -> None:
    for strict in (False, True):
        assert read_schema(schema, strict=strict).notes == ()
        assert all(holds(schema, text, strict=strict) for text in valid)
        assert not any(holds(schema, text, strict=strict) for text in invalid)


@pytest.mark.parametrize(
    ("schema", "note", "valid"),
    [
        ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems at # is not enforced", '["a", "a"]'),
        ({"properties": {"a": {"not": {}}}}, "not at #/properties/a is not enforced", '{"a": 1}'),
        ({"type": "string", "pattern": "^(?!x).*$"}, "pattern at # is not enforced", '"x"'),
        ({"type": "object", "propertyNames": {"minLength": 2}}, "propertyNames at # is not enforced", '{"a": 1}'),
        ({"minProperties": 3, "required": ["a"]}, "minProperties at # is not enforced", '{"a":1,"b":1}'),
        ({"oneOf": [A, B]}, "oneOf at # is taken for anyOf", '{"a": true}'),
        ({"items": [{"type": "string", "maxLenght": 3}]}, "maxLenght at #/items/0 is not enforced", '["abcd"]'),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_left_out_with_a_note_unless_it_is_strict(
    holds: Callable[..., bool], schema: dict, note: str, valid: str
) -> None:
    assert read_schema(schema, strict=False).notes == (note,)
    assert holds(schema, valid, strict=False)
    if "oneOf" not in schema:  # closed, its parts exclude each other
        with pytest.raises(RequestError):
            holds(schema, valid, strict=True)


def test_objects_that_list_properties_have_no_others_unless_they_say_so(holds: Callable[..., bool]) -> None:
    for schema in (A, {"oneOf": [A, B]}, {"type": "array", "items": A}, {**A, "additionalProperties": True}):
        more = '{"a": true, "more": 1}' if "items" not in schema else '[{"a": true, "more": 1}]'
        less = '{"a": true}' if "items" not in schema else '[{"a": true}]'
        for strict in (False, True):
            assert holds(schema, less, strict=strict)
            assert holds(schema, more, strict=strict) == ("additionalProperties" in schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**A, "required": ["a", "b"]},
        {"allOf": [A, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}]},
        {**A, "patternProperties": {"^b$": {"type": "integer"}}},
        {**A, "minProperties": 2},
    ],
    ids=str,
)
def test_objects_that_need_other_properties_have_them_unless_it_is_strict(
    holds: Callable[..., bool], schema: dict
) -> None:
    assert holds(schema, '{"a": true, "b": 1}', strict=False)


def test_numbers_end_where_they_may(holds: Callable[..., bool]) -> None:
    for schema in ({}, {"type": "number"}, {"type": "object"}):
        around = '{"n": %s}' if schema == {"type": "object"} else "%s"
        for number in ("1" * 19, "-0." + "1" * 19, "1" * 12 + "." + "2" * 12 + "e" + "3" * 3):
            assert holds(schema, around % number, strict=False)
        assert not holds(schema, around % ("1" * 40), strict=False)
        assert not holds(schema, around % ("0." + "1" * 40), strict=False)
    assert holds({"type": "string"}, '"' + "1" * 40 + '\\"' + "1" * 40 + '"', strict=False)
    assert holds({"const": 10**30}, str(10**30), strict=False)


def test_a_schema_that_nests_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nests too deeply"):
        read_schema(schema, strict=False)
