"""Tools and reasoning of /v1/responses through the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from live_server import NAME, Live, ask

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "sail",
        "description": "Sail somewhere.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["Nantucket", "Bergen"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["to", "days"],
            "additionalProperties": False,
        },
    },
    {"type": "function", "name": "rest", "parameters": None, "strict": None},
]
ASKED: dict[str, Any] = {
    "model": NAME,
    "input": "Where to?",
    "tools": TOOLS,
    "max_output_tokens": 200,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def tool_client(with_tools: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_a_function_that_must_be_called_is_an_item_of_its_own(tool_client: openai.OpenAI) -> None:
    got = tool_client.responses.create(**ASKED, tool_choice={"type": "function", "name": "sail"})
    assert got.status == "completed"
    call = got.output[0]
    assert call.type == "function_call" and call.name == "sail" and call.call_id and call.id
    assert json.loads(call.arguments)["to"] in ("Nantucket", "Bergen")
    assert [tool.name for tool in got.tools] == ["sail", "rest"]
    assert got.usage is not None
    assert got.usage.input_tokens_details.cached_tokens >= 0
    assert got.usage.output_tokens_details.reasoning_tokens == 0


def test_a_streamed_call_grows_to_the_whole_one(tool_client: openai.OpenAI) -> None:
    whole = tool_client.responses.create(**ASKED, tool_choice="required", parallel_tool_calls=False)
    with tool_client.responses.stream(**ASKED, tool_choice="required", parallel_tool_calls=False) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1
    assert "".join(event.delta for event in deltas) == whole.output[0].arguments == final.output[0].arguments
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed"
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_calls_and_their_outputs_are_read_as_a_chat_reads_them(with_tools: Live, tool_client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Where to?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "sail", "arguments": '{"to": "Bergen", "days": 2}'},
        {"type": "function_call", "call_id": "c2", "name": "rest", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Arrived."},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Rested."}]},
        {"type": "message", "role": "assistant", "status": "completed", "id": "msg_1",
         "content": [{"type": "output_text", "text": "Done.", "annotations": []}]},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    calls = [
        {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
        for item in items[2:4]
    ]
    messages = [
        {"role": "user", "content": "Where to?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Arrived."},
        {"role": "tool", "tool_call_id": "c2", "content": "Rested."},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "And now?"},
    ]
    got = tool_client.responses.create(model=NAME, input=items, max_output_tokens=8, temperature=0)
    status, chat, _ = ask(with_tools, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
    assert status == 200, chat
    assert got.output_text == chat["choices"][0]["message"]["content"]
    assert got.usage is not None and got.usage.input_tokens == chat["usage"]["prompt_tokens"]


def test_reasoning_is_an_item_before_the_answer(with_thinking: Live) -> None:
    thinking_client = openai.OpenAI(base_url=f"{with_thinking.url}/v1", api_key="unused", max_retries=0, timeout=60)
    asked: Any = {"model": NAME, "input": "Where to?", "max_output_tokens": 12, "reasoning": {"effort": "high"}}
    got = thinking_client.responses.create(**asked, temperature=0)
    (item,) = got.output
    assert (got.status, item.type, item.status) == ("incomplete", "reasoning", "incomplete")
    assert item.content[0].text
    assert got.usage is not None and got.usage.output_tokens_details.reasoning_tokens > 6
    events = list(thinking_client.responses.create(**asked, temperature=0, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert text == item.content[0].text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0] is of type 'web_search': this server runs no tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0] is of type 'item_reference'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0] is a function_call without"),
        ({"tool_choice": {"type": "function", "name": "swim"}}, "'swim', which is not among the tools"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tool_client: openai.OpenAI, given: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tool_client.responses.create(**{**ASKED, **given})
    assert message in caught.value.message
