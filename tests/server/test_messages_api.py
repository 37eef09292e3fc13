"""/v1/messages and Ollama's paths by plain HTTP; the packages that speak them are in `clients/`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from live_server import NAME, Live, ask

MESSAGES = [{"role": "user", "content": "Where to?"}]
CLAUDE = {"model": NAME, "max_tokens": 8, "messages": MESSAGES, "temperature": 0}
OLLAMA = {"model": NAME, "messages": MESSAGES, "options": {"num_predict": 8, "temperature": 0}}


def chat(live: Live) -> dict[str, Any]:
    return ask(live, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, "temperature": 0})[1]


def test_a_message_is_the_answer_of_a_chat_whole_and_streamed(live: Live) -> None:
    expected = chat(live)["choices"][0]["message"]["content"]
    whole = ask(live, "/v1/messages?beta=true", CLAUDE, anthropic_version="2023-06-01", x_api_key="unused")[1]
    assert whole["content"] == [{"type": "text", "text": expected, "citations": None}]
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 8)
    text = ask(live, "/v1/messages", {**CLAUDE, "stream": True})[1]
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event]
    datas = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [data["type"] for data in datas]
    assert "".join(data["delta"]["text"] for data in datas if data["type"] == "content_block_delta") == expected
    counted = ask(live, "/v1/messages/count_tokens", {"model": NAME, "messages": MESSAGES})[1]
    assert counted["input_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]


def test_an_ollama_chat_is_the_answer_of_a_chat_whole_and_streamed(live: Live) -> None:
    expected = chat(live)["choices"][0]["message"]["content"]
    whole = ask(live, "/api/chat", {**OLLAMA, "stream": False})[1]
    assert (whole["message"]["content"], whole["done_reason"], whole["eval_count"]) == (expected, "length", 8)
    status, text, headers = ask(live, "/api/chat", OLLAMA)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == expected and lines[-1]["done"]
    assert ask(live, "/api/version")[1] == ask(live, "/version")[1]
    assert ask(live, "/api/tags")[1]["models"][0]["name"] == f"{NAME}:latest"
    assert ask(live, "/api/show", {"model": NAME})[1]["capabilities"] == ["completion"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/messages", {**CLAUDE, "model": "x"}, {"type": "not_found_error"}),
        ("/v1/messages", {**CLAUDE, "container": "c"}, {"type": "invalid_request_error"}),
        ("/v1/messages", {"model": NAME}, {"type": "invalid_request_error"}),
        ("/v1/messages", {**CLAUDE, "thinking": {"type": "x"}}, {"type": "invalid_request_error"}),
        ("/api/chat", {**OLLAMA, "model": "x"}, None),
        ("/api/chat", {**OLLAMA, "format": "yaml"}, None),
        ("/api/generate", {"model": NAME, "prompt": "x", "suffix": "y"}, None),
        ("/api/generate", {"model": NAME, "prompt": "x", "options": {"top_p": 7}}, None),
        ("/api/nothing", {}, None),
    ],
)
def test_errors_look_as_each_api_has_them(live: Live, path: str, body: dict, expected: dict | None) -> None:
    status, answer, _ = ask(live, path, body)
    assert status in (400, 404, 405)
    if expected is None:
        assert isinstance(answer["error"], str) and answer["error"].endswith(".")
    else:
        assert answer["type"] == "error" and answer["error"]["type"] == expected["type"]
        assert answer["error"]["message"].endswith(".")


def test_thinking_that_cannot_be_turned_off_is_said(live: Live) -> None:
    status, _, headers = ask(live, "/v1/messages", {**CLAUDE, "thinking": {"type": "disabled"}})
    assert status == 200 and "thinking cannot be turned off" in headers["X-LatentKV-Note"]
