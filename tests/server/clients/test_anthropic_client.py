"""The real `anthropic` client against a live server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from live_server import NAME, Live, ask

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed (extra clients)")
pytestmark = pytest.mark.clients

MESSAGES: list[Any] = [{"role": "user", "content": "Where to?"}]
TOOLS: list[Any] = [
    {
        "name": "sail",
        "description": "Sail somewhere.",
        "input_schema": {
            "type": "object",
            "properties": {"to": {"enum": ["Nantucket", "Bergen"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["to", "days"],
            "additionalProperties": False,
        },
    },
    {"name": "rest", "input_schema": {"type": "object", "properties": {}}, "cache_control": {"type": "ephemeral"}},
]
GREEDY = {"temperature": 0}  # which newer clients send by extra_body alone
ASKED: dict[str, Any] = {"model": NAME, "max_tokens": 16, "messages": MESSAGES, "extra_body": GREEDY}


@pytest.fixture(scope="module")
def client(with_tools: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=with_tools.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def chat(live: Live, messages: list[Any], **more: Any) -> dict[str, Any]:
    status, answer, _ = ask(live, "/v1/chat/completions", {"messages": messages, "temperature": 0, **more})
    assert status == 200, answer
    return answer


def test_an_answer_is_that_of_a_chat(client: Any, with_tools: Live) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    got = client.messages.create(**ASKED, system=system, metadata={"user_id": "u"}, service_tier="auto")
    expected = chat(with_tools, [{"role": "system", "content": "Be brief."}, *MESSAGES], max_tokens=16)
    assert (got.type, got.role, got.model, got.stop_reason) == ("message", "assistant", NAME, "max_tokens")
    assert [block.text for block in got.content] == [expected["choices"][0]["message"]["content"]]
    usage = got.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected["usage"]["prompt_tokens"]
    assert usage.output_tokens == 16
    counted = client.messages.count_tokens(model=NAME, messages=MESSAGES, system=system)
    assert counted.input_tokens == expected["usage"]["prompt_tokens"]


def test_a_stream_joins_to_the_whole_answer(client: Any) -> None:
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == 16
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_tool_that_must_be_called_is_called_and_its_result_is_read(client: Any, with_tools: Live) -> None:
    asked = {**ASKED, "max_tokens": 200, "tools": TOOLS, "tool_choice": {"type": "tool", "name": "sail"}}
    got = client.messages.create(**asked)
    assert got.stop_reason == "tool_use"
    call = got.content[-1]
    assert (call.type, call.name) == ("tool_use", "sail") and call.input["to"] in ("Nantucket", "Bergen")
    with client.messages.stream(**asked) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(parts) > 1 and final.content[-1].input == call.input and final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Arrived."}]}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": [block.model_dump() for block in got.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "Next?"}]},
    ]
    answer = client.messages.create(model=NAME, max_tokens=8, messages=history, tools=TOOLS, extra_body=GREEDY)
    function = {"name": "sail", "arguments": call.input}
    expected = chat(
        with_tools,
        [
            *MESSAGES,
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call.id, "content": "Arrived."},
            {"role": "user", "content": "Next?"},
        ],
        max_tokens=8,
        tools=[{"type": "function", "function": {"name": "sail", "description": "Sail somewhere.",
                                                 "parameters": TOOLS[0]["input_schema"]}},
               {"type": "function", "function": {"name": "rest", "parameters": TOOLS[1]["input_schema"]}}],
    )  # fmt: skip
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == expected["usage"]["prompt_tokens"]
    text = expected["choices"][0]["message"]["content"]
    assert [block.text for block in answer.content if block.type == "text"] == [text]


def test_a_stop_sequence_is_named(client: Any) -> None:
    whole = client.messages.create(**ASKED).content[0].text
    stop = whole[len(whole) // 2 :][:3]
    got = client.messages.create(**ASKED, stop_sequences=["\u0001", stop])
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)
    assert got.content[0].text == whole[: whole.index(stop)]


def test_a_beginning_of_the_answer_is_gone_on_with(client: Any, with_tools: Live) -> None:
    begun = {"role": "assistant", "content": "The sea is"}
    got = client.messages.create(**{**ASKED, "messages": [*MESSAGES, begun]})
    expected = chat(with_tools, [*MESSAGES, begun], max_tokens=16, continue_final_message=True)
    assert got.content[0].text == expected["choices"][0]["message"]["content"]


def test_thinking_is_turned_on_and_off_and_shown(with_thinking: Live) -> None:
    client = anthropic.Anthropic(base_url=with_thinking.url, api_key="unused", max_retries=0, timeout=60)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    got = client.messages.create(**{**ASKED, "thinking": thinking})
    assert [block.type for block in got.content] == ["thinking"] and got.content[0].thinking
    assert [b.type for b in client.messages.create(**{**ASKED, "thinking": {"type": "disabled"}}).content] == ["text"]
    with client.messages.stream(**{**ASKED, "thinking": thinking}) as stream:
        assert "".join(event.thinking for event in stream if event.type == "thinking") == got.content[0].thinking
    raw = client.messages.with_raw_response.create(**{**ASKED, "thinking": thinking})
    assert raw.headers["x-latentkv-note"] == "thinking.budget_tokens is not enforced"


def test_the_text_can_be_held_to_a_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"day": {"enum": ["today", "tomorrow"]}}, "required": ["day"]}
    config = {"format": {"type": "json_schema", "schema": schema}}
    got = client.messages.create(**{**ASKED, "max_tokens": 60}, output_config=config)
    assert got.stop_reason == "end_turn" and got.content[0].text.replace(" ", "").startswith('{"day":"to')


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.type, model.display_name) == (NAME, "model", NAME)
    assert client.models.retrieve(NAME).id == NAME


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "claude"}, "NotFoundError", "no model 'claude' here"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "BadRequestError", "runs no tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "BadRequestError", "'image'"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"thinking": {"type": "much"}}, "BadRequestError", "thinking must be"),
        ({"tool_choice": {"type": "tool", "name": "swim"}, "tools": TOOLS}, "BadRequestError", "'swim'"),
    ],
)
def test_what_cannot_be_is_refused_as_anthropic_does(client: Any, given: dict, error: str, message: str) -> None:
    with pytest.raises(getattr(anthropic, error)) as caught:
        client.messages.create(**{**ASKED, **given})
    assert message in str(caught.value)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"].endswith("_error")
