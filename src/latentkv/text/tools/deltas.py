"""What a model's output is made of, piece by piece: the increments of an OpenAI-style assistant message."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; its arguments follow.

    Attributes:
        index: of the call within the message, from 0.
        id: unique within the message; the model's own where its format writes one.
        name: of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments, which are one JSON object when all are joined."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCallStart | ToolCallArguments


@dataclass(frozen=True)
class ToolCall:
    """One call, whole.

    Attributes:
        id: see `ToolCallStart`.
        name: of the function.
        arguments: JSON text; it does not parse where the output ended, or broke, inside of the call.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class AssistantMessage:
    """All deltas of one output, joined."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def join_deltas(deltas: Iterable[Delta]) -> AssistantMessage:
    """Puts the deltas of one output together."""
    content: list[str] = []
    reasoning: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        match delta:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStart():
                starts.append(delta)
            case ToolCallArguments(index, text):
                arguments.setdefault(index, []).append(text)
    calls = (ToolCall(start.id, start.name, "".join(arguments.get(start.index, ()))) for start in starts)
    return AssistantMessage("".join(content), "".join(reasoning), tuple(calls))


def new_call_id() -> str:
    """An id for a call whose format writes none."""
    return f"call_{secrets.token_hex(12)}"
