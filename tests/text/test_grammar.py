"""Whatever is written under a structure holds to it, as other libraries see it: jsonschema-rs and Python's re."""

from __future__ import annotations

import functools
import json
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from grammar_texts import random_text, random_texts, takes
from hypothesis import given, settings
from hypothesis import strategies as st

from latentkv.engine import Structure
from latentkv.errors import RequestError
from latentkv.text import Tokenizer, grammar_process, load_tokenizer
from latentkv.text import grammar as grammar_module
from latentkv.text.grammar import Grammar, GrammarCompiler
from latentkv.text.grammar_process import GrammarProcesses, grammar_processes
from latentkv.text.lark import as_lark
from worker_processes import worker_processes

Folder = Callable[[str], Path]
SURPLUS = 70  # ids that a model has above those of its tokenizer

SCHEMAS: dict[str, dict[str, Any]] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "bounded integer": {"type": "integer", "minimum": -17, "exclusiveMaximum": 230},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "number": {"type": "number"},
    "bounded number": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    "string": {"type": "string"},
    "short string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-c]+[0-9]{2}$"},
    "loose pattern": {"type": "string", "pattern": "q.x", "maxLength": 12},
    "unicode pattern": {"type": "string", "pattern": "^(é|🐋|鲸鱼){1,3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 20},
    "enum": {"enum": ["a", "ab", 'q"uote', "back\\slash", "line\n", "🐋 é", 3, 2.5, None, True, [1, {"a": 2}]]},
    "const": {"const": {"a": [1, "é", None]}},
    "types": {"type": ["integer", "null", "boolean"]},
    "anything": {},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "nested": {"type": "array", "items": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}, "maxItems": 3},
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "open object": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3, "minProperties": 1},
    "keys": {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
    "any of": {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string", "maxLength": 3}]},
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"const": 1}}, "required": ["kind", "x"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}, {"multipleOf": 2}]},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"value": {"const": 1}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}  # fmt: skip

REGEXES = [
    "[a-z]{1,8}",
    r"\d{3}-\d{2}",
    r"^(yes|no|mayb)e?$",
    r"(?i)whale",
    "[^a-z]{2,4}",
    "a*b+c?",
    "(🐋|鲸鱼|é){2}",
    r"[0-9_x]+@[a-z]+\.(com|org)",
    r'"(\\.|[^"\\])*"',
    "(a|aa)*?b",
    r".{3}\n.{0,2}",
    r"\x41\u0042\t/",
]


@pytest.fixture(scope="module", params=["deepseek", "kimi", "llama2"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Folder) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(request.param))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return compiler_of(tokenizer)


@pytest.fixture(scope="module")
def any_compiler(tokenizer_folder: Folder) -> GrammarCompiler:
    return compiler_of(load_tokenizer(tokenizer_folder("deepseek")))


def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + SURPLUS, tokenizer.eos_ids)


def compiled(compiler: GrammarCompiler, structure: Structure) -> Grammar:
    return compiler.compile(structure.kind, structure.source)


tried_once = functools.cache(grammar_processes().try_out)


@pytest.fixture
def trials_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar goes to its trial in a process once, not once for each tokenizer: of a tokenizer it knows nothing."""
    monkeypatch.setattr(GrammarProcesses, "try_out", lambda _, *asked: tried_once(*asked))


def is_valid(schema: dict[str, Any], text: str) -> bool:
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True).is_valid(json.loads(text))


@pytest.mark.thin(meet=1)
@pytest.mark.usefixtures("trials_shared")
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_holds_to_its_schema(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    grammar = compiled(compiler, Structure.json_schema(SCHEMAS[name]))
    for text in random_texts(grammar, tokenizer, range(12)):
        assert is_valid(SCHEMAS[name], text), text


@pytest.mark.thin(meet=1)
@pytest.mark.usefixtures("trials_shared")
@pytest.mark.parametrize("pattern", REGEXES)
def test_a_text_matches_its_regex(compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    grammar = compiled(compiler, Structure.regex(pattern))
    for text in random_texts(grammar, tokenizer, range(12)):
        assert re.fullmatch(pattern, text), text


def test_every_choice_can_be_made_and_no_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = [
        "a",
        "ab",
        "b a",
        'q"uo\\te',
        "tab\tnewline\n",
        "🐋",
        "</s>",
        "[EOS]",
        "<｜end｜>",
        "start: /x/",
        "\x00é",
    ]
    grammar = compiled(compiler, Structure.choice(choices))
    for choice in choices:
        assert takes(grammar, tokenizer.encode("x" + choice, add_bos=False)[-len(choice.encode()) :]) or takes(
            grammar, bytewise(tokenizer, choice)
        )
    assert set(random_texts(grammar, tokenizer, range(40))) <= set(choices)
    assert not takes(grammar, bytewise(tokenizer, "abc"))


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as tokens of one byte."""
    from latentkv.text.token_bytes import token_bytes

    content = token_bytes(tokenizer)
    return [content.index(bytes([byte])) for byte in text.encode()]


def test_a_text_follows_its_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    sums = 'start: sum\nsum: product ("+" product)*\nproduct: atom ("*" atom)*\natom: /[0-9]{1,3}/ | "(" sum ")"'
    for text in random_texts(compiled(compiler, Structure.grammar(sums)), tokenizer, range(30)):
        depth = 0
        for character in text:
            depth += (character == "(") - (character == ")")
            assert depth >= 0
        assert depth == 0
        eval(re.sub(r"\b0+(?=\d)", "", text))  # arithmetic, as Python reads it


def test_a_date_and_time_is_one(any_compiler: GrammarCompiler, tokenizer_folder: Folder) -> None:
    schema = {"type": "string", "format": "date-time"}
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    for text in random_texts(compiled(any_compiler, Structure.json_schema(schema)), tokenizer, range(12)):
        # Which minutes had a leap second is more than a pattern can know.
        assert is_valid(schema, text.replace(":60", ":59")), text


def test_any_json_object_is_one(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for text in random_texts(compiled(compiler, Structure.json_object()), tokenizer, range(12)):
        assert isinstance(json.loads(text), dict)


def small_schemas() -> st.SearchStrategy[dict[str, Any]]:
    numbers = st.integers(-50, 50)
    characters = st.characters(exclude_categories=["Cs", "Cc"])
    leaves = st.one_of(
        st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "string"}, {"type": "integer"}]),
        st.builds(
            lambda kind, low, span: {"type": kind, "minimum": low, "maximum": low + span},
            st.sampled_from(["integer", "number"]),
            numbers,
            st.integers(1, 1000),
        ),
        st.builds(
            lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span}, *[st.integers(0, 5)] * 2
        ),
        st.builds(
            lambda values: {"enum": values}, st.lists(st.none() | numbers | st.text(characters, max_size=6), min_size=1)
        ),
        st.builds(lambda value: {"const": value}, st.text(characters, max_size=6) | st.lists(numbers, max_size=3)),
    )

    def inside(schemas: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.text(characters, min_size=1, max_size=4)
        properties = st.dictionaries(names, schemas, min_size=1, max_size=3)
        return st.one_of(
            st.builds(
                lambda items, most: {"type": "array", "items": items, "maxItems": most}, schemas, st.integers(0, 3)
            ),
            st.builds(
                lambda each, count: {
                    "type": "object",
                    "properties": each,
                    "required": list(each)[:count],
                    "additionalProperties": False,
                },
                properties,
                st.integers(0, 3),
            ),
            st.builds(lambda options: {"anyOf": options}, st.lists(schemas, min_size=1, max_size=3)),
        )

    return st.recursive(leaves, inside, max_leaves=5)


@settings(max_examples=25, deadline=None)
@given(schema=small_schemas())
def test_json_holds_to_any_small_schema(any_compiler: GrammarCompiler, tokenizer_folder: Folder, schema) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    grammar = compiled(any_compiler, Structure.json_schema(schema))
    for seed in range(4):
        text = random_text(grammar, tokenizer, seed, max_tokens=200)
        assert text is None or is_valid(schema, text), text


def test_a_models_surplus_ids_and_end_tokens_are_never_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    for structure in (
        Structure.regex("(?s:.)*"),
        Structure.grammar("start: (<[*]>)+"),
        Structure.grammar('start: A\nA: ~"a"'),
    ):
        state = compiled(compiler, structure).start()
        for _ in range(3):
            assert state.allowed.shape == (size + SURPLUS,)
            assert not state.allowed[size:].any()
            assert not state.allowed[list(tokenizer.eos_ids)].any()
            state.accept(int(state.allowed.nonzero()[0][5]))


def test_special_tokens_are_never_taken_for_their_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for structure in (Structure.regex("(?s:.)*"), Structure.grammar('start: A\nA: ~"a"')):
        allowed = compiled(compiler, structure).start().allowed
        assert not allowed[list(tokenizer.special_ids)].any()


def test_a_grammar_may_ask_for_a_special_token_by_its_number(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    special = max(tokenizer.special_ids - tokenizer.eos_ids)
    grammar = compiled(compiler, Structure.grammar(f'start: <[{special}]> "a"'))
    assert takes(grammar, [special, *bytewise(tokenizer, "a")])
    assert not takes(grammar, bytewise(tokenizer, "a"))


def test_text_without_a_choice_may_be_cut_into_any_tokens(
    any_compiler: GrammarCompiler, tokenizer_folder: Folder
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    for options in ("", '%llguidance {"no_forcing": false}\n'):
        grammar = compiled(any_compiler, Structure.grammar(f'{options}start: "The whale"'))
        assert takes(grammar, bytewise(tokenizer, "The whale"))
        assert takes(grammar, tokenizer.encode("The whale", add_bos=False))


def test_a_key_that_the_schema_describes_cannot_be_written_as_another(
    any_compiler: GrammarCompiler, tokenizer_folder: Folder
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    schema = {
        "properties": {"a": {"type": "integer"}, "\n": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
    }
    structure = Structure.json_schema({"type": "object", **schema})
    inline = Structure.grammar(f"start: %json {structure.source}")
    for grammar in (compiled(any_compiler, structure), compiled(any_compiler, inline)):
        for text in (
            '{"a":1}',
            '{"b":true}',
            '{"a":true}',
            r'{"\u0061":true}',
            r'{"\n":true}',
            r'{"\u000a":true}',
            r'{"\t":true}',
        ):
            assert takes(grammar, bytewise(tokenizer, text)) == (is_valid(schema, text)), text


def test_blanks_between_the_signs_of_json_are_few(any_compiler: GrammarCompiler, tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    grammar = compiled(any_compiler, Structure.json_object())
    for text, taken in {
        '{"a":1,"b":[]}': True,
        '{"a": 1, "b": []}': True,
        '{\n    "a": 1,\n    "b": []\n}': True,
        "{\n" + " " * 40 + "}": True,
        "{\n" + " " * 41 + "}": False,
        "{  }": False,
        "{\n\n}": False,
        " {}": False,
        "{} ": False,
    }.items():
        assert takes(grammar, bytewise(tokenizer, text)) == taken, text


def test_texts_go_their_own_ways(any_compiler: GrammarCompiler, tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    grammar = compiled(any_compiler, Structure.regex("ab|cd"))
    first, second = grammar.start(), grammar.start()
    a, b, c, d = bytewise(tokenizer, "abcd")
    assert first.accept(a) and second.accept(c)
    assert first.allowed.nonzero()[0].tolist() == [b] and second.allowed.nonzero()[0].tolist() == [d]
    assert not first.may_end
    assert not first.accept(b) and first.may_end


# What is refused


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure.regex("a(?=b)"), "^The regular expression cannot be used: look-around, .* is not supported.$"),
        (Structure.regex(r"(a)\1"), "^The regular expression cannot be used: backreferences are not supported.$"),
        (Structure.regex("(a"), "^The regular expression cannot be used: unclosed group.$"),
        (Structure.json_schema({"$ref": "#"}), "^The JSON schema cannot be used: no text follows it.$"),
        (Structure.regex("(a){0}"), "^The regular expression allows no text"),
        (Structure.json_schema({"type": "strin"}), "^The JSON schema cannot be used: Invalid type: strin.$"),
        (
            Structure.json_schema({"properties": {"a": {"nullable": True}}}),
            "'nullable' at #/properties/a, which cannot",
        ),
        (Structure.json_schema({"uniqueItems": True}), "'uniqueItems' at #, which cannot be enforced"),
        (Structure.json_schema({"$ref": "http://localhost/"}), "at # to 'http://localhost/', which is not fetched"),
        (Structure.json_schema({"$ref": "#/$defs/none"}), "cannot be used: .*none"),
        (Structure.json_schema({"allOf": [{"type": "null"}, {"type": "object"}]}), "cannot be used: Unsatisfiable"),
        (
            Structure.json_schema({"oneOf": [{"minimum": 1}, {"maximum": 3}]}),
            "cannot be used: of a oneOf .*; use anyOf.$",
        ),
        (Structure.grammar("start: foo"), '^The grammar cannot be used: at 1\\(8\\): unknown name: "foo".$'),
        (Structure.grammar("begin: /a/"), "^The grammar cannot be used: "),
        (Structure.grammar('start: <｜end｜> "a"'), "names the special token <｜end｜>: write its number"),
        (Structure.json_schema({"oneOf": [{"type": "string"}, {"minLength": 1}]}), "of a oneOf .* use anyOf"),
        (Structure.grammar('{"grammars": [{"json_schema": {"x-guidance": {"lenient": true}}}]}'), "cannot be used"),
    ],
)
def test_a_bad_structure_is_refused_in_one_sentence(any_compiler: GrammarCompiler, structure, message) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compiled(any_compiler, structure)
    assert "\n" not in str(caught.value)


def chain(length: int) -> str:
    return "start: R0\n" + "".join(f'R{i}: "a" R{i + 1}\n' for i in range(length)) + f'R{length}: "b"'


BOMBS = {
    "states": Structure.json_schema({"type": "integer", "multipleOf": 10_000_019}),
    "states inside": Structure.grammar('start: %json {"type": "integer", "multipleOf": 10000019}'),
    "common multiples": Structure.json_schema(
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949)]}
    ),
    "stack": Structure.grammar(chain(3_000)),
    "parentheses": Structure.regex("(" * 30_000 + "a" + ")" * 30_000),
    "depth": Structure.json_schema('{"items":' * 200 + "{}" + "}" * 200),
    "and, not": Structure.grammar(
        "start: A\nA: /(.|\\n)*a(.|\\n){10}/ & ~/(.|\\n)*b(.|\\n){12}/ & /(.|\\n)*c(.|\\n){14}/"
    ),
    "cycle": Structure.json_schema({"allOf": [{"$ref": "#"}, {"type": "object"}]}),
    "itself": Structure.json_schema({"$ref": "#"}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_too_much_work_is_refused_in_time_and_stalls_nobody(any_compiler: GrammarCompiler, name: str) -> None:
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            compiled(any_compiler, BOMBS[name])
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    compiled(any_compiler, Structure.regex("[0-9]{2}"))  # meanwhile
    thread.join()  # the compiler's own limits end it
    assert isinstance(outcome[0], RequestError)


HEAVY = {
    "nested repetition": Structure.regex("(a{1,1000}){1,1000}"),
    "thrice nested repetition": Structure.regex("(([ab]{1,100}){1,100}c?){1,100}"),
    "optional repetition": Structure.regex("(([a-z]?){1000}){1000}"),
    "many ways": Structure.regex("(a|aa|aaa|a*)*b"),
    "far back": Structure.regex("(.|\n)*a(.|\n){60}"),
    "large enum": Structure.json_schema({"enum": [f"value {i}" for i in range(3_500)]}),
    "many items": Structure.json_schema({"items": {"type": "array", "maxItems": 10**9}, "maxItems": 10**9}),
    "many required items": Structure.json_schema({"type": "array", "items": {"type": "null"}, "minItems": 10**9}),
    "long string": Structure.json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many properties": Structure.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1_500)}}),
    "repeated rules": Structure.grammar('start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'),
    "ambiguity": Structure.grammar('start: x{1,500}\nx: "a" | x x | y\ny: x x x | "a"'),
}


def cpu_seconds_of_a_known_work(_: int) -> float:
    """What this machine takes for a million additions, now."""
    started = time.process_time()
    sum(range(1_000_000))
    return time.process_time() - started


@pytest.mark.parametrize("name", HEAVY)
def test_what_is_much_work_takes_no_step_long(any_compiler: GrammarCompiler, name: str) -> None:
    grammar = compiled(any_compiler, HEAVY[name])
    unit = min(map(cpu_seconds_of_a_known_work, range(3)))
    for seed in range(3):
        state, rng = grammar.start(), random.Random(seed)
        for _ in range(100):
            started = time.process_time()
            goes_on = state.accept(int(rng.choice(state.allowed.nonzero()[0])))
            assert time.process_time() - started < 50 * unit  # some 20 ms, where the unit is 10 ms
            if not goes_on:
                break


def tried(structure: Structure) -> tuple[str, int]:
    """What the trial of a structure gives, in a process of its own."""
    with closing(GrammarProcesses()) as processes:
        return processes.try_out(as_lark(structure.kind, structure.source), "regular expression", 0)


def test_a_trial_ends_when_its_time_or_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "WAIT_SECONDS", 0.001)
        with pytest.raises(RequestError, match=r"was not compiled within 0.001 s: simplify it, or try again"):
            tried(Structure.regex("a"))
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "COMPILE_SECONDS", 0.02)
        with pytest.raises(RequestError, match=r"takes more than 0.02 s to compile: simplify it"):
            tried(HEAVY["many properties"])
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "COMPILE_MEMORY", 1 << 20)
        with pytest.raises(RequestError, match="is too large or nests too deeply"):
            tried(Structure.regex("a"))
    assert tried(Structure.regex("a"))[0] == ""


def test_a_trial_finds_nothing_of_those_before_and_one_process_serves_them_all() -> None:
    large, small = (as_lark("json_schema", json.dumps({"enum": list(range(n))})) for n in (3_000, 1))
    with closing(GrammarProcesses()) as processes:
        sizes = [processes.try_out(grammar, "grammar", 0)[1] for grammar in (large, small, large, small)]
        serving = worker_processes("grammar_worker.py")
        assert processes.try_out(small, "grammar", 0)[0] == ""
        assert worker_processes("grammar_worker.py") == serving
    assert sizes[2] > 0.8 * sizes[0] > 1.5 * sizes[1] and sizes[3] > 0.8 * sizes[1]


def test_a_grammar_whose_states_are_used_up_is_compiled_anew(
    tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar_module.PARSER_LIMITS, "max_lexer_states", 200)
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    compiler, structure = compiler_of(tokenizer), Structure.regex("(.|\n)*a(.|\n){60}")
    a, b, *_ = bytewise(tokenizer, "ab")
    grammar = compiled(compiler, structure)
    state = grammar.start()
    steps = 0
    while state.accept((a, b)[steps * steps % 7 % 2]):
        steps += 1
    assert not state.may_end
    assert compiled(compiler, structure) is not grammar
    assert compiled(compiler, structure).start().accept(a)


# The cache


def test_a_structure_is_compiled_once(any_compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure.regex("once")
    first = compiled(any_compiler, structure)
    monkeypatch.setattr(grammar_module, "as_lark", None)
    assert compiled(any_compiler, Structure.regex("once")) is first


@pytest.mark.parametrize(("limit", "value"), [("MAX_CACHED", 2), ("MAX_CACHED_BYTES", 1 << 20)])
def test_the_cache_drops_what_was_not_used_longest(
    tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    compiler = compiler_of(load_tokenizer(tokenizer_folder("deepseek")))
    monkeypatch.setattr(grammar_module, limit, value)
    monkeypatch.setattr(GrammarProcesses, "try_out", lambda *args: ("", 400 << 10))
    a, b, c = (Structure.regex(letter) for letter in "abc")
    first, second = compiled(compiler, a), compiled(compiler, b)
    assert compiled(compiler, a) is first
    compiled(compiler, c)
    assert compiled(compiler, a) is first
    assert compiled(compiler, b) is not second


def test_many_threads_get_the_same_grammar(any_compiler: GrammarCompiler) -> None:
    found: list[Grammar] = []
    structure = Structure.json_schema({"type": "integer", "multipleOf": 1_003})
    threads = [threading.Thread(target=lambda: found.append(compiled(any_compiler, structure))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({id(grammar) for grammar in found}) <= grammar_module._COMPILATIONS_AT_ONCE
