import time
from contextlib import suppress

import pytest

from latentkv.errors import RequestError
from latentkv.text.lark import as_lark


@pytest.mark.parametrize("option", ["temperature=0.7", 'stop="x"', "stop = /a/", 'stop_capture="n"'])
def test_an_option_of_a_rule_that_would_have_no_effect_is_refused(option):
    with pytest.raises(RequestError, match=f"sets {option.split('=')[0].strip()}="):
        as_lark("grammar", f"start: a\na[{option}]: /[a-z]*/")


def test_a_special_token_is_refused_by_name():
    for grammar in ("start: <end>", 'start: "a" b\nb: <|im_end|> | /</'):
        with pytest.raises(RequestError, match=r"names the special token <.*end"):
            as_lark("grammar", grammar)
    for grammar in ('start: "<end>"', "start: /<end>/", "start: <[3]> <[4-5]> <[*]>"):
        as_lark("grammar", grammar)


@pytest.mark.parametrize(
    "rule",
    [
        '"[temperature=1]"',
        "/a[stop=]b/",
        '"x" // temperature=1',
        '"x" # stop="y"',
        r'"\"" "temperature="',
        '"/" "stop=/"',
    ],
)
def test_such_words_in_strings_expressions_and_comments_are_only_text(rule):
    assert rule in as_lark("grammar", f"start: {rule}")


def test_a_schema_inside_a_grammar_is_looked_through():
    with pytest.raises(RequestError, match="'uniqueItems' at #/properties/a"):
        as_lark("grammar", 'start: "x" inner\ninner: %json {"properties": {"a": {"uniqueItems": true}}}')
    as_lark("grammar", 'start: "%json {\\"oops\\": 1}" %json {"type": "null"}')


def test_a_schema_inside_a_grammar_has_our_options_unless_it_sets_its_own():
    ours = as_lark("grammar", 'start: "%json {" %json {} %json\n{"type": "null"}')
    assert ours.startswith('start: "%json {" %json {"x-guidance": {') and ours.count("whitespace_pattern") == 2
    own = 'start: %json {"x-guidance": {"whitespace_flexible": false}}'
    assert as_lark("grammar", own).startswith(own + "\n")


@pytest.mark.parametrize("kind", ["json_schema", "grammar"])
def test_a_schema_too_deep_for_json_is_refused(kind):
    schema = '{"items":' * 3_000 + "{}" + "}" * 3_000
    with pytest.raises(RequestError, match="nests too deeply: simplify it"):
        as_lark(kind, schema if kind == "json_schema" else f"start: %json {schema}")


def test_more_broken_schemas_than_anybody_writes_are_refused():
    assert as_lark("grammar", "%json { " * 64)
    with pytest.raises(RequestError, match="over 64 inline schemas that are no JSON"):
        as_lark("grammar", "%json { " * 65)


@pytest.mark.parametrize(
    "text",
    [
        '"' * 60_000,
        '\\"' * 30_000,
        "/\\" * 30_000,
        "/" * 60_000,
        "%json {" * 8_000,
        "<" * 60_000,
        "temperature" * 5_000,
    ],
)
def test_no_text_takes_long_to_look_through(text):
    def cpu_seconds(part: str) -> float:
        started = time.process_time()
        with suppress(RequestError):
            as_lark("grammar", part)
        return time.process_time() - started

    tenth, whole = (min(cpu_seconds(part) for _ in range(5)) for part in (text[: len(text) // 10], text))
    assert whole < 50 * tenth  # 100 times where each sign looks through the rest
