"""What /v1/responses is asked, as a chat: its items as messages, its tools and forms as those of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from latentkv.server.errors import ApiError
from latentkv.server.protocol.responses import TextFormat


def as_messages(instructions: str | None, given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input items as the messages of a chat: calls and reasoning that follow one another are of one message.

    Raises:
        ApiError: an item is none that can be read; the message names it.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for index, item in enumerate(given):
        match item:
            case {"role": str(role), "content": content, **rest} if rest.get("type", "message") == "message":
                if role == "assistant" and messages and _is_unfinished(messages[-1]):
                    messages[-1]["content"] = content
                else:
                    messages.append({"role": role, "content": content})
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                _assistants(messages).setdefault("tool_calls", []).append(
                    {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                )
            case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case {"type": "reasoning"}:
                if text := _reasoning(item):
                    messages.append({"role": "assistant", "content": None, "reasoning_content": text})
            case _:
                raise ApiError(400, f"input[{index}] is {_described(item)}", param="input")
    return messages


def as_chat_tools(tools: Iterable[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools as those of a chat.

    Raises:
        ApiError: a tool is no function; the message names it.
    """
    found: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        match tool:
            case {"type": "function", "name": str(), **rest}:
                own = {key: value for key, value in rest.items() if value is not None}
                found.append({"type": "function", "function": {"name": tool["name"], **own}})
            case {"type": "function", "function": dict()}:
                found.append(tool)
            case _:
                raise no_function(f"tools[{index}]", tool)
    return found


def no_function(where: str, tool: dict[str, Any]) -> ApiError:
    """The refusal of a tool that this server would have to run."""
    kind = str(tool.get("type"))[:80]
    return ApiError(400, f"{where} is of type {kind!a}: this server runs no tools; give functions.", param="tools")


def as_response_format(given: TextFormat | None) -> dict[str, Any] | None:
    """A form as that of a chat.

    Raises:
        ApiError: a schema is missing, or is one too many.
    """
    match given:
        case TextFormat(type="json_schema", schema_=dict() as schema):
            return {"type": "json_schema", "json_schema": {"schema": schema, "strict": given.strict}}
        case TextFormat(type="json_schema"):
            raise ApiError(400, "text.format of type json_schema needs a schema.", param="text")
        case TextFormat(schema_=dict()):
            raise ApiError(400, "text.format: only its type json_schema takes a schema.", param="text")
        case TextFormat(type=kind):
            return {"type": kind}
        case None:
            return None


def _assistants(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of the assistant's that a call belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _is_unfinished(message: dict[str, Any]) -> bool:
    """Whether a message has reasoning only, so far."""
    return message["role"] == "assistant" and message["content"] is None and "tool_calls" not in message


def _reasoning(item: dict[str, Any]) -> str:
    parts = cast("list[Any]", item.get("content") or item.get("summary") or [])
    texts = [cast("dict[str, Any]", part).get("text") for part in parts if isinstance(part, dict)]
    return "\n\n".join(text for text in texts if isinstance(text, str))


def _described(item: dict[str, Any]) -> str:
    kind = str(item.get("type", "message"))[:80]
    if kind in ("message", "function_call", "function_call_output"):
        needed = {"message": "role and content", "function_call": "call_id, name and arguments"}
        return f"a {kind} without what it needs: give {needed.get(kind, 'call_id and output')}."
    return f"of type {kind!a}: this server takes messages, function calls, their outputs and reasoning."
