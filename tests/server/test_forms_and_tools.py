"""JSON schemas, other forms, tools and /v1/responses through the real `openai` client."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

import openai
import pytest

from latentkv import LLM, SamplingParams
from live_server import NAME, Live

MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "sail",
            "description": "Sail somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"enum": ["Nantucket", "Bergen"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["to", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "rest"}},
]


@pytest.fixture(scope="module")
def openai_client_with_tools(with_tools: Live) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def tool_client(openai_client_with_tools: openai.OpenAI, with_tools: Live) -> Generator[openai.OpenAI]:
    yield openai_client_with_tools
    with_tools.wait_until_free()


def test_an_answer_held_to_a_json_schema_validates(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        got = client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=200, seed=seed, response_format=form
        )
        assert got.choices[0].finish_reason == "stop"
        person = json.loads(got.choices[0].message.content or "")
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 99 and len(person["name"]) <= 8


def test_a_streamed_json_object_is_one(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=300, seed=1, stream=True, response_format={"type": "json_object"},
        temperature=0.3,
    )  # fmt: skip
    text, reason = "", None
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert text.startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"grammar": 'start: "a"+ "b"'}, "a+b"),
        ({"json": {"type": "boolean"}}, "true|false"),
    ],
)
def test_completions_are_held_to_other_forms(client: openai.OpenAI, form: dict, pattern: str) -> None:
    got = client.completions.create(
        model=NAME, prompt="So:", max_tokens=100, seed=2, extra_body={"structured_outputs": form}
    )
    assert got.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, got.choices[0].text)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "("},
        {"json": {"type": "nothing"}},
        {"grammar": "start: other"},
        {"choice": []},
        {},
        {"regex": "a", "choice": ["a"]},
    ],
)
def test_a_form_that_cannot_be_is_a_400(client: openai.OpenAI, form: dict) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=NAME, prompt="x", extra_body={"structured_outputs": form})


def test_a_required_tool_is_called_with_arguments_of_its_schema(tool_client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "sail"}}):
        got = tool_client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=200, seed=4, tools=TOOLS, tool_choice=choice,
            parallel_tool_calls=False,
        )  # fmt: skip
        answer = got.choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls or []
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("sail", "rest")
        if call.function.name == "sail":
            assert arguments["to"] in ("Nantucket", "Bergen") and arguments["days"] <= 9
        assert call.id


def test_a_streamed_call_joins_to_the_whole_one(tool_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": NAME, "messages": MESSAGES, "max_tokens": 200, "seed": 6, "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "sail"}},
    }  # fmt: skip
    (whole,) = tool_client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    name, arguments, reason = "", "", None
    for chunk in tool_client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                name += (call.function and call.function.name) or ""
                arguments += (call.function and call.function.arguments) or ""
    assert (name, arguments, reason) == (whole.function.name, whole.function.arguments, "tool_calls")


def test_a_conversation_goes_on_after_a_tool_has_answered(tool_client: openai.OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "sail", "arguments": '{"to": "Bergen", "days": 3}'},
    }
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "arrived"},
    ]
    got = tool_client.chat.completions.create(model=NAME, messages=history, tools=TOOLS, max_tokens=8, temperature=0)
    assert got.choices[0].message.content or got.choices[0].message.tool_calls


def test_tools_that_cannot_be_are_refused(client: openai.OpenAI, tool_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS)  # its template knows none
    for given in (
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [{"type": "function", "function": {"name": "bad name"}}]},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
    ):
        with pytest.raises(openai.BadRequestError):
            tool_client.chat.completions.create(**{"model": NAME, "messages": MESSAGES, **given})


def test_a_response_is_the_chats_answer(client: openai.OpenAI, reference: LLM) -> None:
    got = client.responses.create(model=NAME, input="Tell me of the sea.", max_output_tokens=20, temperature=0)
    expected = reference.chat(MESSAGES, SamplingParams(max_tokens=20, temperature=0))
    assert got.output_text == expected.text
    assert got.usage is not None
    assert got.usage.output_tokens == len(expected.token_ids)
    assert got.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    with_items = client.responses.create(
        model=NAME, temperature=0, max_output_tokens=20,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Tell me of the sea."}]}],
    )  # fmt: skip
    assert with_items.output_text == got.output_text


def test_a_streamed_response_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "The whale", "instructions": "Be brief.", "max_output_tokens": 16}
    whole = client.responses.create(**asked, temperature=0)
    events = list(client.responses.create(**asked, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_a_response_is_held_to_a_schema_and_what_is_not_known_is_refused(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    got = client.responses.create(model=NAME, input="Who?", max_output_tokens=200, text=form)
    assert set(json.loads(got.output_text)) == {"name", "age"}
    for given in ({"previous_response_id": "resp_1"}, {"store": True}, {"tools": [{"type": "web_search"}]}):
        with pytest.raises(openai.BadRequestError, match=next(iter(given))):
            client.responses.create(**{"model": NAME, "input": "x", **given})


def test_what_a_loose_schema_asks_beyond_what_can_be_enforced_is_named_in_a_header(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True, "maxItems": 3}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": NAME, "messages": MESSAGES, "max_tokens": 50, "seed": 1}
    raw = client.chat.completions.with_raw_response.create(**asked, response_format=form)
    assert raw.headers["x-latentkv-note"] == "uniqueItems at # is not enforced"
    assert isinstance(json.loads(raw.parse().choices[0].message.content or ""), list)
    form["json_schema"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="'uniqueItems' at #, which cannot be enforced"):
        client.chat.completions.create(**asked, response_format=form)
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    response = client.responses.with_raw_response.create(input="x", text=text, max_output_tokens=40)
    assert response.headers["x-latentkv-note"] == "uniqueItems at # is not enforced"
    plain = client.chat.completions.with_raw_response.create(**asked)
    assert "x-latentkv-note" not in plain.headers


def test_of_the_tools_only_those_allowed_are_offered(tool_client: openai.OpenAI) -> None:
    chosen = [{"type": "function", "function": {"name": "sail"}}]
    asked: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 120, "seed": 3}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": chosen}}
    got = tool_client.chat.completions.create(**asked, tools=TOOLS, tool_choice=choice)
    alone = tool_client.chat.completions.create(**asked, tools=TOOLS[:1], tool_choice="required")
    assert got.choices[0].message.tool_calls and got.choices[0].message.tool_calls[0].function.name == "sail"
    assert got.usage.prompt_tokens == alone.usage.prompt_tokens


def test_json_is_asked_for_after_reasoning_and_other_forms_are_not(with_thinking: Live) -> None:
    client = openai.OpenAI(base_url=f"{with_thinking.url}/v1", api_key="unused", max_retries=0, timeout=30)
    asked: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "reasoning_effort": "high"}
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    message = client.chat.completions.create(**asked, response_format=form).choices[0].message
    assert message.model_extra and message.model_extra["reasoning_content"] and not message.content
    with pytest.raises(openai.BadRequestError, match="while the model reasons, unless it is JSON"):
        client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "a+"}})
    whole = client.chat.completions.create(
        **{**asked, "reasoning_effort": "none", "max_tokens": 200}, response_format=form
    )
    assert set(json.loads(whole.choices[0].message.content or "")) == {"name", "age"}
