"""A file of answers: whole lines are kept, a line that was cut off is removed, and nothing else is written into."""

from __future__ import annotations

import json

import pytest

from latentkv.batch.answers import AnswerFile, read_answers
from latentkv.batch.requests import BatchRequest
from latentkv.errors import RequestError

REQUESTS = {name: BatchRequest(name, "/v1/completions", b'{"prompt": "It was"}', False) for name in ("a", "b", "c")}


@pytest.fixture
def asked_in(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("{}")
    return path


@pytest.fixture
def path(tmp_path, asked_in):
    """A file with the answers of a and b, the second of which failed."""
    path = tmp_path / "out.jsonl"
    out = AnswerFile(path, read_answers(path, REQUESTS, asked_in=asked_in))
    out.add(REQUESTS["a"], 200, "1", {"text": "\u2028 ü"})
    out.add(REQUESTS["b"], 400, "2", {"error": {}})
    out.close()
    return path


def test_lines_are_as_openai_writes_them(path):
    first, second = map(json.loads, path.read_bytes().splitlines())
    assert first == {
        "id": REQUESTS["a"].id,
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "1", "body": {"text": "\u2028 ü"}},
        "error": None,
    }
    assert second["response"]["status_code"] == 400


@pytest.mark.parametrize("cut", [1, 5, 30, 70])
def test_a_line_that_was_cut_off_is_answered_again(path, asked_in, cut):
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[0][:cut])
    answered = read_answers(path, REQUESTS, asked_in=asked_in)
    assert (answered.custom_ids, answered.failed, answered.whole_bytes) == ({"a", "b"}, 1, len(whole))
    out = AnswerFile(path, answered)
    assert path.read_bytes() == whole
    out.add(REQUESTS["c"], 200, "3", {})
    out.close()
    assert read_answers(path, REQUESTS, asked_in=asked_in).custom_ids == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"A diary.", "ends with something else than an answer"),
        (b"A diary.\n", "line 1, is not valid JSON"),
        (b"{}\n", "line 1, is no answer of a batch"),
        (b"[1]\n", "line 1, is no answer of a batch"),
        (b'{"custom_id": "a", "response": null}\n', "line 1, is no answer of a batch"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, asked_in, content, said):
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=said):
        read_answers(path, REQUESTS, asked_in=asked_in)
    assert path.read_bytes() == content


def test_answers_to_other_requests_are_refused(path, asked_in):
    changed = {**REQUESTS, "b": BatchRequest("b", "/v1/completions", b'{"prompt": "It is"}', False)}
    with pytest.raises(RequestError, match="line 2, answers another request than that which is now called 'b'"):
        read_answers(path, changed, asked_in=asked_in)
    with pytest.raises(RequestError, match="line 1, answers 'a', which the requests do not ask"):
        read_answers(path, {"b": REQUESTS["b"]}, asked_in=asked_in)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] * 2)
    with pytest.raises(RequestError, match="line 2, answers 'a' for the second time"):
        read_answers(path, REQUESTS, asked_in=asked_in)


def test_a_file_that_cannot_be_written_is_refused(asked_in, tmp_path):
    with pytest.raises(RequestError, match="is the file of the requests"):
        read_answers(asked_in, REQUESTS, asked_in=asked_in)
    with pytest.raises(RequestError, match="no regular file"):
        read_answers(tmp_path, REQUESTS, asked_in=asked_in)
    with pytest.raises(RequestError, match="is a file, not a folder"):
        read_answers(asked_in / "out.jsonl", REQUESTS, asked_in=asked_in)


def test_two_runs_do_not_write_into_one_file(path, asked_in):
    answered = read_answers(path, REQUESTS, asked_in=asked_in)
    first = AnswerFile(path, answered)
    with pytest.raises(RequestError, match="is written by another run"):
        AnswerFile(path, answered)
    first.add(REQUESTS["c"], 200, "3", {})
    first.close()
    with pytest.raises(RequestError, match="is written by another run"):  # which has ended, but c is answered
        AnswerFile(path, answered)
    assert read_answers(path, REQUESTS, asked_in=asked_in).custom_ids == {"a", "b", "c"}
