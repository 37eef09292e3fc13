import json
from pathlib import Path
from typing import Any

import folders_for_text_tests as folders
import pytest
from templates_for_text_tests import STYLES
from transformers import AutoTokenizer

from latentkv.errors import RequestError, TokenizerError
from latentkv.text import Tokenizer, load_tokenizer
from latentkv.text.template_process import MAX_CHARACTERS

TOOLS = [{"type": "function", "function": {"name": "wêather", "description": "<b>'now' & \"then\"</b>"}}]
CALL = [{"type": "function", "function": {"name": "wêather", "arguments": {"city": "Köln <&>", "days": 2}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "  Who is <Ahab> & why? 🐋\n"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>easy</think>2", "reasoning_content": " easy "},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes", "reasoning_content": " sure "},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}],
    "tool": [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": CALL}],
}
USER = [{"role": "user", "content": "Hi"}]


def make(folder: Path, template: Any) -> Tokenizer:
    folders.deepseek(folder)
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return load_tokenizer(folder)


@pytest.mark.parametrize("style", STYLES)
def test_templates_write_what_transformers_writes(tmp_path: Path, style: str) -> None:
    ours = make(tmp_path / "t", STYLES[style])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert ours.chat_template_source == "checkpoint"
    for name, messages in CONVERSATIONS.items():
        if name == "parts" and style != "glm":
            continue  # the others take text only
        for options in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"date_string": "May"}):
            if "tools" in options and not ours.takes_tools:
                continue
            for generate in (True, False):
                text = ours.apply_chat_template(messages, add_generation_prompt=generate, **options)
                assert text == theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate, **options
                )
                ids = theirs.apply_chat_template(messages, add_generation_prompt=generate, **options)["input_ids"]
                assert ours.encode(text, add_bos=False, allow_special=True) == ids


@pytest.mark.parametrize("style", STYLES)
def test_text_parts_are_joined_for_every_template(tmp_path: Path, style: str) -> None:
    tokenizer = make(tmp_path / "t", STYLES[style])
    joined = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(CONVERSATIONS["parts"]) == tokenizer.apply_chat_template(joined)


def test_named_templates_and_files_are_chosen_as_in_transformers(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = make(tmp_path / "t", named)
    assert tokenizer.apply_chat_template(USER) == "plain"
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "tools"
    (tmp_path / "t/chat_template.jinja").write_text("{{ messages[0].content }} from a file\n")
    (tmp_path / "t/additional_chat_templates").mkdir()
    (tmp_path / "t/additional_chat_templates/tool_use.jinja").write_text("tools from a file")
    ours, theirs = load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    for options in ({}, {"tools": TOOLS}):
        text = ours.apply_chat_template(USER, **options)
        assert "from a file" in text
        assert text == theirs.apply_chat_template(USER, tokenize=False, **options)


def test_a_model_without_a_template_gets_a_plain_one_labelled_so(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "t", None)
    assert tokenizer.chat_template_source == "plain"
    messages = [*CONVERSATIONS["system"], {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "So"}]
    expected = "<｜begin｜>System: Be brief. \n\nUser: Hi\n\nAssistant: Hello.\n\nUser: So\n\n"
    assert tokenizer.apply_chat_template(messages) == expected + "Assistant:"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == expected
    folders.qwen(tmp_path / "q")
    assert load_tokenizer(tmp_path / "q").apply_chat_template(USER) == "User: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "failed"),
        ("{{ missing.attribute }}", "failed: 'missing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", f"more than {MAX_CHARACTERS} characters"),
        ("{{ 'x' * 10**9 }}", "more than 192 MiB of memory"),
        ("{{ 'x' * 1000000000 }}", "more than 192 MiB of memory"),
        ("{{ 1000000000 * [1] }}", "more than 192 MiB of memory"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "cannot be read"),
        ("{{ raise_exception('long ' * 1000000) }}", "failed: long long"),
    ],
)
def test_a_bad_template_is_one_clear_error(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = make(tmp_path / "t", template)
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer.apply_chat_template(USER)
    assert "\n" not in str(caught.value)


def test_only_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "t", [{"name": "rag", "template": "x"}])
    with pytest.raises(TokenizerError, match=r"no default chat template, only: rag\."):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("Hi", "Messages must be a list"),
        ({"role": "user", "content": "Hi"}, "Messages must be a list"),
        (["Hi"], "Message 1 must be a dict"),
        ([*USER, {"content": "Hi"}], 'Message 2 has no "role"'),
        ([{"role": "user"}], 'Message 1 has no "content"'),
        ([{"role": "user", "content": 3}], "text or a list of text parts, not int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "only parts"),
        ([{"role": "user", "content": "Hi", "extra": object()}], "Message 1 must be JSON"),
    ],
)
def test_malformed_messages_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        make(tmp_path / "t", None).apply_chat_template(messages)


def test_tools_need_a_template_that_takes_them(tmp_path: Path) -> None:
    for number, template in enumerate((None, STYLES["qwen"])):
        tokenizer = make(tmp_path / str(number), template)
        assert not tokenizer.takes_tools
        assert tokenizer.apply_chat_template(USER, tools=[]) == tokenizer.apply_chat_template(USER)
        with pytest.raises(RequestError, match="takes no tools: ask without"):
            tokenizer.apply_chat_template(USER, tools=TOOLS)
    tokenizer = make(tmp_path / "t", STYLES["glm"])
    assert tokenizer.takes_tools
    with pytest.raises(RequestError, match=r"tools\[0\] must be"):
        tokenizer.apply_chat_template(USER, tools=[{"name": "f"}])


def test_the_template_for_tools_is_the_one_to_look_for_markers_in(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }}"}]
    assert make(tmp_path / "named", named).chat_template_text == "{{ tools }}"
    assert make(tmp_path / "one", "{{ messages }}").chat_template_text == "{{ messages }}"
    assert make(tmp_path / "none", None).chat_template_text == ""


def test_deep_nesting_is_one_clear_error(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TokenizerError, match="Message 1 is nested more than 100 deep"):
        make(tmp_path / "t", None).apply_chat_template([{"role": "user", "content": "Hi", "extra": deep}])


def test_variables_must_be_json(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "t", "{{ depth }}")
    assert tokenizer.apply_chat_template(USER, depth=[1, {"a": None}]) == "[1, {'a': None}]"
    with pytest.raises(TokenizerError, match=r"depth must be JSON .* holds a \w*Path"):
        tokenizer.apply_chat_template(USER, depth=tmp_path)


def test_the_callers_messages_stay_untouched(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    make(tmp_path / "t", None).apply_chat_template(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
