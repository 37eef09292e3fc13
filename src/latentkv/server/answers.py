"""`Answer`: one choice of a chat on its way, its text read for reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from latentkv.engine import FinishReason
from latentkv.server.protocol import chat as protocol
from latentkv.text.tools import (
    AssistantMessage,
    Delta,
    OutputFormat,
    OutputParser,
    Tool,
    ToolCallArguments,
    ToolCallStart,
    join_deltas,
)


class Answer:
    """Reads the text of one choice as it comes.

    Args:
        format: how the model writes.
        tools: that it may call.
        reasoning_open: whether the prompt ended inside of reasoning.
        parallel: whether it may make several calls; further ones are left out.
    """

    def __init__(self, format: OutputFormat, tools: Sequence[Tool], *, reasoning_open: bool, parallel: bool) -> None:
        self._parser = OutputParser(format, tools, reasoning_open=reasoning_open)
        self._most = None if parallel else 1
        self._deltas: list[Delta] = []

    def push(self, text: str, *, last: bool) -> list[Delta]:
        """What the next text adds; `last` says that there is no more."""
        deltas = self._parser.push(text) if text else []
        if last:
            deltas += self._parser.finish()
        kept = [delta for delta in deltas if not self._is_too_much(delta)]
        self._deltas += kept
        return kept

    def finish_reason(self, reason: FinishReason) -> protocol.FinishReason:
        """Why it ended: for the sake of its calls, if it made any and was not cut short."""
        return "tool_calls" if reason == "stop" and self._parser.num_calls else reason

    @property
    def whole(self) -> AssistantMessage:
        """All of it."""
        return join_deltas(self._deltas)

    def message(self) -> protocol.ChatMessage:
        """All of it, as OpenAI's chats have it."""
        joined = self.whole
        calls = [
            protocol.ToolCall(id=call.id, function=protocol.FunctionCall(name=call.name, arguments=call.arguments))
            for call in joined.tool_calls
        ]
        return protocol.ChatMessage(
            content=joined.content or (None if calls else ""),
            reasoning_content=joined.reasoning or None,
            tool_calls=calls or None,
        )

    def _is_too_much(self, delta: Delta) -> bool:
        calls = isinstance(delta, (ToolCallStart, ToolCallArguments))
        return calls and self._most is not None and delta.index >= self._most
