from typing import Any

import pytest
from templates_for_tool_tests import TOOLS

from latentkv.errors import RequestError
from latentkv.text.tools import ToolChoice, read_tool_choice, read_tools


def tool(name: object = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_a_tool_is_a_name_and_the_schema_of_its_arguments() -> None:
    weather, clock = read_tools(TOOLS)
    assert weather.name == "get_weather"
    assert weather.schema_of("days") == {"type": "integer"}
    assert weather.schema_of("else") == {}
    assert clock.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert read_tools(None) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "must be a list"),
        ([tool()] * 200, "at most 128"),
        ([tool("a"), tool("a")], "two tools named 'a'"),
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([tool("a"), tool(5)], r"tools\[1\] must be"),
        ([tool("")], "has the name ''"),
        ([tool("a b")], "has the name 'a b'"),
        ([tool("<a>")], "has the name"),
        ([tool("a" * 300)], "1 to 256 characters"),
        ([tool(parameters=[])], "schema of an object"),
        ([tool(parameters={"type": "string"})], "schema of an object"),
        ([tool(parameters={"properties": []})], "schema of an object"),
        ([tool(parameters={"required": [1]})], "schema of an object"),
    ],
)
def test_malformed_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tools(tools)


def test_a_choice_is_read() -> None:
    tools = read_tools(TOOLS)
    assert read_tool_choice(None, tools) == read_tool_choice("auto", tools) == ToolChoice("auto")
    assert read_tool_choice(None, ()) == read_tool_choice("none", tools) == ToolChoice("none")
    assert read_tool_choice("required", tools) == ToolChoice("required")
    named = {"type": "function", "function": {"name": "get_time"}}
    assert read_tool_choice(named, tools) == ToolChoice("required", "get_time")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("any", "required"),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "function", "name": "get_time"}, {"type": "function", "function": {"name": "get_time"}}),
    ],
)
def test_a_choice_as_others_write_it_means_the_same(theirs: object, ours: object) -> None:
    tools = read_tools(TOOLS)
    assert read_tool_choice(theirs, tools) == read_tool_choice(ours, tools)


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", [], "needs tools"),
        ("any", [], "needs tools"),
        ("some", TOOLS, "must be"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, TOOLS, "allows no tool"),
        ({"type": "function", "function": {"name": "else"}}, TOOLS, "names 'else'"),
        ({"type": "function"}, TOOLS, "must be"),
    ],
)
def test_a_choice_that_cannot_be_is_named(choice: object, tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tool_choice(choice, read_tools(tools))
