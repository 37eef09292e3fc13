"""docs/reliability.md, lines 1, 2, 8, 11 and 18: nothing that happens beside a request changes its answer."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from latentkv import LLM, SamplingParams
from latentkv.engine import Engine, Event, Request
from latentkv.engine.thread import EngineThread
from latentkv.errors import RequestError
from latentkv.ops import merge_states

PROMPTS = [
    "It was a dark night, and the old captain",
    "The whale",
    "She had never seen such a house before; the walls were covered with books, and in the middle of the room there "
    "stood a table with nothing on it but a lamp and a letter that nobody had opened. " * 6,
]
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="fp32", kv_cache_bytes=16 << 20)


def tokens_of(engine: Engine, requests: list[Request]) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in requests]
    for event in engine.run(requests):
        result[event.index].append(event.token_id)
    return result


@torch.inference_mode()
def dense(llm: LLM, prompt: tuple[int, ...], said: list[int]) -> list[int]:
    """The likeliest token at each place of an answer, without pages, chunks, batches or a cache.

    Where that is what was said there, a loop that reads all again for each token would have said the same.
    """
    hidden = llm.decoder.forward_train(torch.tensor([[*prompt, *said[:-1]]]))
    return llm.decoder.logits(hidden[0, len(prompt) - 1 :]).argmax(dim=1).tolist()


def test_line_01_chunked_paged_batched_and_prefix_shared_give_what_a_dense_loop_gives(llm: LLM) -> None:
    requests = [llm.request(prompt, PARAMS) for prompt in PROMPTS]
    for step_tokens in (7, 2048):
        engine = Engine(llm.decoder, llm.cache, step_tokens=step_tokens)
        alone = [tokens_of(engine, [request])[0] for request in requests]
        for request, said in zip(requests, alone, strict=True):
            assert said == dense(llm, request.prompt_token_ids, said), "alone"
        assert engine.counters.prefix_hits == 0
        assert tokens_of(engine, requests) == alone, "together, and their prefixes known"
        assert engine.counters.prefix_hits > 0
    llm.cache.check()


def test_line_02_nan_in_stale_cache_pages_reaches_no_answer(llm: LLM) -> None:
    request = llm.request(PROMPTS[0], PARAMS)
    for storage in llm.cache.storage:
        storage.fill_(math.nan)
    (said,) = tokens_of(Engine(llm.decoder, llm.cache), [request])
    assert said == dense(llm, request.prompt_token_ids, said)


def test_line_02_merging_an_empty_part_changes_nothing_and_two_empty_parts_stay_empty() -> None:
    out, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    empty, none = torch.zeros(3, 2, 4), torch.full((3, 2), -math.inf)
    for first, second in (((out, lse), (empty, none)), ((empty, none), (out, lse))):
        merged, merged_lse = merge_states(*first, *second)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = merge_states(empty, none, empty, none)
    assert torch.equal(merged, empty) and torch.equal(merged_lse, none)


def test_line_08_every_request_gets_exactly_one_last_answer_even_if_steps_fail(monkeypatch) -> None:
    llm = LLM(dtype="fp32", kv_cache_bytes=4 << 20)
    submit, calls = llm.engine.runner.submit, 0

    def sometimes(*args):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise RuntimeError("a step failed")
        return submit(*args)

    monkeypatch.setattr(llm.engine.runner, "submit", sometimes)
    thread = EngineThread(llm.engine)
    thread.start()
    got: dict[int, list[Event | Exception]] = {}
    done = threading.Semaphore(0)

    def listener(number: int):
        got[number] = []

        def listen(event: Event | Exception) -> None:
            got[number].append(event)
            if isinstance(event, Exception) or event.finish_reason:
                done.release()

        return listen

    for number in range(30):
        params = SamplingParams(max_tokens=1 + number % 5, seed=number, ignore_eos=True)
        thread.submit(llm.request(PROMPTS[number % 2], params), listener(number))
    assert all(done.acquire(timeout=20) for _ in range(30))
    assert thread.drain(5)
    for number, events in got.items():
        last = [isinstance(event, Exception) or event.finish_reason is not None for event in events]
        assert last == [False] * (len(events) - 1) + [True], number
    assert any(isinstance(events[-1], RuntimeError) for events in got.values())
    assert any(isinstance(events[-1], Event) for events in got.values())
    llm.cache.check()
    assert llm.cache.pool.free_pages == llm.cache.num_pages


@pytest.mark.parametrize("given", [{"logit_bias": {1 << 20: 1.0}}, {"stop_token_ids": (1 << 20,)}])
def test_line_11_token_ids_outside_the_vocabulary_are_refused_at_the_door(llm: LLM, given: dict) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        llm.request("x", SamplingParams(**given))
    with pytest.raises(RequestError, match="vocabulary"):
        llm.request([1 << 20])


def test_line_18_prefixes_are_shared_within_a_salt_only(llm: LLM) -> None:
    engine = Engine(llm.decoder, llm.cache)
    request = llm.request(PROMPTS[2], SamplingParams(max_tokens=1))

    def hits(salt: str) -> int:
        before = engine.counters.prefix_hits
        engine.add(request, salt=salt)
        while not engine.step():
            pass
        return engine.counters.prefix_hits - before

    assert hits("a") == 0
    assert hits("b") == 0
    assert hits("a") > 0


def test_line_18_a_prefix_is_found_by_its_tokens_not_by_a_hash_of_them(llm: LLM) -> None:
    # hash(-1) == hash(-2) in CPython: keys that collide must still be told apart.
    from latentkv.state import PagePool, PrefixIndex

    pool = PagePool(4)
    index = PrefixIndex(pool, 1)
    (page,) = pool.allocate(1)
    assert hash((0, (-1,))) == hash((0, (-2,)))
    index.add("", None, [-1], page)
    assert index.find("", [-2]) == []
    assert [known.page for known in index.find("", [-1])] == [page]
