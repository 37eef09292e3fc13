"""The tools that a request offers and which of them must be called, checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from latentkv.errors import RequestError

MAX_TOOLS = 128
MAX_NAME = 256  # characters
# What no name may hold, because formats end a name there.
NAME = re.compile(r"""[^\s<>{}"]{1,256}""")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of the function.
        parameters: the JSON schema of its arguments, an object's.
    """

    name: str
    parameters: Mapping[str, Any]

    def schema_of(self, argument: str) -> Mapping[str, Any]:
        """The schema of one argument; an empty one, which allows all, where there is none."""
        properties = self.parameters.get("properties")
        schema = cast(dict[str, Any], properties).get(argument) if isinstance(properties, dict) else None
        return cast(dict[str, Any], schema) if isinstance(schema, dict) else {}


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model must call a tool.

    Attributes:
        mode: "none" (it must not), "auto" (it may), "required" (it must).
        name: the one tool that it must call, None for any.
        allowed: names of the tools that it is told of, None for all.
    """

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    allowed: frozenset[str] | None = None

    def allows(self, name: str) -> bool:
        """Whether the model is told of a tool."""
        return self.allowed is None or name in self.allowed

    def offered(self, tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those of tools, as OpenAI's API writes them, that the model is told of."""
        return [tool for tool in tools if self.allows(tool["function"]["name"])]


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Reads tools as OpenAI's API writes them: `{"type": "function", "function": {"name": ..., "parameters": ...}}`.

    Raises:
        RequestError: a tool is malformed, a name comes twice, or there are more than `MAX_TOOLS`.
    """
    if tools is None:
        return ()
    if not isinstance(cast(object, tools), (list, tuple)) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS} functions.")
    read = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool.name for tool in read]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"There are two tools named {name!r}: give each a name of its own.")
    return read


def read_tool_choice(value: object, tools: Sequence[Tool]) -> ToolChoice:
    """Reads `tool_choice` as OpenAI's API writes it; None is "auto" where there are tools, and else "none".

    Raises:
        RequestError: it is malformed, names a tool that is not offered, or requires one where none is.
    """
    match value:
        case None:
            return ToolChoice("auto" if tools else "none")
        case "none" | {"type": "none"}:
            return ToolChoice("none")
        case "auto" | {"type": "auto"}:
            return ToolChoice("auto")
        case "required" | "any" | {"type": "required" | "any"}:  # "any" is Mistral's and Anthropic's word for it
            if not tools:
                raise RequestError('tool_choice "required" needs tools: give at least one.')
            return ToolChoice("required")
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            if all(tool.name != name for tool in tools):
                raise RequestError(f"tool_choice names {name!r}, which is not among the tools.")
            return ToolChoice("required", name)
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*chosen]}} | {
            "type": "allowed_tools",
            "mode": mode,
            "tools": [*chosen],
        }:
            if not chosen:
                raise RequestError("tool_choice allows no tool: name one, or leave the tools out.")
            forced = [read_tool_choice(each, tools).name for each in chosen]
            return replace(read_tool_choice(mode, tools), allowed=frozenset(name for name in forced if name))
        case _:
            raise RequestError(
                'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}.'
            )


def _read_tool(tool: object, where: str) -> Tool:
    match tool:
        case {"type": "function", "function": {"name": str(name)} as function}:
            parameters = cast(dict[str, Any], function).get("parameters")
        case _:
            raise RequestError(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}.')
    if not NAME.fullmatch(name):
        raise RequestError(
            f"{where} has the name {name[:80]!r}: a name has 1 to {MAX_NAME} characters without spaces, <, >, {{, }} "
            'and ".'
        )
    if parameters is None:  # a function without arguments
        parameters = {"properties": {}, "additionalProperties": False}
    match parameters:
        case {"type": str(kind)} if kind != "object":
            valid = False
        case dict():
            schema = cast(dict[str, Any], parameters)
            required = schema.get("required", [])
            valid = isinstance(schema.get("properties", {}), dict) and isinstance(required, list)
            valid = valid and all(isinstance(key, str) for key in cast(list[Any], required))
        case _:
            valid = False
    if not valid:
        raise RequestError(f"{where}: parameters must be the JSON schema of an object.")
    return Tool(name, {"type": "object", **cast(dict[str, Any], parameters)})
