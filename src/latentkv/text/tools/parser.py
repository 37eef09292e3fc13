"""A model's text, as it comes, into the deltas of an assistant message."""

from collections.abc import Generator, Sequence

from latentkv.text.tools.calls import CallReader
from latentkv.text.tools.deltas import Delta
from latentkv.text.tools.formats import OutputFormat, ReasoningTags
from latentkv.text.tools.sink import Sink
from latentkv.text.tools.source import EndedError, MalformedError, Source, Waiting
from latentkv.text.tools.specs import Tool


class OutputParser:
    """Separates reasoning, answer and tool calls in the text of one output.

    All deltas joined are the same however the text is cut into pushes, and each character costs the same however long
    the text is. Held back is what may still become a marker; whitespace that may stand before one; a call until its
    name is known; and an argument that comes as bare text, is not a string by its schema, and so has to be converted.

    Reasoning is what the format's tags enclose at the beginning of the output, or what comes before the closing tag
    where the prompt ended in the opening one. Whitespace around reasoning and calls is dropped.

    Nothing that the model says is lost. Text that begins like a call and is none (no name, arguments that are no
    object, no JSON) comes out as content as it was written, markers included. A call that breaks, or is cut off, after
    it was started keeps the arguments that were given, which then do not parse, so that nobody runs it by mistake; the
    text from the break on comes out as content. What follows is read as usual: later calls are found.

    Args:
        format: what to look for, from `choose_format`.
        tools: the tools of the request. Without any, or with `tool_choice` "none", calls are not looked for.
        reasoning_open: whether the output begins inside of reasoning; see `reasoning_is_open`.
    """

    def __init__(self, format: OutputFormat, tools: Sequence[Tool] = (), *, reasoning_open: bool = False) -> None:
        calls = format.calls if tools else None
        self._tags = format.reasoning
        self._reasoning_open = reasoning_open
        self._source = Source()
        self._sink = Sink(hold_space=calls is not None)
        self._reader = CallReader(calls, tools, self._source, self._sink) if calls else None
        self._openers = self._reader.openers if self._reader else ()
        self._ends = self._openers if calls and calls.ends_reasoning else ()
        self._run = self._output()
        next(self._run)

    @property
    def num_calls(self) -> int:
        """How many calls have started."""
        return self._sink.num_calls

    def push(self, text: str) -> list[Delta]:
        """Takes the next text and returns what it makes certain."""
        self._source.push(text)
        next(self._run)
        return self._sink.take()

    def finish(self) -> list[Delta]:
        """Returns what was held back. The parser is then at an end."""
        self._source.ended = True
        for _ in self._run:
            pass
        return self._sink.take()

    def _output(self) -> Waiting:
        yield
        if self._tags:
            yield from self._reasoning(self._tags)
        if self._reader and self._reader.bare and (yield from self._begins_with_brace()):
            yield from self._calls(self._reader)
        while not self._source.exhausted:
            text, opener = self._source.take_until(self._openers)
            self._sink.content(text)
            self._source.forget()
            if opener is not None and self._reader:
                self._source.take(len(opener))
                yield from self._calls(self._reader, opener)
            elif not self._source.ended:
                yield
        self._sink.finish()

    def _reasoning(self, tags: ReasoningTags) -> Waiting:
        if not self._reasoning_open:
            try:
                yield from self._source.expect(tags.open)
            except MalformedError:
                self._give_back()
                return
        self._sink.begin_reasoning()
        while True:
            text, marker = self._source.take_until((tags.close, *self._ends))
            self._sink.reasoning(text)
            if marker == tags.close:
                self._source.take(len(tags.close))
            if marker is not None:
                self._sink.end_reasoning()
            self._source.forget()
            if marker is not None or self._source.ended:
                return
            yield

    def _begins_with_brace(self) -> Generator[None, None, bool]:
        try:
            if (yield from self._source.next_character()) == "{":
                return True
        except EndedError:
            pass
        self._give_back()
        return False

    def _calls(self, reader: CallReader, opener: str = "") -> Waiting:
        try:
            yield from reader.read(opener)
        except MalformedError:
            self._give_back()

    def _give_back(self) -> None:
        """Text that turned out to be no part of a call is content."""
        self._sink.content(self._source.taken())
        self._source.forget()
