import pytest
from templates_for_tool_tests import FAMILIES, TEMPLATES

from latentkv.errors import RequestError
from latentkv.text.tools import CALL_FORMATS, OutputFormat, choose_format, reasoning_is_open


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_format(name: str) -> None:
    assert choose_format(TEMPLATES[name], "deepseek_v3").calls == CALL_FORMATS[FAMILIES[name]]


@pytest.mark.parametrize(
    ("template", "model_type", "calls", "reasons"),
    [
        ("", "deepseek_v32", "deepseek_v32", True),
        ("", "deepseek_v3", None, False),
        ("{{ tools }}", "kimi_k2", "kimi_k2", False),
        ("{{ tools }}<think>", "kimi_k2", "kimi_k2", True),
        ("<tool_call>\n<function=f>", "qwen3_moe", None, False),
        ("{{ messages }}", "llama", None, False),
        ("content.split('</think>')", "llama", None, True),
    ],
)
def test_the_model_type_tells_where_the_template_does_not(
    template: str, model_type: str, calls: str | None, reasons: bool
) -> None:
    format = choose_format(template, model_type)
    assert format.calls == (CALL_FORMATS[calls] if calls else None)
    assert (format.reasoning is not None) == reasons


def test_a_name_overrides_what_would_be_found() -> None:
    assert choose_format(TEMPLATES["glm"], "", "hermes").calls == CALL_FORMATS["hermes"]
    assert choose_format(TEMPLATES["glm"], "", "none").calls is None
    with pytest.raises(RequestError, match=r"no tool call format 'glm5': choose from deepseek_v3, .* and none\."):
        choose_format("", "", "glm5")


def test_reasoning_is_open_where_the_prompt_ends_in_its_tag() -> None:
    format = choose_format("<think>", "")
    assert reasoning_is_open("<|assistant|><think>\n", format)
    assert not reasoning_is_open("<think>\n\n</think>\n\n", format)
    assert not reasoning_is_open("<|assistant|><think>", OutputFormat())


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_no_marker_begins_or_holds_another(name: str) -> None:
    """The parser takes the first one that it finds."""
    format = CALL_FORMATS[name]
    openers = [*(format.section or ()), format.open]
    assert all(a == b or a not in b for a in openers for b in openers)
    assert all(text == text.strip() for text in (*openers, format.close))


def test_markers_are_what_may_be_a_token() -> None:
    assert OutputFormat(CALL_FORMATS["deepseek_v3"]).markers == (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    )
    assert {"｜DSML｜", "<｜DSML｜function_calls>"} <= {*OutputFormat(CALL_FORMATS["deepseek_v32"]).markers}
    assert choose_format("<think>", "").markers == ("<think>", "</think>")
