import json
from typing import Any

import jinja2
import pytest
from templates_for_tool_tests import CALLS, TEMPLATES, assistant

from latentkv.errors import TokenizerError
from latentkv.text.chat import ChatTemplate
from latentkv.text.tools.history import CallStyle, find_style

USER = {"role": "user", "content": "Weather?"}
STYLES = {
    "deepseek_v3": CallStyle(),
    "deepseek_v3 text": CallStyle("text", None),
    "deepseek_v31": CallStyle("text"),
    "deepseek_v32": CallStyle(),
    "kimi_k2": CallStyle(by_id=True),
    "glm": CallStyle(),
    "glm 4.7": CallStyle(),
    "hermes": CallStyle(),
    "llama3": CallStyle(),
}


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate({"default": TEMPLATES[name]}, {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_style_of_a_template_is_found(name: str) -> None:
    template = jinja2.Environment().from_string(TEMPLATES[name])

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return template.render(messages=messages)
        except (TypeError, jinja2.TemplateError) as error:
            raise TokenizerError("The template failed.") from error

    assert find_style(render) == STYLES[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", [None, ""])
def test_arguments_as_text_and_as_an_object_are_written_alike(name: str, content: str | None) -> None:
    calls = CALLS[:1]
    as_text, as_object = assistant(calls, content=content), assistant(calls, content=content)
    as_object["tool_calls"][0]["function"]["arguments"] = calls[0][1]
    result = {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": [{"type": "text", "text": "Rain"}]}
    written = [template_of(name).render([USER, message, result]) for message in (as_text, as_object)]
    assert written[0] == written[1]
    assert "Köln" in written[0]
    assert "<RESULT>Rain" in written[0]
    assert "None" not in written[0]


def test_a_call_without_arguments_may_have_an_empty_text() -> None:
    message = assistant([("get_time", {})])
    message["tool_calls"][0]["function"]["arguments"] = ""
    del message["content"]
    assert '"get_time", "arguments": {}' in template_of("hermes").render([USER, message])


def test_ids_of_others_become_those_that_a_template_writes_calls_by() -> None:
    messages: list[dict[str, Any]] = [USER, assistant(CALLS[:2])]
    for number, call in enumerate(messages[1]["tool_calls"]):
        call["id"] = f"call_{number}"
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": "x"})
    messages.append(assistant([CALLS[1]]))
    seen = "{% for m in messages %}{{ m.tool_call_id or '' }},{% endfor %}"
    template = ChatTemplate({"default": TEMPLATES["kimi_k2"] + seen}, {})
    written = template.render(messages)
    assert "<|tool_call_begin|>functions.get_weather:0<" in written
    assert "<|tool_call_begin|>functions.get_time:1<" in written
    assert "<|tool_call_begin|>functions.get_time:0<" in written  # it was one already
    assert written.endswith(",,functions.get_weather:0,functions.get_time:1,,")
    assert messages[1]["tool_calls"][0]["id"] == "call_0"


def test_an_id_that_is_no_text_reaches_the_template_as_it_is() -> None:
    template = ChatTemplate({"default": "{{ messages[0].tool_call_id }}" + TEMPLATES["kimi_k2"]}, {})
    written = template.render([{"role": "tool", "tool_call_id": [1], "content": "x"}, assistant()])
    assert written.startswith("[1]")


def test_no_calls_are_no_key() -> None:
    template = ChatTemplate({"default": "{{ 'tool_calls' in messages[0] }}"}, {})
    for none in ([], None):
        assert template.render([{"role": "assistant", "content": "a", "tool_calls": none}]) == "False"


def test_a_template_that_takes_no_calls_at_all_says_so_itself() -> None:
    source = "{% for m in messages if m.tool_calls %}{{ raise_exception('no calls here') }}{% endfor %}"
    with pytest.raises(TokenizerError, match="no calls here"):
        ChatTemplate({"default": source}, {}).render([USER, assistant()])


def test_what_one_request_asks_for_does_not_change_another() -> None:
    source = "{% if odd %}{{ raise_exception('odd') }}{% endif %}" + TEMPLATES["deepseek_v31"]
    template, fresh = ChatTemplate({"default": source}, {}), template_of("deepseek_v31")
    with pytest.raises(TokenizerError, match="odd"):
        template.render([USER, assistant()], odd=True)
    assert template.render([USER, assistant()]) == fresh.render([USER, assistant()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("f", "Message 2: a tool call must be"),
        ({"function": {"name": "f"}}, "Message 2: a tool call must be"),
        ({"function": {"name": "", "arguments": {}}}, "Message 2: a tool call must be"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "arguments of the call of 'f' are not a JSON object"),
        ({"function": {"name": "f", "arguments": '{"a": '}}, "arguments of the call of 'f' are not a JSON object"),
        ({"function": {"name": "f", "arguments": "[" * 100_000}}, "arguments of the call of 'f' are not a JSON object"),
        ({"function": {"name": "f", "arguments": 5}}, "arguments of the call of 'f' are not a JSON object"),
    ],
)
def test_malformed_calls_are_named(call: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        template_of("hermes").render([USER, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(TokenizerError, match='Message 1: "tool_calls" must be a list'):
        template_of("hermes").render([{"role": "assistant", "tool_calls": json.dumps(call)}])
