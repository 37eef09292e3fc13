"""A file of requests is read as a whole, and what is wrong with it is said by its line."""

from __future__ import annotations

import json

import pytest

from latentkv.batch.requests import read_requests
from latentkv.errors import RequestError


def line(custom_id="a", url="/v1/completions", method="POST", **body):
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": {"prompt": "It was", **body}})


@pytest.fixture
def written(tmp_path):
    def write(*lines: str):
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


def test_requests_keep_their_order_and_lines_without_text_are_passed_over(written):
    found = read_requests(written(line("b"), "", line("a", stream=True), "\r", line("ü", "/v1/chat/completions")))
    assert list(found) == ["b", "a", "ü"]
    assert [request.streams for request in found.values()] == [False, True, False]
    assert json.loads(found["a"].body) == {"prompt": "It was", "stream": True}


def test_a_request_is_known_by_what_it_asks(written):
    first, again, changed, other = (
        read_requests(written(each))["a"].id
        for each in (line(), line(), line(seed=1), line(url="/v1/chat/completions"))
    )
    assert first == again
    assert len({first, changed, other}) == 3


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", "line 2, is not valid JSON"),
        ('{"custom_id": "b", "custom_id": "b"}', "line 2, is not valid JSON (the key 'custom_id' comes twice"),
        ("[]", "line 2, is no JSON object"),
        ("{}", "line 2, has no custom_id"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/completions"}', "line 2, has no body"),
        (line(""), "line 2, has a custom_id that is no text"),
        (line(7), "line 2, has a custom_id that is no text"),
        (line("b", method="GET"), "line 2, has the method 'GET'"),
        (line("b", "/v1/embeddings"), "line 2, asks '/v1/embeddings', which no batch can: ask /v1/chat/completions"),
        (line("b").replace('{"prompt": "It was"}', '"It was"'), "line 2, has a body that is no JSON object"),
        (line("a"), "line 2, has the custom_id 'a' of line 1"),
    ],
)
def test_what_is_wrong_is_said_by_its_line(written, second, said):
    with pytest.raises(RequestError) as raised:
        read_requests(written(line(), second))
    assert said in str(raised.value)


def test_a_file_without_requests_is_refused(written, tmp_path):
    with pytest.raises(RequestError, match="holds no request: write one a line"):
        read_requests(written("", " "))
    with pytest.raises(RequestError, match=r"has no none\.jsonl"):
        read_requests(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="no regular file"):
        read_requests(tmp_path)
