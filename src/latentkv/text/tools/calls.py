"""Readers of one tool call, from behind its opening marker on."""

import re
from collections.abc import Callable, Generator, Sequence

from latentkv.text.tools.deltas import new_call_id
from latentkv.text.tools.formats import CallFormat, JsonArguments, JsonCall, TaggedArguments
from latentkv.text.tools.json_text import JsonReader, is_json
from latentkv.text.tools.sink import Sink
from latentkv.text.tools.source import EndedError, MalformedError, Source, Waiting
from latentkv.text.tools.specs import MAX_NAME, NAME, Tool
from latentkv.text.tools.values import as_string, is_text, value_as_json

_NUMBERED = re.compile(r"(.+):\d+", re.DOTALL)
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")  # written by some models, and of no use


class CallReader:
    """Reads calls of one format.

    A call is started in the sink once its name is known and its arguments have begun, or are known to be none; from
    then on they are passed on as they come. All text of a call that did not become a delta stays in the source's
    memory.

    Attributes:
        openers: markers with which calls begin.
        bare: whether a call may begin without one, with a brace.

    Args:
        format: how calls are written.
        tools: the tools of the request.
        source: where text comes from.
        sink: where deltas go to.
    """

    def __init__(self, format: CallFormat, tools: Sequence[Tool], source: Source, sink: Sink) -> None:
        self.openers = (format.section[0], format.open) if format.section else (format.open,)
        self.bare = isinstance(format.body, JsonCall) and format.body.bare
        self._format = format
        self._tools = {tool.name: tool for tool in tools}
        self._source = source
        self._sink = sink
        self._ids: set[str] = set()

    def read(self, opener: str = "") -> Waiting:
        """Reads all calls that follow each other.

        Args:
            opener: the marker that was taken, "" before a bare call.

        Raises:
            MalformedError: this is not a call, or it broke.
        """
        if self._format.section and opener == self._format.section[0]:
            yield from self._source.expect(self._format.open)
        yield from self._call()
        while (yield from self._another()):
            yield from self._call()

    def _call(self) -> Waiting:
        match self._format.body:
            case JsonArguments() as body:
                yield from self._json_arguments(body)
                yield from self._close(body.after.strip(), self._format.close)
            case JsonCall() as body:
                yield from self._json_call(body)
                yield from self._close(self._format.close)
            case TaggedArguments() as body:
                yield from self._tagged(body)
        self._source.forget()

    def _another(self) -> Generator[None, None, bool]:
        """Whether one more call follows; its opening marker is taken then."""
        section = self._format.section
        try:
            if section:
                return (yield from self._source.expect(self._format.open, section[1])) == self._format.open
            if not self.bare:
                return False
            following = yield from self._source.next_character()
        except MalformedError:
            return False
        if following == ";":
            self._source.take(1)
            following = yield from self._source.next_character()
            if following != "{":
                raise MalformedError
        return following == "{"

    def _close(self, *markers: str) -> Waiting:
        """What follows a complete call; an end of the text, or an end token that is not text, serves as well."""
        try:
            for marker in markers:
                if marker:
                    yield from self._source.expect(marker)
        except EndedError:
            return

    def _json_arguments(self, body: JsonArguments) -> Waiting:
        end = body.after_name.strip()
        header = yield from self._source.text_until((end,), (*self.openers, self._format.close), 2 * MAX_NAME)
        yield from self._source.expect(end)
        header, call_id = header.strip(), ""
        name = header.removeprefix(body.before_name)
        if body.numbered and (numbered := _NUMBERED.fullmatch(name)):
            name, call_id = numbered.group(1), header
        if (yield from self._source.next_character()) != "{":
            raise MalformedError
        self._start(name, call_id)
        yield from self._json(self._give)

    def _json_call(self, body: JsonCall) -> Waiting:
        name = ""
        early: list[str] | None = None  # arguments that came before the name
        started = False
        separator = yield from self._source.expect("{")
        while separator != "}":
            key = yield from self._string()
            yield from self._source.expect(":")
            if key == "name" and not name:
                name = yield from self._string()
                if body.bare and name not in self._tools:
                    raise MalformedError
            elif key in _ARGUMENT_KEYS and not started and early is None:
                if (yield from self._source.next_character()) != "{":
                    raise MalformedError
                if name:
                    self._start(name)
                    started = True
                    yield from self._json(self._give)
                else:
                    early = []
                    yield from self._json(early.append)
            elif key in _OTHER_KEYS:
                yield from self._json(lambda _: None)
            else:
                raise MalformedError
            separator = yield from self._source.expect(",", "}")
        if not started:
            self._start(name)
            self._give("{}" if early is None else "".join(early))

    def _tagged(self, body: TaggedArguments) -> Waiting:
        source, close = self._source, self._format.close
        others = (*self.openers, body.value_close)
        if body.name_end:
            name = yield from source.text_until((body.name_end,), others, MAX_NAME)
            yield from source.expect(body.name_end)
        else:
            name = yield from source.text_until((body.key_open, close), others, MAX_NAME)
        name = name.strip()
        self._start(name)
        tool = self._tools.get(name)
        before = "{"
        while (yield from source.expect(body.key_open, close)) != close:
            key = yield from source.text_until((body.key_close,), others, MAX_NAME)
            yield from source.expect(body.key_close)
            opening = yield from source.expect(*body.value_opens)
            kind, schema = body.value_opens[opening], tool.schema_of(key) if tool else {}
            before += f"{as_string(key)}: "
            if kind == "text" or (kind == "schema" and is_text(schema)):
                yield from self._text_value(before, body.value_close)
            else:
                parts: list[str] = []
                yield from self._until(body.value_close, parts.append)
                text = "".join(parts)
                written = kind == "json" and is_json(text.strip())
                self._give(before + (text.strip() if written else value_as_json(text, schema)))
            before = ", "
        self._give("{}" if before == "{" else "}")

    def _text_value(self, before: str, close: str) -> Waiting:
        """A string, passed on as it comes."""
        self._give(f'{before}"')
        yield from self._until(close, lambda text: self._give(as_string(text)[1:-1]))
        self._give('"')

    def _until(self, close: str, write: Callable[[str], None]) -> Waiting:
        while True:
            text, marker = self._source.take_until((close,))
            write(text)
            if marker is not None:
                self._source.take(len(marker))
                return
            if self._source.ended:
                raise EndedError
            yield

    def _start(self, name: str, call_id: str = "") -> None:
        if not NAME.fullmatch(name):
            raise MalformedError
        if not call_id or call_id in self._ids:
            call_id = new_call_id()
        self._ids.add(call_id)
        self._sink.start_call(call_id, name)
        self._source.forget()

    def _string(self) -> Generator[None, None, str]:
        """A short string, a key or a name, without escapes."""
        yield from self._source.expect('"')
        text = yield from self._source.text_until(('"',), ("\\", "\n"), MAX_NAME)
        self._source.take(1)
        return text

    def _give(self, arguments: str) -> None:
        """Passes arguments on: what was taken for them is settled."""
        self._sink.arguments(arguments)
        self._source.forget()

    def _json(self, write: Callable[[str], None]) -> Waiting:
        """One JSON value, written as it comes."""
        reader, source = JsonReader(), self._source
        while True:
            text, at = source.peek()
            end, out = reader.feed(text, at)
            source.take(end - at)
            write(out)
            if reader.done:
                return
            if reader.broken:
                raise MalformedError
            if source.ended:
                raise EndedError
            yield
