"""Histories and reasoning, as a chat template is told of them."""

from __future__ import annotations

import json

import pytest

from latentkv.server.errors import ApiError
from latentkv.server.protocol.messages import mended, read_messages
from latentkv.server.protocol.reasoning import template_variables

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
GRADES = "{{ 'Reasoning: ' + reasoning_effort }} {%- if verbosity %}{{ verbosity }}{% endif %}"
NO_VARIABLE = "thinking {{ message.thinking }} {% if message['thinking'] %}verbosity{% endif %}"


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ('{"to": "Bergen", "days": 3}', '{"to": "Bergen", "days": 3}'),
        ('{"to": "Bergen", "da', '{"to": "Bergen"}'),
        ('{"to": "Ber', "{}"),
        ("{", "{}"),
        ('{"a": [1, {"b": "x, }", "c', '{"a": [1, {"b": "x, }"}]}'),
        ('{"a": "say \\"hi, ', "{}"),
        ('{"a": 1, "b": tr', '{"a": 1}'),
    ],
)
def test_a_call_that_was_cut_off_keeps_the_members_that_are_whole(cut: str, whole: str) -> None:
    assert json.loads(mended(cut)) == json.loads(whole)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": cut}}
    (read,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], "")
    assert json.loads(read["tool_calls"][0]["function"]["arguments"]) == json.loads(whole)
    assert read["content"] is None


@pytest.mark.parametrize("text", ["nonsense", "{" * 100_000, '{"a": ' * 100_000, '{"a": nonsense}'])
def test_what_is_no_beginning_of_an_object_or_nests_too_deeply_is_left_to_be_refused(text: str) -> None:
    assert mended(text) in (text, "{}")


def test_keys_and_roles_that_the_template_knows_reach_it() -> None:
    template = "{% if message.role == 'observation' %}{{ message.mood }}{{ message.reasoning }}{% endif %}"
    given = {"role": "observation", "content": "a", "mood": "good", "reasoning": "b", "id": 1}
    assert read_messages([given], template) == [{key: given[key] for key in ("role", "content", "mood", "reasoning")}]
    reasoned = {"role": "assistant", "content": "x", "reasoning": "y"}
    assert read_messages([reasoned], "")[0]["reasoning_content"] == "y"
    with pytest.raises(ApiError, match="observation"):
        read_messages([given], "")


def test_an_effort_goes_as_far_as_the_template_knows_it() -> None:
    assert template_variables("high", None, GRADES, reasons=True, notes=[]) == {"reasoning_effort": "high"}
    assert template_variables("none", None, SWITCH, reasons=True, notes=[]) == {"enable_thinking": False}
    assert template_variables("low", None, SWITCH, reasons=True, notes=[]) == {"enable_thinking": True}
    assert template_variables("low", None, NO_VARIABLE, reasons=True, notes=[]) == {}
    assert template_variables("none", None, NO_VARIABLE, reasons=False, notes=[]) == {}
    with pytest.raises(ApiError, match="cannot turn its reasoning off"):
        template_variables("none", None, NO_VARIABLE, reasons=True, notes=[])


def test_verbosity_is_for_a_template_that_knows_it() -> None:
    assert template_variables(None, "low", GRADES, reasons=False, notes=[]) == {"verbosity": "low"}
    assert template_variables(None, "medium", NO_VARIABLE, reasons=False, notes=[]) == {}
    notes: list[str] = []
    assert template_variables(None, "low", NO_VARIABLE, reasons=False, notes=notes) == {}
    assert notes == ["verbosity is not known to the chat template"]
