"""The real `ollama` client against a live server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentkv import SamplingParams
from live_server import NAME, Live, ask

ollama = pytest.importorskip("ollama", reason="ollama is not installed (extra clients)")
pytestmark = pytest.mark.clients

MESSAGES = [{"role": "user", "content": "Where to?"}]
OPTIONS = {"temperature": 0, "num_predict": 16, "num_ctx": 2048, "num_thread": 4, "repeat_penalty": 1.0}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sail",
            "description": "Sail somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"type": "string", "enum": ["Nantucket", "Bergen"]}},
                "required": ["to"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(with_tools: Live) -> Any:
    return ollama.Client(host=with_tools.url, timeout=60)


def chat(live: Live, messages: list[Any], **more: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 16, **more}
    status, answer, _ = ask(live, "/v1/chat/completions", body)
    assert status == 200, answer
    return answer


def test_models_are_listed_and_shown(client: Any, with_tools: Live) -> None:
    for listed in (client.list(), client.ps()):
        (model,) = listed.models
        assert model.model == f"{NAME}:latest" and model.size > 1_000_000
    shown = client.show(NAME)
    assert {"completion", "tools"} == set(shown.capabilities)
    assert shown.details.format == "safetensors"
    assert shown.modelinfo[f"{shown.details.family}.context_length"] == with_tools.llm.max_context
    with pytest.raises(ollama.ResponseError, match="no model 'other' here"):
        client.show("other")


@pytest.mark.parametrize("name", [NAME, f"{NAME}:latest"])
def test_a_chat_is_that_of_the_other_api(client: Any, with_tools: Live, name: str) -> None:
    expected = chat(with_tools, MESSAGES)
    got = client.chat(model=name, messages=MESSAGES, options=OPTIONS, keep_alive="5m")
    assert got.message.content == expected["choices"][0]["message"]["content"]
    assert (got.done, got.done_reason) == (True, "length")
    assert (got.prompt_eval_count, got.eval_count) == (expected["usage"]["prompt_tokens"], 16)
    assert got.total_duration >= got.eval_duration > 0
    parts = list(client.chat(model=name, messages=MESSAGES, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == got.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > 3
    assert parts[-1].eval_count == 16


def test_a_prompt_is_answered_or_gone_on_with(client: Any, with_tools: Live) -> None:
    got = client.generate(model=NAME, prompt="Where to?", system="Be brief.", options=OPTIONS)
    expected = chat(with_tools, [{"role": "system", "content": "Be brief."}, *MESSAGES])
    assert got.response == expected["choices"][0]["message"]["content"]
    raw = client.generate(model=NAME, prompt="It was a", raw=True, options=OPTIONS)
    assert raw.response == with_tools.llm.generate("It was a", SamplingParams(max_tokens=16, temperature=0))[0].text
    parts = list(client.generate(model=NAME, prompt="It was a", raw=True, options=OPTIONS, stream=True))
    assert "".join(part.response for part in parts) == raw.response and parts[-1].done
    assert client.generate(model=NAME).done_reason == "load"
    assert client.chat(model=NAME).done_reason == "load"


def test_answers_are_held_to_json(client: Any) -> None:
    schema = {"type": "object", "properties": {"day": {"enum": ["today", "tomorrow"]}}, "required": ["day"],
              "additionalProperties": False}  # fmt: skip
    options = {**OPTIONS, "num_predict": 60}
    got = client.chat(model=NAME, messages=MESSAGES, format=schema, options=options)
    assert json.loads(got.message.content)["day"] in ("today", "tomorrow")
    got = client.generate(model=NAME, prompt="Where to?", format="json", options={**options, "num_predict": 8})
    assert got.response.lstrip().startswith("{")


def test_tools_are_told_and_results_are_read(client: Any, with_tools: Live) -> None:
    function = {"name": "sail", "arguments": {"to": "Bergen"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "Arrived.", "tool_name": "sail"},
    ]
    got = client.chat(model=NAME, messages=history, tools=TOOLS, options=OPTIONS)
    call = {"id": "c", "type": "function", "function": {**function, "arguments": '{"to": "Bergen"}'}}
    expected = chat(
        with_tools,
        [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]},
         {"role": "tool", "content": "Arrived.", "tool_call_id": "c"}],
        tools=TOOLS,
    )  # fmt: skip
    assert got.prompt_eval_count == expected["usage"]["prompt_tokens"]
    assert got.message.content == expected["choices"][0]["message"]["content"]


def test_thinking_is_apart(with_thinking: Live) -> None:
    client = ollama.Client(host=with_thinking.url, timeout=60)
    assert "thinking" in client.show(NAME).capabilities
    got = client.chat(model=NAME, messages=MESSAGES, think=True, options=OPTIONS)
    assert got.message.thinking and not got.message.content
    assert not client.chat(model=NAME, messages=MESSAGES, think=False, options=OPTIONS).message.thinking


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"mirostat": 2}}, "mirostat=2 is not possible here"),
        ({"options": {"num_predict": 0}}, "num_predict"),
        ({"messages": [{"role": "user", "content": "x", "images": [b"png"]}]}, r"images"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "narrator"),
        ({"model": "other"}, "no model 'other' here"),
    ],
)
def test_what_cannot_be_is_refused_as_ollama_does(client: Any, given: dict, message: str) -> None:
    with pytest.raises(ollama.ResponseError, match=message):
        client.chat(**{"model": NAME, "messages": MESSAGES, **given})
