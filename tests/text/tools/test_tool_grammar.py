from typing import Any

import llguidance
import pytest
from templates_for_tool_tests import CALLS, FAMILIES, ONE_CALL, TEMPLATES, TOOLS, assistant
from tokenizers import AddedToken, Tokenizer

from latentkv.errors import RequestError
from latentkv.text.bpe_trainer import train_bpe
from latentkv.text.chat import ChatTemplate
from latentkv.text.tools import (
    CALL_FORMATS,
    OutputFormat,
    ToolChoice,
    call_grammar,
    choose_format,
    json_after_reasoning,
    read_tools,
)

READ = read_tools(TOOLS)
REQUIRED = ToolChoice("required")
USER = {"role": "user", "content": "Weather?"}


class Engine:
    """llguidance with a small tokenizer, in which the markers are tokens of their own or are spelled out."""

    def __init__(self, markers: tuple[str, ...], *, as_tokens: bool) -> None:
        tokenizer: Tokenizer = train_bpe(["get_weather of a city"], 300, special_tokens=("<s>", "</s>"))
        tokens = [marker for marker in markers if marker.startswith("<") and not marker.startswith("<｜DSML")]
        if as_tokens:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        self._tokenizer = tokenizer
        self._engine = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=1)
        ids = {token: tokenizer.token_to_id(token) for token in tokens}
        self.special = {token: i for token, i in ids.items() if i is not None and self._engine.is_special_token(i)}
        assert bool(self.special) == (as_tokens and bool(tokens))

    def accepts(self, grammar: str | None, text: str) -> bool:
        assert grammar is not None
        matcher = llguidance.LLMatcher(self._engine, llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(name: str, calls: list[tuple[str, dict[str, Any]]], **says: str) -> str:
    """What the family's template writes for an assistant's message."""
    template = ChatTemplate({"default": TEMPLATES[name]}, {})
    message = template.render([USER, assistant(calls, **says)], add_generation_prompt=False)
    return message.removeprefix(template.render([USER])).removesuffix("<END>")


@pytest.mark.parametrize("as_tokens", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_grammar_takes_what_the_template_writes_and_nothing_else(name: str, as_tokens: bool) -> None:
    calls = CALL_FORMATS[FAMILIES[name]]
    format = OutputFormat(calls, choose_format("<think>", "").reasoning if name.startswith(("glm", "hermes")) else None)
    engine = Engine(format.markers, as_tokens=as_tokens)
    opened = name == "deepseek_v32"
    format = OutputFormat(calls, choose_format("<think>", "").reasoning) if opened else format
    grammar = call_grammar(format, READ, REQUIRED, special=engine.special, reasoning_open=opened)
    for good in ([CALLS[0]], [CALLS[1]], *(() if name in ONE_CALL else (CALLS,))):
        assert engine.accepts(grammar, written(name, good))
    for bad in (
        [("get_else", {})],
        [("get_weather", {"days": 2})],
        [("get_weather", {"city": "Köln", "days": "soon"})],
        [("get_weather", {"city": "Köln", "units": "feet"})],
        [("get_weather", {"city": "Köln", "wind": 1})],
        [("get_time", {"zone": "UTC"})],
    ):
        assert not engine.accepts(grammar, written(name, bad))
    whole = written(name, [CALLS[0]])
    first = "{" if name in ONE_CALL else calls.section[0] if calls.section else calls.open
    assert not engine.accepts(grammar, "It rains.")
    assert not engine.accepts(grammar, whole.replace(first, f"It rains. {first}", 1))
    assert not engine.accepts(grammar, whole[:-3])
    assert not engine.accepts(grammar, f"{whole} It rains.")


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {*ONE_CALL}))
def test_a_named_tool_is_called_once(name: str) -> None:
    format = OutputFormat(CALL_FORMATS[FAMILIES[name]], choose_format("<think>", "").reasoning)
    engine = Engine(format.markers, as_tokens=True)
    opened = name == "deepseek_v32"
    for choice, parallel in ((ToolChoice("required", "get_weather"), True), (REQUIRED, False)):
        grammar = call_grammar(format, READ, choice, special=engine.special, reasoning_open=opened, parallel=parallel)
        assert engine.accepts(grammar, written(name, [CALLS[0]]))
        assert not engine.accepts(grammar, written(name, [CALLS[0], CALLS[2]]))
        assert engine.accepts(grammar, written(name, [CALLS[1]])) == (choice.name is None)


@pytest.mark.parametrize("as_tokens", [True, False])
def test_reasoning_may_come_first(as_tokens: bool) -> None:
    format = choose_format(TEMPLATES["hermes"], "")
    engine = Engine(format.markers, as_tokens=as_tokens)
    text = written("hermes", [CALLS[0]], reasoning="So <b>, then.")
    grammar = call_grammar(format, READ, REQUIRED, special=engine.special)
    assert engine.accepts(grammar, text)
    grammar = call_grammar(format, READ, REQUIRED, special=engine.special, reasoning_open=True)
    assert engine.accepts(grammar, text.removeprefix("<think>"))
    assert not engine.accepts(grammar, written("hermes", [CALLS[0]]))


def test_definitions_of_a_schema_are_known_to_its_arguments() -> None:
    schema = {"type": "object", "properties": {"at": {"$ref": "#/$defs/spot"}}, "$defs": {"spot": {"type": "integer"}}}
    tools = read_tools([{"type": "function", "function": {"name": "go", "parameters": schema}}])
    format = OutputFormat(CALL_FORMATS["deepseek_v32"])
    grammar = call_grammar(format, tools, REQUIRED)
    engine = Engine(format.markers, as_tokens=False)
    assert engine.accepts(grammar, written("deepseek_v32", [("go", {"at": 5})]).split("</think>")[1])
    assert not engine.accepts(grammar, written("deepseek_v32", [("go", {"at": []})]).split("</think>")[1])


def test_nothing_is_forced_unless_a_call_is_required() -> None:
    for mode in ("auto", "none"):
        assert call_grammar(OutputFormat(), READ, ToolChoice(mode)) is None
    with pytest.raises(RequestError, match="no known tool call format"):
        call_grammar(OutputFormat(), READ, REQUIRED)


def test_a_schema_that_nests_without_end_is_refused() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": deep}}}}])
    with pytest.raises(RequestError, match="nested too deeply"):
        call_grammar(OutputFormat(CALL_FORMATS["hermes"]), tools, REQUIRED)


@pytest.mark.parametrize("as_tokens", [True, False])
def test_json_after_reasoning_takes_any_thought_and_then_the_form_alone(as_tokens: bool) -> None:
    tags = choose_format("<think>", "").reasoning
    assert tags is not None
    engine = Engine((tags.open, tags.close), as_tokens=as_tokens)
    schema = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": false}'
    grammar = json_after_reasoning(tags, schema, special=engine.special)
    assert engine.accepts(grammar, 'a {"a": 1}, or so' + tags.close + '\n\n{"a": true}')
    assert engine.accepts(grammar, tags.close + "{}")
    for wrong in ('{"a": true}', "a" + tags.close + '{"a": 1}', "a" + tags.close + "b"):
        assert not engine.accepts(grammar, wrong)
