"""docs/reliability.md, line 19: what is in a body, and how much, holds nobody up."""

from __future__ import annotations

import http.client
import json
import random
import threading

import pytest
from starlette.exceptions import HTTPException

from latentkv.server import bodies
from latentkv.server.bodies import MAX_LISTS, MAX_NAMES, MAX_TEXT, MAX_VALUES, SHORT, SMALL, WINDOW, parse
from live_server import Live


def padded(text: str) -> bytes:
    """More than is read at once."""
    return text.encode() + b" " * (SMALL + 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * (MAX_LISTS + 1), "lists and objects"),
        ("[" + "{}," * MAX_LISTS + "1]", "lists and objects"),
        ("{" + '"a":1,' * (MAX_NAMES + 1) + "}", "names"),
        ("[" + "1," * (MAX_VALUES + 1) + "1]", "values"),
        ('["' + "\\\\" * 5 + '"' + ",1" * (MAX_VALUES + 1) + "]", "values"),
    ],
)
def test_line_19_a_body_of_too_many_values_is_refused_before_it_is_parsed(text: str, what: str, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "_decoded", lambda body: pytest.fail("it is parsed"))
    with pytest.raises(HTTPException, match=rf"The body holds more than [\d,]+ {what}: send less"):
        parse(padded(text))


def test_what_strings_hold_is_counted_as_nothing_wherever_a_window_ends() -> None:
    noise = random.Random(0)
    hard = "".join(noise.choices('[{,:"\\', k=WINDOW + 999))
    for shift in range(2):
        given = {"a" * shift: hard, "b": ["\\", '\\"', hard]}
        assert parse(json.dumps(given).encode()) == given


def test_a_text_may_be_as_long_as_texts_may_be() -> None:
    assert parse(json.dumps({"a": "x" * MAX_TEXT}).encode()) == {"a": "x" * MAX_TEXT}
    assert parse(json.dumps(["x" * (MAX_TEXT // 2)] * 3).encode()) == ["x" * (MAX_TEXT // 2)] * 3
    with pytest.raises(HTTPException, match="a text of more than 8 MiB") as caught:
        parse(json.dumps({"a": "x" * (MAX_TEXT + 2 * WINDOW)}).encode())
    assert caught.value.status_code == 400


def test_large_bodies_say_what_small_ones_say() -> None:
    given = {"a": [1, -2.5e-3, True, None, "ü😀\ud800\n", {"b": [[]]}], "c": "x" * SMALL}
    for text in (json.dumps(given), json.dumps(given, indent=1)):
        assert parse(text.encode()) == given
    assert parse(json.dumps(given).encode("utf-16")) == given


@pytest.mark.parametrize("pad", [b"", b" " * (SMALL + 1)])
@pytest.mark.parametrize(
    ("body", "message"),
    [(b"[" * 5000, "nest too deeply"), (b'"\xff"', "not valid UTF-8"), (b"9" * 5000, "too many digits")],
)
def test_what_cannot_be_read_is_one_sentence(body: bytes, message: str, pad: bytes) -> None:
    with pytest.raises(HTTPException, match=message) as caught:
        parse(body + pad)
    assert caught.value.status_code == 400


def test_line_19_all_bodies_but_short_ones_are_parsed_beside_the_event_loop(live: Live, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(bodies, "parse", lambda *given: seen.append(threading.current_thread().name) or parse(*given))
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=30)
    for path in ("/tokenize", "/v1/completions", "/v1/chat/completions", "/v1/responses"):
        for body in (b"{}", b" " * SHORT + b"{}"):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert (answer.status, answer.read() != b"") == (400, True)
    connection.close()
    assert [name.startswith("latentkv-bodies") for name in seen] == [False, True] * 4
