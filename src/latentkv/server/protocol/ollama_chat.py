"""What Ollama's clients ask, as a chat."""

from __future__ import annotations

import json
from typing import Any

from latentkv.server.errors import ApiError
from latentkv.server.protocol.ollama import OllamaRequest, Options


def as_messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as those of a chat: calls have ids, and their results say which call they are of."""
    messages: list[dict[str, Any]] = []
    unanswered: list[str] = []
    for index, message in enumerate(given):
        own = {key: value for key, value in message.items() if key not in ("thinking", "tool_name", "tool_calls")}
        if message.get("thinking"):
            own["reasoning_content"] = message["thinking"]
        if isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
            own["tool_calls"] = [_call(call, f"call_{index}_{i}") for i, call in enumerate(message["tool_calls"])]
            unanswered = [call["id"] for call in own["tool_calls"]]
        if message.get("role") == "tool":
            own.setdefault("tool_call_id", unanswered.pop(0) if unanswered else "")
            if message.get("tool_name"):
                own["name"] = message["tool_name"]
        messages.append(own)
    return messages


def _call(call: Any, default_id: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": dict() | str() as arguments}, **rest}:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            return {
                "id": str(rest.get("id") or default_id),
                "type": "function",
                "function": {"name": name, "arguments": text},
            }
        case _:
            raise ApiError(400, "A tool call needs a function with a name and arguments.", param="messages")


def as_response_format(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """A form as that of a chat.

    Raises:
        ApiError: it is a word other than "json".
    """
    if given is None:
        return None
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"schema": given}}
    if given != "json":
        raise ApiError(400, f'format={given[:80]!a} is not known: it is "json" or a JSON schema.', param="format")
    return {"type": "json_object"}


def as_effort(body: OllamaRequest) -> str | None:
    """How much a model is to reason."""
    return {True: "medium", False: "none"}[body.think] if isinstance(body.think, bool) else body.think


def sampling(options: Options | None) -> dict[str, Any]:
    """The options that a chat has, too, by its names."""
    return {} if options is None else options.model_dump(exclude={"num_ctx"})
