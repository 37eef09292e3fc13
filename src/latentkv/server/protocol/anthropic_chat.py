"""What Anthropic's clients ask, as a chat: their blocks as messages, their tools and thinking as a chat has them."""

from __future__ import annotations

import json
from typing import Any, cast

from latentkv.server.errors import ApiError
from latentkv.server.protocol.anthropic import Blocks, CountRequest
from latentkv.server.protocol.reasoning import can_be_switched

_LEVELS = ("low", "medium", "high", "xhigh", "max")


def as_messages(body: CountRequest) -> list[dict[str, Any]]:
    """Its messages as those of a chat.

    Raises:
        ApiError: a block is none that can be read; the message names it.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        match message:
            case {"role": "user", "content": str() | list() as content}:
                messages += _of_user(cast("Blocks", content), f"{where}.content")
            case {"role": "assistant", "content": str() | list() as content}:
                messages.append(_of_assistant(cast("Blocks", content), f"{where}.content"))
            case {"role": "system", "content": str() | list() as content}:
                messages.append({"role": "system", "content": _text(cast("Blocks", content), f"{where}.content")})
            case _:
                raise ApiError(400, f"{where} needs a role, user or assistant, and content.", param="messages")
    return messages


def goes_on(body: CountRequest) -> bool:
    """Whether the answer is to go on with the last message."""
    return body.messages[-1].get("role") == "assistant"


def as_chat_tools(body: CountRequest) -> list[dict[str, Any]]:
    """Its tools as those of a chat.

    Raises:
        ApiError: a tool is not one that the client runs; the message names it.
    """
    found: list[dict[str, Any]] = []
    for index, tool in enumerate(body.tools or ()):
        match tool:
            case {"name": str(name), "input_schema": dict() as schema, **rest} if rest.get("type") in (None, "custom"):
                described = {"description": rest["description"]} if isinstance(rest.get("description"), str) else {}
                function = {"name": name, **described, "parameters": cast("dict[str, Any]", schema)}
                found.append({"type": "function", "function": function})
            case _:
                kind = str(tool.get("type", "custom"))[:80]
                raise ApiError(
                    400,
                    f"tools[{index}] is of type {kind!a}: this server runs no tools; give a name and an input_schema.",
                    param="tools",
                )
    return found


def as_tool_choice(body: CountRequest) -> str | dict[str, Any] | None:
    """Its choice as that of a chat.

    Raises:
        ApiError: it is malformed.
    """
    match body.tool_choice:
        case None:
            return None
        case {"type": "auto" | "none" as kind}:
            return kind
        case {"type": "any"}:
            return "required"
        case {"type": "tool", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case _:
            raise ApiError(
                400, 'tool_choice must be {"type": "auto"}, "any", "none", or "tool" with a name.', param="tool_choice"
            )


def as_effort(body: CountRequest, template: str, notes: list[str]) -> str | None:
    """How much it asks a model to reason; what a template cannot be told is added to `notes`.

    Raises:
        ApiError: it is malformed.
    """
    effort = (body.output_config or {}).get("effort")
    if effort is not None and effort not in _LEVELS:
        raise ApiError(400, f"output_config.effort must be one of {', '.join(_LEVELS)}.", param="output_config")
    match body.thinking:
        case None:
            return effort
        case {"type": "disabled"}:
            if can_be_switched(template):
                return "none"
            notes.append("thinking cannot be turned off by the chat template")
            return None
        case {"type": "enabled" | "adaptive" | "between_tools", **rest}:
            if "budget_tokens" in rest:
                notes.append("thinking.budget_tokens is not enforced")
            return effort or "high"
        case _:
            raise ApiError(400, 'thinking must be of type "enabled", "adaptive" or "disabled".', param="thinking")


def as_response_format(body: CountRequest) -> dict[str, Any] | None:
    """The form that it asks for, as that of a chat.

    Raises:
        ApiError: it is malformed.
    """
    match (body.output_config or {}).get("format"):
        case None:
            return None
        case {"type": "json_schema", "schema": dict() as schema}:
            return {"type": "json_schema", "json_schema": {"schema": cast("dict[str, Any]", schema), "strict": True}}
        case _:
            raise ApiError(
                400, 'output_config.format must be {"type": "json_schema", "schema": {...}}.', param="output_config"
            )


def _of_user(content: Blocks, where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before the text that comes with them."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        match block:
            case {"type": "tool_result", "tool_use_id": str(call_id), **rest}:
                text = _text(rest.get("content") or "", f"{where}[{index}].content")
                results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case _:
                others.append(block)
    text = _text(others, where)
    return [*results, {"role": "user", "content": text}] if others or not results else results


def _of_assistant(content: Blocks, where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if isinstance(content, str):
        return message
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    others: list[dict[str, Any]] = []
    for block in content:
        match block:
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict() as given}:
                function = {"name": name, "arguments": json.dumps(given)}
                calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass  # nobody here can read it
            case _:
                others.append(block)
    text = _text(others, where)
    message["content"] = text if text or not calls else None
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: Blocks, where: str) -> str:
    """The text of blocks."""
    if isinstance(content, str):
        return content
    parts: list[str] = []
    for index, block in enumerate(content):
        match block:
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case {"type": "document", "source": {"type": "text", "data": str(text)}}:
                parts.append(text)
            case _:
                kind = str(block.get("type"))[:80] if isinstance(cast(object, block), dict) else type(block).__name__
                raise ApiError(
                    400, f"{where}[{index}] is a block of type {kind!a}, which is not read here: send text.",
                    param=where.partition("[")[0],
                )  # fmt: skip
    return "".join(parts)
