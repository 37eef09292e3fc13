"""Messages of a conversation as clients send them back, made into what a chat template is given."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from latentkv.server.errors import ApiError

ROLES = frozenset({"system", "user", "assistant", "tool"})
"""That every template is given; others must be written in the template."""
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""That mean something with any template. Of others, those that the template knows reach it."""
_GOES_ON = ("prefix", "partial")
"""Keys of a last message of the assistant's that is to be gone on with, DeepSeek's and Moonshot's."""
_ASKS = {
    **dict.fromkeys(_GOES_ON, "only the last message, if it is the assistant's, can be gone on with"),
    "images": "this server takes text only",
    "audio": "this server takes text only",
    "function_call": "give calls as tool_calls",
}
"""Keys that, with a value, ask for something."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Parts that are text, and the key that it is under."""


def read_messages(
    messages: Sequence[Mapping[str, Any]], template: str, where: str = "messages"
) -> list[dict[str, Any]]:
    """What of each message means something; labels (`id`, `timestamp`) are left out.

    Args:
        messages: as they came.
        template: the source of the chat template that will write them; "" for one that writes any role.
        where: they came from.

    Raises:
        ApiError: a message asks for what cannot be, or is malformed; the message names it.
    """
    last = len(messages) - 1
    return [
        _read(message, template, f"{where}[{index}]", where, _GOES_ON if index == last and goes_on(messages) else ())
        for index, message in enumerate(messages)
    ]


def goes_on(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message says of itself that it is the beginning of the answer."""
    return messages[-1].get("role") == "assistant" and any(messages[-1].get(key) is True for key in _GOES_ON)


def _read(given: Mapping[str, Any], template: str, where: str, param: str, heard: Collection[str]) -> dict[str, Any]:
    for key, remedy in _ASKS.items():
        if given.get(key) and key not in heard and not _writes(template, key):
            raise ApiError(400, f"{where}.{key} is not possible here: {remedy}; leave it out.", param=param)
    message = {key: value for key, value in given.items() if key in _KEYS or _writes(template, key)}
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = role = _known_role(role, template, where, param)
    if given.get("reasoning") and not message.get("reasoning_content") and not _writes(template, "reasoning"):
        message["reasoning_content"] = given["reasoning"]  # as vLLM and OpenRouter call it
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        message["content"] = None if message.get("tool_calls") else given.get("refusal") or ""
    elif isinstance(content, list):
        parts = enumerate(cast("list[Any]", content))
        message["content"] = "".join(_text(part, f"{where}.content[{i}]", param) for i, part in parts)
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_read_call(call) for call in message["tool_calls"]]
    return message


def _known_role(role: str, template: str, where: str, param: str) -> str:
    if role in ROLES or _writes(template, role):
        return role
    if role == "developer":  # OpenAI's newer name of it
        return "system"
    allowed = ", ".join(sorted(ROLES))
    raise ApiError(
        400, f"{where}.role={role[:80]!a} is none that this model's chat template knows: use {allowed}.", param=param
    )


def _writes(template: str, word: str) -> bool:
    """Whether a template has to do with a role or a key."""
    return any(f"{before}{word}{after}" in template for before, after in (("'", "'"), ('"', '"'), (".", "")))


def _text(part: object, where: str, param: str) -> str:
    found = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    text = found.get(_TEXT_PARTS.get(str(found.get("type")), ""))
    if not isinstance(text, str):
        kind = str(found.get("type", type(part).__name__))[:80]
        raise ApiError(
            400, f"{where} is of type {kind!a}: this server takes text only, as {{'type': 'text', 'text': ...}}.",
            param=param,
        )  # fmt: skip
    return text


def _read_call(call: Any) -> Any:
    """A call whose arguments were cut off, with as much of them as is whole."""
    match call:
        case {"function": {"arguments": str(arguments)} as function} if arguments.lstrip().startswith("{"):
            return {**call, "function": {**function, "arguments": mended(arguments)}}
        case _:
            return call


def mended(arguments: str) -> str:
    """The text of a JSON object as it is; if it was cut off, its members that are whole, closed.

    Text that is no beginning of an object stays as it is.
    """
    try:
        json.loads(arguments)
        return arguments
    except (ValueError, RecursionError):
        pass
    for end, closers in reversed(_whole_parts(arguments)):
        candidate = arguments[:end] + closers
        try:
            json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return candidate
    return arguments


def as_object(arguments: str) -> dict[str, Any]:
    """A call's arguments; of those that were cut off, the members that are whole."""
    try:
        found = json.loads(mended(arguments) or "{}")
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


_TRIES = 8  # places where a cut-off text may end, from its end on
_DEPTH = 100  # brackets within each other; what nests deeper is not mended


def _whole_parts(text: str) -> list[tuple[int, str]]:
    """(where a text may end, what closes it there), in order; the last few."""
    found: list[tuple[int, str]] = []
    open_: list[str] = []
    quoted = escaped = False
    for at, sign in enumerate(text):
        if quoted:
            escaped, quoted = sign == "\\" and not escaped, escaped or sign != '"'
            continue
        if sign == '"':
            quoted = True
        elif sign in "{[":
            if len(open_) == _DEPTH:
                return []
            open_.append("}" if sign == "{" else "]")
            found.append((at + 1, "".join(reversed(open_))))
        elif sign in "}]" and open_:
            open_.pop()
            found.append((at + 1, "".join(reversed(open_))))
        elif sign == ",":
            found.append((at, "".join(reversed(open_))))
        if len(found) > _TRIES:
            del found[0]
    return found
