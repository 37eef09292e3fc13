"""`Blocks`: an answer as a row of blocks (reasoning, text, calls), as Anthropic's API and /v1/responses write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from latentkv.text.tools import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """A part of an answer.

    Attributes:
        kind: what it is.
        index: of the block within the answer, from 0.
        text: so far; of a call, its arguments as JSON text.
        call_id: of a call.
        name: of the function that a call calls.
    """

    kind: Kind
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Opened:
    """A block begins, without text."""

    block: Block


@dataclass(frozen=True)
class Grown:
    """A block has new text."""

    block: Block
    text: str


@dataclass(frozen=True)
class Closed:
    """A block has ended; `last`: with the whole answer."""

    block: Block
    last: bool


Change = Opened | Grown | Closed


class Blocks:
    """Follows one answer: one block is open at a time, and each new kind of delta opens another.

    Attributes:
        all: blocks so far.
    """

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def push(self, deltas: Sequence[Delta], *, last: bool) -> Iterator[Change]:
        """What the next deltas change; an answer that ends without any is one empty text."""
        for delta in deltas:
            match delta:
                case Content(text):
                    yield from self._grow("text", text)
                case Reasoning(text):
                    yield from self._grow("reasoning", text)
                case ToolCallStart(_, call_id, name):
                    yield from self._next("call", call_id, name)
                case ToolCallArguments(_, text):
                    yield from self._grow("call", text)
        if last and not self.all:
            yield from self._next("text")
        if last:
            yield from self._close(last=True)

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._next(kind)
        if self._open is not None:
            self._open.text += text
            yield Grown(self._open, text)

    def _next(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Change]:
        yield from self._close()
        self._open = Block(kind, len(self.all), call_id=call_id, name=name)
        self.all.append(self._open)
        yield Opened(self._open)

    def _close(self, *, last: bool = False) -> Iterator[Change]:
        if self._open is not None:
            yield Closed(self._open, last)
            self._open = None
