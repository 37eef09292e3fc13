"""A batch is answered as the server answers, and what fails is one line."""

from __future__ import annotations

import asyncio
import json

import pytest

from latentkv import LLM, SamplingParams
from latentkv.batch.requests import BatchRequest
from latentkv.batch.run import SETTINGS, answer_all
from latentkv.errors import EngineStoppedError
from latentkv.server.run import make_server

CHAT = [{"role": "user", "content": "Who is there?"}]


def request(custom_id, url="/v1/completions", **body):
    return BatchRequest(custom_id, url, json.dumps(body).encode(), bool(body.get("stream")))


def answers(llm, requests, at_once=4):
    found, tokens = {}, []
    server = make_server(llm, "small", SETTINGS)
    take = lambda request, status, request_id, body: found.update({request.custom_id: (status, body)})  # noqa: E731
    asyncio.run(answer_all(server, requests, take, tokens.append, at_once=at_once))
    return found, sum(tokens)


@pytest.fixture
def llm():
    return LLM(dtype="fp32", kv_cache_bytes=16 << 20)


def test_answers_are_those_of_the_server_and_a_bad_request_stops_no_other(llm):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = [
        request("text", prompt="It was a dark night", max_tokens=8, temperature=0, model="small"),
        request("ids", prompt=[5, 6, 7], max_tokens=3, ignore_eos=True, n=2),
        request("chat", "/v1/chat/completions", messages=CHAT, max_tokens=4, logprobs=True),
        request("json", "/v1/chat/completions", messages=CHAT, max_tokens=40, response_format=form),
        request("response", "/v1/responses", input="Who is there?", max_output_tokens=4),
        request("hot", prompt="It was", temperature=-1),
        request("unknown", prompt="It was", colour="red"),
        request("nobody", prompt="It was", model="gpt-4o"),
        request("stream", prompt="It was", stream=True),
        request("long", prompt="It was " * 100_000),
        *(request(f"more {i}", prompt=f"It was {i}", max_tokens=2, ignore_eos=True) for i in range(20)),
    ]
    found, tokens = answers(llm, asked)
    assert {name: status for name, (status, _) in found.items() if status != 200} == {
        **dict.fromkeys(("hot", "unknown", "stream", "long"), 400),
        "nobody": 404,
    }
    assert found["hot"][1]["error"]["param"] == "temperature"
    assert "colour is not a parameter" in found["unknown"][1]["error"]["message"]
    assert "leave stream out" in found["stream"][1]["error"]["message"]
    assert len(found) == len(asked)
    expected = LLM(dtype="fp32").generate("It was a dark night", SamplingParams(max_tokens=8, temperature=0))[0]
    assert found["text"][1]["choices"][0]["text"] == expected.text
    assert len(found["ids"][1]["choices"]) == 2
    assert found["chat"][1]["object"] == "chat.completion"
    assert json.loads(found["json"][1]["choices"][0]["message"]["content"])["a"] in (1, 2)
    assert found["response"][1]["object"] == "response"
    counted = (body.get("usage", {}) for _, body in found.values())
    assert tokens == sum(usage.get("completion_tokens", usage.get("output_tokens", 0)) for usage in counted)


def test_requests_share_steps(llm):
    alone = 16
    asked = [request(str(i), prompt=f"It was {i}", max_tokens=alone, ignore_eos=True) for i in range(12)]
    found, tokens = answers(llm, asked, at_once=12)
    assert len(found) == 12 and tokens == 12 * alone
    assert llm.engine.counters.steps < 4 * alone


def test_a_dead_engine_ends_the_run_and_answers_nothing_more(llm):
    def fail():
        raise ValueError("the model is gone")

    llm.engine.step = fail
    asked = [request(str(i), prompt=f"It was {i}", max_tokens=4) for i in range(3)]
    with pytest.raises(EngineStoppedError, match="the model is gone"):
        answers(llm, asked)
