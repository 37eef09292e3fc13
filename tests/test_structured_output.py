"""What the model in this package writes by chance, under a structure, holds to the structure."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest

from latentkv import LLM, SamplingParams, Structure
from latentkv.errors import RequestError

PROMPT = "It was a dark night"
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "boolean"},
    {"enum": ["dark", "darker", "🐋", None]},
    {"type": "array", "items": {"enum": ["night", "day"]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,6}( [a-z]{2,5}){1,2}$"},
    {
        "type": "object",
        "properties": {
            "who": {"type": "string", "minLength": 1, "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "born": {"type": "string", "format": "date"},
        },
        "required": ["who", "age", "born"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_bytes=16 * 2**20)


def ask(structure: Structure, **params: Any) -> SamplingParams:
    return SamplingParams(**{"structure": structure, "temperature": 1.3, "max_tokens": 80, **params})


def finished(llm: LLM, structure: Structure, count: int = 6, **params: Any) -> list[str]:
    """The texts of `count` completions that came to an end; one of them at least."""
    asked = [ask(structure, seed=seed, **params) for seed in range(count)]
    texts = [each.text for each in llm.generate([PROMPT] * count, asked) if each.finish_reason == "stop"]
    assert texts
    return texts


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_json(llm: LLM, schema: dict[str, Any]) -> None:
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for text in finished(llm, Structure.json_schema(schema)):
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 100}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}]
)
def test_regex_under_every_way_to_sample(llm: LLM, params: dict[str, Any]) -> None:
    for text in finished(llm, Structure.regex("[a-z]{2,9}( [a-z]{2,9}){0,2}[.!]"), **params):
        assert re.fullmatch("[a-z]{2,9}( [a-z]{2,9}){0,2}[.!]", text), text


def test_choice(llm: LLM) -> None:
    choices = ["the storm", "the sea", "the sea monster 🐋"]
    assert set(finished(llm, Structure.choice(choices), temperature=50)) <= set(choices)


def test_grammar(llm: LLM) -> None:
    for text in finished(llm, Structure.grammar('start: pair ("; " pair)?\npair: NAME "=" NAME\nNAME: /[a-z]{1,5}/')):
        assert re.fullmatch("[a-z]{1,5}=[a-z]{1,5}(; [a-z]{1,5}=[a-z]{1,5})?", text), text


def test_a_stream_is_the_same_text(llm: LLM) -> None:
    params = ask(Structure.json_schema(SCHEMAS[5]), seed=4)
    whole = llm.generate(PROMPT, params)[0]
    assert "".join(piece.text for piece in llm.stream(PROMPT, params)) == whole.text


def test_beside_others_a_request_writes_what_it_writes_alone(llm: LLM) -> None:
    params = [
        ask(Structure.json_schema(SCHEMAS[5]), seed=1),
        SamplingParams(max_tokens=30, seed=2),
        ask(Structure.regex("[a-z]{5}"), seed=3),
    ]
    alone = [llm.generate(PROMPT, each)[0].text for each in params]
    assert [completion.text for completion in llm.generate([PROMPT] * 3, params)] == alone


def test_a_text_cut_short_says_so(llm: LLM) -> None:
    completion = llm.generate(PROMPT, ask(Structure.regex("[a-z ]{200}"), seed=1, max_tokens=5))[0]
    assert completion.finish_reason == "length" and len(completion.token_ids) == 5


def test_a_bad_structure_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="The regular expression cannot be used"):
        llm.generate(PROMPT, ask(Structure.regex("(a")))
    assert llm.cache.pool.free_pages == llm.cache.num_pages
    with pytest.raises(RequestError, match="structure='a' is not allowed: it must be a Structure"):
        SamplingParams(structure="a")  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_has_no_structures(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = LLM(kv_cache_bytes=16 * 2**20)
    monkeypatch.setattr(bare, "tokenizer", None)
    with pytest.raises(RequestError, match="A structure needs a tokenizer"):
        bare.generate([1, 2], ask(Structure.regex("a")))
