"""Drafts never change an answer; those of the embedded model's MTP module are often right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from draft_oracle import CheckedMTPDrafter

from latentkv import LLM, SamplingParams
from latentkv.engine import Engine
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import Drafter, NGramDrafter
from latentkv.engine.mtp import MTPDrafter
from latentkv.models.decoder import Decoder
from latentkv.ops import KVFormat
from latentkv.state import PagedCache

PROMPTS = [
    "It was a dark night, and",
    "The old house, the old man, and the old house, the old",
    "The carriage stopped before the gate of the old house. The carriage stopped",
    "He",
]
DRAFTERS: dict[str, Callable[[Decoder, PagedCache], Drafter]] = {
    "ngram": lambda decoder, cache: NGramDrafter(),
    "mtp": MTPDrafter,
    "both": lambda decoder, cache: AdaptiveDrafter(NGramDrafter(), MTPDrafter(decoder, cache)),
}


@cache
def llm(dtype: str) -> LLM:
    return LLM(dtype=dtype, kv_cache_bytes=2**20)


def run(
    dtype: str,
    drafter: Callable[[Decoder, PagedCache], Drafter] | None = None,
    most: int = 0,
    *,
    temperature: float = 0,
    pages: int = 8,
    tokens: int = 36,
    kv_format: KVFormat | None = None,
) -> tuple[list[list[int]], Engine]:
    """Tokens of all prompts in a cache so small that they wait for each other and give their pages back."""
    own, params = llm(dtype), SamplingParams(max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
    specs = own.config.specs(kv_format or own.cache.format, mtp=own.decoder.dtype)
    cache = PagedCache(specs, pages, page_size=16)
    engine = Engine(
        own.decoder, cache, drafter=drafter(own.decoder, cache) if drafter else None, most_drafted=most, step_tokens=24
    )
    answers: list[list[int]] = [[] for _ in PROMPTS]
    for event in engine.run([own.request(prompt, params) for prompt in PROMPTS]):
        answers[event.index].append(event.token_id)
        cache.check()
    assert cache.pool.free_pages == pages
    return answers, engine


@cache
def plain(dtype: str, temperature: float, kv_format: KVFormat | None = None) -> list[list[int]]:
    return run(dtype, temperature=temperature, kv_format=kv_format)[0]


@pytest.mark.parametrize(
    ("drafter", "most", "temperature"),  # every two meet
    [
        pytest.param("ngram", 1, 0, marks=pytest.mark.slow),
        ("ngram", 4, 0.8),
        ("mtp", 1, 0.8),
        pytest.param("mtp", 4, 0, marks=pytest.mark.slow),
        ("both", 1, 0),
        ("both", 4, 0.8),
    ],
)
def test_answers_are_the_same_with_drafts(drafter: str, most: int, temperature: float) -> None:
    answers, engine = run("fp32", DRAFTERS[drafter], most, temperature=temperature)
    assert answers == plain("fp32", temperature)
    assert engine.counters.preemptions > 0
    assert engine.counters.drafted_tokens > 0


@pytest.mark.parametrize(("kv_format", "temperature"), [("bf16", 0.8), ("int8", 0), ("fp8", 0.8), ("bf16", 0)])
def test_answers_are_the_same_in_bf16_where_steps_of_several_tokens_give_the_same_bits(
    kv_format: KVFormat, temperature: float
) -> None:
    answers, engine = run("bf16", MTPDrafter, 3, temperature=temperature, kv_format=kv_format)
    assert answers == plain("bf16", temperature, kv_format)
    assert engine.counters.accepted_tokens > 0


def test_drafts_are_those_of_the_unpaged_module_where_some_are_accepted() -> None:
    _, engine = run("fp32", CheckedMTPDrafter, 2, temperature=0.8)
    assert engine.counters.accepted_tokens > 15
    assert engine.counters.preemptions > 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_embedded_module_is_right_far_more_often_than_by_chance(temperature: float) -> None:
    _, engine = run("bf16", MTPDrafter, 1, temperature=temperature, pages=100, tokens=100)
    assert engine.counters.accepted_tokens > 0.25 * engine.counters.drafted_tokens > 40


def test_a_seed_gives_the_same_text_with_drafts() -> None:
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=4)
    texts = {LLM(speculate=k, kv_cache_bytes=2**20).generate(PROMPTS[0], params)[0].text for k in (0, 4)}
    assert len(texts) == 1
