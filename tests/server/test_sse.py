"""What stands in an event, however it was written."""

from __future__ import annotations

import json

import pytest

from latentkv.server.protocol.completions import CompletionChoice, CompletionResponse
from latentkv.server.sse import HOLE, TextEvent, data


def event(text: str, *, model: str = "small") -> str:
    choices = [CompletionChoice(index=3, text=text)]
    return data(CompletionResponse(id="cmpl-1", created=7, model=model, choices=choices))


@pytest.mark.parametrize("text", ["", "word", 'a "quoted" \\ line\nand\u2028more', "\ud83d", "😀", "null"])
def test_an_event_written_around_its_text_is_the_one_written_whole(text: str) -> None:
    assert TextEvent(event(HOLE)).of(text) == event(text)


def test_what_surrounds_the_text_may_look_like_it() -> None:
    template = TextEvent(event(HOLE, model='"text": "word"'))
    fields = json.loads(template.of("word").removeprefix("data: "))
    assert fields["model"] == '"text": "word"' and fields["choices"][0]["text"] == "word"
