import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates_for_tool_tests import CALLS, FAMILIES, ONE_CALL, TEMPLATES, TOOLS, assistant, calls_of

from latentkv.text.chat import ChatTemplate
from latentkv.text.tools import (
    CALL_FORMATS,
    AssistantMessage,
    Content,
    OutputFormat,
    OutputParser,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    choose_format,
    join_deltas,
    read_tools,
)

READ = read_tools(TOOLS)
THINK = choose_format("<think></think>", "").reasoning
SAMPLES = {
    "deepseek_v3": (
        "<think>\na\n</think>\n\nHi <\n<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "a\\u00e9`", "x": [-1.5e3, {}]}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜> end"
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>g<｜tool▁sep｜>{"a": nul}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true"></｜DSML｜param</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "kimi_k2": (
        "<think>a<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a":""}<|tool_call_end|>'
        "<|tool_calls_section_end|>"
    ),
    "glm": (
        "\n<think>a</think>\nb\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a</arg</arg_value>\n"
        "<arg_key>days</arg_key><arg_value> 7 </arg_value>\n</tool_call><tool_call>f</tool_call>"
        "<tool_call>g h</tool_call>"
    ),
    "hermes": (
        'x <tool_call>\n{"arguments": {"a": "\n"}, "name": "f"}\n</tool_call>\n'
        '<tool_call>{"name": "g"}</tool_call><tool_call>{"names": 1}</tool_call>'
    ),
    "llama3": (
        '{"type": "function", "name": "get_time", "parameters": {}}; {"name": "get_weather", "parameters": {"a": 1'
    ),
}
MARKERS = sorted({text for format in CALL_FORMATS.values() for text in format.texts} | {"<think>", "</think>"})


def parse(format: OutputFormat, pieces: list[str], *, reasoning_open: bool = False) -> AssistantMessage:
    parser = OutputParser(format, READ, reasoning_open=reasoning_open)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return join_deltas([*deltas, *parser.finish()])


def of(name: str, text: str, *, reasoning_open: bool = False) -> AssistantMessage:
    return parse(OutputFormat(CALL_FORMATS[name], THINK), [text], reasoning_open=reasoning_open)


def without_ids(message: AssistantMessage) -> tuple[str, str, list[tuple[str, str]]]:
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_is_read_back(name: str) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]}, {})
    user = {"role": "user", "content": "Weather?"}
    calls = CALLS[:1] if name in ONE_CALL else CALLS
    says = None if name in (*ONE_CALL, "deepseek_v3 text") else "I look."
    thinks = "So, so." if name.startswith(("glm", "hermes", "deepseek_v32")) else None
    message = assistant(calls, content=says, reasoning=thinks)
    prompt = template.render([user])
    written = template.render([user, message], add_generation_prompt=False)
    output = written.removeprefix(prompt).removesuffix("<END>")
    format = choose_format(TEMPLATES[name], "")
    assert format.calls is CALL_FORMATS[FAMILIES[name]]
    opened = name == "deepseek_v32"  # its prompt ends in <think>
    if opened:
        format = OutputFormat(format.calls, THINK)
    for pieces in ([output], list(output)):
        parsed = parse(format, pieces, reasoning_open=opened)
        assert calls_of(parsed) == calls
        assert (parsed.content, parsed.reasoning) == (says or "", thinks or "")


@pytest.mark.parametrize("name", SAMPLES)
@given(data=st.data())
@settings(max_examples=40)
def test_the_pieces_that_a_text_comes_in_change_nothing(name: str, data: st.DataObject) -> None:
    text = SAMPLES[name]
    if data.draw(st.booleans()):  # damage it
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + data.draw(st.sampled_from(["", *MARKERS, '"', "}", " \n"])) + text[start + 1 :]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    opened = data.draw(st.booleans())
    format = OutputFormat(CALL_FORMATS[name], THINK)
    whole = without_ids(parse(format, [text], reasoning_open=opened))
    assert without_ids(parse(format, pieces, reasoning_open=opened)) == whole
    assert without_ids(parse(format, list(text), reasoning_open=opened)) == whole


@pytest.mark.parametrize("name", CALL_FORMATS)
@given(parts=st.lists(st.sampled_from([*MARKERS, *'{}",: af<\n', "get_time", "name", "arguments"]), max_size=25))
@settings(max_examples=60)
def test_any_text_is_parsed_alike_in_one_piece_and_by_characters(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    format = OutputFormat(CALL_FORMATS[name], THINK)
    assert without_ids(parse(format, [text])) == without_ids(parse(format, list(text)))


@pytest.mark.parametrize("name", SAMPLES)
def test_arguments_are_json_or_have_no_end(name: str) -> None:
    """However the output is cut off, no call looks whole that is not."""
    whole = of(name, SAMPLES[name]).tool_calls
    for end in range(len(SAMPLES[name])):
        for number, call in enumerate(of(name, SAMPLES[name][:end]).tool_calls):
            try:
                json.loads(call.arguments)
            except ValueError:
                continue
            assert call.arguments == whole[number].arguments


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepseek_v3", "<｜tool▁calls▁begin｜>no call<｜tool▁calls▁end｜>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n[1]\n```<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>Köln<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>two words<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("deepseek_v31", f"<｜tool▁call▁begin｜>{'f' * 3000}<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>"),
        ("deepseek_v32", '<｜DSML｜function_calls>\n<｜DSML｜invoke name="">\n</｜DSML｜invoke>'),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        ("glm", "Write <tool_call>name and so on"),
        ("glm", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>'),
        ("hermes", "<tool_call>\nf(1)\n</tool_call>"),
        ("hermes", '<tool_call>{"name": "f'),
        ("llama3", '{"answer": {"name": "get_time"}}'),
        ("llama3", '{"name": "Bob", "parameters": {}}'),
        ("llama3", 'print {"name": "get_time", "parameters": {}}'),
        ("llama3", "  {"),
        ("llama3", "<|python_tag|>print(1)"),
    ],
)
def test_text_that_only_begins_like_a_call_is_content_as_it_was_written(name: str, text: str) -> None:
    assert of(name, text) == AssistantMessage(text, "", ())


@pytest.mark.parametrize(
    ("name", "text", "arguments", "content"),
    [
        (
            "deepseek_v31",
            "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{'a': 1}<｜tool▁call▁end｜>",
            "{",
            "'a': 1}<｜tool▁call▁end｜>",
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru, "b": 1}}', '{"a": tru', ', "b": 1}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', '{"a": "b', ""),
        ("glm", "<tool_call>f\n<arg_key>a</arg_key>\nb", "", "<arg_key>a</arg_key>\nb"),
        ("glm", "<tool_call>f\n<arg_key>a</arg_key><arg_value>[1", "", "<arg_key>a</arg_key><arg_value>[1"),
    ],
)
def test_a_call_that_breaks_keeps_its_arguments_and_the_rest_is_content(
    name: str, text: str, arguments: str, content: str
) -> None:
    message = of(name, text)
    assert without_ids(message) == (content, "", [("f", arguments)])


def test_a_call_after_a_broken_one_is_found() -> None:
    text = '<tool_call>{"name": <tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    assert without_ids(of("hermes", text)) == ('<tool_call>{"name":', "", [("get_time", "{}")])


def test_only_the_broken_one_of_two_calls_is_content() -> None:
    first, second = (
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>g h<｜tool▁sep｜>{}",
    )
    message = of("deepseek_v31", f"<｜tool▁calls▁begin｜>{first}{second}")
    assert without_ids(message) == (second, "", [("f", "{}")])


def test_a_name_without_end_is_given_up_at_the_same_character_however_it_comes() -> None:
    text = f'<tool_call>{{"{"a" * 300}<tool_call>{{"name": "get_time"}}'
    whole, by_character = (parse(OutputFormat(CALL_FORMATS["hermes"]), pieces) for pieces in ([text], list(text)))
    assert without_ids(whole) == without_ids(by_character) == (text[:313], "", [("get_time", "{}")])


def test_a_complete_call_needs_no_closing_marker() -> None:
    for name, text in (
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}'),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n"),
        ("kimi_k2", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"),
    ):
        assert without_ids(of(name, text)) == ("", "", [("f", "{}")])


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>a</think>b", False, ("b", "a")),
        ("\n <think>\n a\n</think>\n\nb ", False, ("b ", "a")),
        ("a</think>b", True, ("b", "a")),
        ("a", True, ("", "a")),
        ("<think></think>b", False, ("b", "")),
        ("</think>b", True, ("b", "")),
        ("b <think>a</think>", False, ("b <think>a</think>", "")),
        ("  <thin", False, ("  <thin", "")),
        ("a <tool_call>b</think>c", True, ("c", "a <tool_call>b")),
    ],
)
def test_reasoning_is_what_the_tags_enclose_at_the_beginning(
    text: str, opened: bool, expected: tuple[str, str]
) -> None:
    message = of("hermes", text, reasoning_open=opened)
    assert (message.content, message.reasoning, message.tool_calls) == (*expected, ())


def test_without_tools_calls_are_not_looked_for() -> None:
    parser = OutputParser(OutputFormat(CALL_FORMATS["hermes"], None))
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call> '
    assert [*parser.push(text), *parser.finish()] == [Content(text)]


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    parser = OutputParser(OutputFormat(CALL_FORMATS["hermes"], THINK), READ)
    assert parser.push("<th") == []
    assert parser.push("ink>Let me") == [Reasoning("Let me")]
    assert parser.push(" see.\n</think") == [Reasoning(" see.")]
    assert parser.push(">\n\nA < b") == [Content("A < b")]
    assert parser.push(" <") == []
    assert parser.push("b> <tool_ca") == [Content(" <b>")]
    assert parser.push('ll>{"name": "get_ti') == []
    assert parser.push('me", "arguments": ') == []
    (start, arguments) = parser.push('{"zone": "U')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "get_time")
    assert arguments == ToolCallArguments(0, '{"zone": "U')
    assert parser.push('TC"') == [ToolCallArguments(0, 'TC"')]
    assert parser.push("}}</tool_call>") == [ToolCallArguments(0, "}")]
    assert parser.finish() == []
    assert parser.num_calls == 1


def test_a_string_of_bare_text_is_passed_on_as_it_comes() -> None:
    parser = OutputParser(OutputFormat(CALL_FORMATS["glm"]), READ)
    parser.push("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>")
    assert parser.push('Kö"ln </arg') == [ToolCallArguments(0, 'Kö\\"ln ')]
    assert parser.push("</arg_value>") == [ToolCallArguments(0, '</arg"')]


def test_ids_are_the_models_own_where_it_writes_some_and_unique() -> None:
    text = "<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    ids = [call.id for call in of("kimi_k2", text * 3).tool_calls]
    assert ids[0] == "functions.f:3"
    assert len(set(ids)) == 3
    (call,) = of("kimi_k2", "<|tool_call_begin|>a.b<|tool_call_argument_begin|>{}<|tool_call_end|>").tool_calls
    assert (call.name, call.id[:5]) == ("a.b", "call_")
    (first,), (second,) = (of("glm", "<tool_call>f</tool_call>").tool_calls for _ in range(2))
    assert first.id != second.id


def test_nesting_is_bounded() -> None:
    deep: Any = '{"a": ' * 100_000
    message = of("hermes", '<tool_call>{"name": "f", "arguments": ' + deep)
    assert len(message.tool_calls) == 1
    assert len(message.tool_calls[0].arguments) + len(message.content) <= len(deep)
