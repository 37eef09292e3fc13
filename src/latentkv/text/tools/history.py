"""Earlier tool calls in a conversation, written the way that a chat template wants them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from latentkv.errors import TemplateLimitError, TokenizerError

Message = dict[str, Any]
_NAME, _ID, _KEY, _VALUE = "probename", "probecall", "probekey", "probevalue"  # an id of 9 letters suits Mistral


@dataclass(frozen=True)
class CallStyle:
    """What a template wants of an assistant's message with tool calls.

    Attributes:
        arguments: "object", or "text" where the template only joins it to other text.
        blank: the content where there is none: "", or None where the template asks for that.
        by_id: whether calls are written by their id alone, as Kimi-K2's template does, so that the id has to hold the
            function's name.
    """

    arguments: Literal["object", "text"] = "object"
    blank: Literal[""] | None = ""
    by_id: bool = False


def find_style(render: Callable[[list[Message]], str]) -> CallStyle:
    """Finds the style of a template by trying: the first in which the arguments of a call come out undamaged.

    Args:
        render: writes a conversation; a TokenizerError means that the template does not take it.

    Returns:
        The style; an object and "" where no style works, so that the template's own error is shown later.

    Raises:
        TemplateLimitError: it takes too much to find out.
    """
    for blank in ("", None):
        for arguments in ("object", "text"):
            try:
                text = render(_probe(arguments, blank))
            except TemplateLimitError:
                raise
            except TokenizerError:
                continue
            damaged = f"{{'{_KEY}'" in text or f'\\"{_KEY}' in text or (blank is None and "None" in text)
            if _KEY in text and _VALUE in text and not damaged:
                return CallStyle(arguments, blank, by_id=_ID in text and _NAME not in text)
    return CallStyle()


def with_style(messages: Sequence[Message], style: CallStyle) -> list[Message]:
    """The messages with every tool call in a template's style.

    Raises:
        TokenizerError: a call is malformed.
    """
    out: list[Message] = []
    ids: dict[str, str] = {}
    number = 0
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [_with_style(call, style, f"Message {index + 1}") for call in message["tool_calls"]]
            for call in calls if style.by_id else ():
                name, given = call["function"]["name"], str(call.get("id"))
                if not re.fullmatch(rf"functions\.{re.escape(name)}:\d+", given):
                    call["id"] = ids[given] = f"functions.{name}:{number}"
                number += 1
            message = {**message, "tool_calls": calls, "content": message.get("content") or style.blank}
        elif (call_id := str(message.get("tool_call_id"))) in ids:
            message = {**message, "tool_call_id": ids[call_id]}
        out.append(message)
    return out


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether any message holds tool calls."""
    return any(message.get("tool_calls") for message in messages)


def _probe(arguments: Literal["object", "text"], blank: Literal[""] | None) -> list[Message]:
    value = {_KEY: _VALUE}
    function = {"name": _NAME, "arguments": value if arguments == "object" else json.dumps(value)}
    calls = [{"id": _ID, "type": "function", "function": function}]
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": blank, "tool_calls": calls},
        {"role": "tool", "tool_call_id": _ID, "content": "b"},
    ]


def _with_style(call: object, style: CallStyle, where: str) -> Message:
    match call:
        case {"function": {"name": str(name), "arguments": arguments} as function} if name:
            parsed = _arguments(arguments, name, where)
        case _:
            raise TokenizerError(
                f'{where}: a tool call must be {{"id": ..., "type": "function", "function": {{"name": ..., '
                '"arguments": ...}}.'
            )
    written = arguments if isinstance(arguments, str) and arguments.strip() else json.dumps(parsed, ensure_ascii=False)
    function = {**cast(Message, function), "arguments": parsed if style.arguments == "object" else written}
    return {"type": "function", **cast(Message, call), "function": function}


def _arguments(arguments: object, name: str, where: str) -> Message:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise TokenizerError(f"{where}: the arguments of the call of {name!r} are not a JSON object.")
    return cast(Message, arguments)
