"""A model that selects the tokens it reads gives the same text whatever becomes of its pages."""

from __future__ import annotations

import pytest
from offload_cases import ask, naive, tokens
from workloads import Foreseen

from engine_models import cache_for, tiny_decoder
from latentkv.engine import Engine
from latentkv.engine.drafts import NGramDrafter
from latentkv.errors import CacheError

KINDS = ["sparse", "pooled", "hy4"]  # the second selects pools, in layers that share what is selected
PROMPT = [(7 * i + i * i) % 60 for i in range(20)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [3, 2048])
def test_greedy_equals_a_loop_without_a_cache(chunk: int, kind: str) -> None:
    decoder = tiny_decoder(kind)
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:9]]
    engine = Engine(decoder, cache_for(decoder, 20), step_tokens=chunk)
    assert tokens(engine, *map(ask, prompts)) == [naive(decoder, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_of_a_shared_beginning_are_those_of_who_read_it_first(kind: str) -> None:
    decoder = tiny_decoder(kind)
    engine = Engine(decoder, cache_for(decoder, 20))
    tokens(engine, ask(PROMPT))
    longer = [*PROMPT[:16], 9, 5]
    assert tokens(engine, ask(longer)) == [naive(decoder, longer, 6)]
    assert engine.counters.prefix_hits == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_that_gave_its_pages_back_goes_on_as_before(kind: str) -> None:
    decoder = tiny_decoder(kind)
    engine = Engine(decoder, cache_for(decoder, 7))
    prompts = [PROMPT[i : i + 9] for i in range(3)]
    texts = tokens(engine, *(ask(prompt, max_tokens=20) for prompt in prompts))
    assert engine.counters.preemptions > 0
    assert texts == [naive(decoder, prompt, 20) for prompt in prompts]


def test_what_a_draft_may_add_has_room_in_the_rings() -> None:
    decoder = tiny_decoder("pooled")
    with pytest.raises(CacheError, match="room for drafts of 2 tokens, not 3"):
        Engine(decoder, cache_for(decoder, 20, most_drafted=2), drafter=NGramDrafter(shortest=1), most_drafted=3)
    engine = Engine(decoder, cache_for(decoder, 20, most_drafted=3), drafter=Foreseen("pooled"), most_drafted=3)
    prompts = [PROMPT[:n] for n in (5, 6, 7, 8)]
    texts = tokens(engine, *(ask(prompt, max_tokens=20) for prompt in prompts))
    assert texts == [naive(decoder, prompt, 20) for prompt in prompts]
    assert 0 < engine.counters.accepted_tokens < engine.counters.drafted_tokens
