"""A model with shortcuts to experts, zero experts among them, gives the text that it gives without a cache."""

from __future__ import annotations

import pytest
from offload_cases import ask, naive, tokens

from engine_models import cache_for, tiny_decoder
from latentkv.engine import Engine
from latentkv.engine.drafts import NGramDrafter

PROMPT = [(7 * i + i * i) % 60 for i in range(20)]


@pytest.mark.parametrize("chunk", [3, 2048])
def test_greedy_equals_a_loop_without_a_cache(chunk: int) -> None:
    decoder = tiny_decoder("longcat")
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:9]]
    engine = Engine(decoder, cache_for(decoder, 20), step_tokens=chunk)
    assert tokens(engine, *map(ask, prompts)) == [naive(decoder, prompt, 6) for prompt in prompts]


def test_a_shared_beginning_is_read_once_and_drafts_change_no_token() -> None:
    decoder = tiny_decoder("longcat")
    engine = Engine(decoder, cache_for(decoder, 20), drafter=NGramDrafter(shortest=1), most_drafted=4)
    repeated = [*PROMPT[:16], *PROMPT[:3]]
    tokens(engine, ask(repeated))
    assert tokens(engine, ask([*repeated, 9], max_tokens=30)) == [naive(decoder, [*repeated, 9], 30)]
    assert engine.counters.prefix_hits == 16
    assert engine.counters.drafted_tokens > 0


def test_a_sequence_that_gave_its_pages_back_goes_on_as_before() -> None:
    decoder = tiny_decoder("longcat")
    engine = Engine(decoder, cache_for(decoder, 7))
    prompts = [PROMPT[i : i + 9] for i in range(3)]
    texts = tokens(engine, *(ask(prompt, max_tokens=20) for prompt in prompts))
    assert engine.counters.preemptions > 0
    assert texts == [naive(decoder, prompt, 20) for prompt in prompts]
