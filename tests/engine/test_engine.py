import pytest
import torch

from engine_models import CONFIGS, VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Request, SamplingParams
from latentkv.errors import CacheError, CheckpointError, RequestError
from latentkv.models.decoder import Decoder
from latentkv.state import PagedCache

PROMPTS = [[5, 9, 33], [7], [11, 3, 8, 21, 40, 2, 17, 1, 60, 13, 14], [50] * 25]
PAGES = 40


@pytest.fixture(params=CONFIGS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(request.param)


def ask(prompt: list[int], **params) -> Request:
    params = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, **params}
    return Request.create(prompt, SamplingParams(**params), vocab_size=VOCAB, max_context=128)


def tokens_of(events, count: int) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in range(count)]
    for event in events:
        result[event.index].append(event.token_id)
    return result


def run(decoder: Decoder, requests: list[Request], *, pages: int = PAGES, chunk: int = 2048) -> list[list[int]]:
    """What each request produces; the cache must be whole after every event."""
    cache = cache_for(decoder, pages)
    result: list[list[int]] = [[] for _ in requests]
    for event in Engine(decoder, cache, (2,), step_tokens=chunk).run(requests):
        cache.check()
        result[event.index].append(event.token_id)
    assert_all_free(cache)
    return result


def assert_all_free(cache: PagedCache) -> None:
    cache.check()
    assert cache.pool.free_pages == cache.num_pages


@torch.inference_mode()
def naive(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        hidden = decoder.forward_train(torch.tensor([tokens]))
        tokens.append(int(decoder.logits(hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_a_loop_without_a_cache(decoder: Decoder):
    for prompt in PROMPTS:
        assert run(decoder, [ask(prompt)])[0] == naive(decoder, prompt, 12)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_request_gives_the_same_alone_and_in_any_batch(decoder: Decoder, temperature: float):
    requests = [ask(p, temperature=temperature, seed=3, max_tokens=5 + 4 * i) for i, p in enumerate(PROMPTS)]
    alone = [run(decoder, [request])[0] for request in requests]
    assert run(decoder, requests) == alone
    assert run(decoder, requests[::-1]) == alone[::-1]
    # So few pages that requests wait for one another.
    assert run(decoder, requests, pages=7) == alone


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 16])
def test_a_prompt_read_in_chunks_gives_the_same(decoder: Decoder, chunk: int):
    requests = [ask(prompt) for prompt in PROMPTS]
    assert run(decoder, requests, chunk=chunk) == run(decoder, requests)


def test_a_step_never_reads_more_of_the_prompts_than_a_chunk(decoder: Decoder):
    sizes: list[int] = []
    decoder.model.norm.register_forward_pre_hook(lambda norm, args: sizes.append(len(args[0])))
    run(decoder, [ask(prompt, max_tokens=1) for prompt in PROMPTS], chunk=6)
    assert max(sizes) == 6


def test_same_seed_same_tokens_and_other_seeds_others(decoder: Decoder):
    first, again, other = run(decoder, [ask([5, 6], temperature=1, seed=s, max_tokens=30) for s in (1, 1, 2)])
    assert first == again != other


def test_end_tokens_end_unless_ignored(decoder: Decoder):
    greedy = naive(decoder, PROMPTS[0], 12)
    end = greedy[4]
    engine = Engine(decoder, cache_for(decoder, PAGES), (end,))
    cut = greedy[: greedy.index(end) + 1]

    def finish(**params):
        events = list(engine.run([ask(PROMPTS[0], **params)]))
        assert all(event.finish_reason is None for event in events[:-1])
        return [event.token_id for event in events], events[-1].finish_reason

    assert finish(ignore_eos=False) == (cut, "stop")
    assert finish(ignore_eos=True) == (greedy, "length")
    assert finish(ignore_eos=True, stop_token_ids=[end]) == (cut, "stop")
    assert finish(max_tokens=2) == (greedy[:2], "length")


def test_the_text_may_end_a_completion(decoder: Decoder):
    seen: list[tuple[int, int]] = []

    def ends_text(index: int, token: int) -> bool:
        seen.append((index, token))
        return index == 1 and sum(i == 1 for i, _ in seen) == 3

    cache = cache_for(decoder, PAGES)
    events = list(Engine(decoder, cache).run([ask(PROMPTS[0]), ask(PROMPTS[1])], ends_text))
    assert [event.finish_reason for event in events if event.index == 1] == [None, None, "stop"]
    assert len([event for event in events if event.index == 0]) == 12
    assert seen == [(event.index, event.token_id) for event in events]
    assert_all_free(cache)


def test_a_completion_may_fill_the_context_to_its_end(decoder: Decoder):
    assert len(run(decoder, [ask([4] * 100, max_tokens=1000)])[0]) == 28


def test_a_request_that_can_never_fit_is_refused_before_anything_runs(decoder: Decoder):
    cache = cache_for(decoder, 3)
    with pytest.raises(RequestError, match="more than the 24 tokens that the cache holds: lower max_tokens"):
        Engine(decoder, cache).run([ask([1], max_tokens=2), ask([1] * 13, max_tokens=12)])
    assert_all_free(cache)
    assert len(list(Engine(decoder, cache).run([ask([1] * 12, max_tokens=12)]))) == 12


def test_pages_return_when_the_iterator_is_closed_dropped_or_never_started(decoder: Decoder):
    cache = cache_for(decoder, PAGES)
    engine = Engine(decoder, cache)
    events = engine.run([ask(prompt) for prompt in PROMPTS])
    next(events)
    assert cache.pool.free_pages < cache.num_pages
    events.close()
    assert_all_free(cache)
    events = engine.run([ask(PROMPTS[0])])
    next(events)
    del events
    assert_all_free(cache)
    engine.run([ask(PROMPTS[0])])
    assert_all_free(cache)


def test_pages_return_when_a_step_fails(decoder: Decoder):
    cache = cache_for(decoder, PAGES)

    def fail(index: int, token: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Engine(decoder, cache).run([ask(prompt) for prompt in PROMPTS], fail))
    assert_all_free(cache)


def test_logits_that_are_not_finite_are_an_error(decoder: Decoder):
    cache = cache_for(decoder, PAGES)
    decoder.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        list(Engine(decoder, cache).run([ask([1])]))
    assert_all_free(cache)


def test_unfinished_runs_go_on_together(decoder: Decoder):
    cache = cache_for(decoder, 4)
    engine = Engine(decoder, cache)
    first = engine.run([ask([1, 2], max_tokens=10)])
    second = engine.run([ask([3, 4], max_tokens=10)])
    interleaved = [event.token_id for pair in zip(first, second, strict=True) for event in pair]
    assert interleaved[::2] == naive(decoder, [1, 2], 10)
    assert interleaved[1::2] == naive(decoder, [3, 4], 10)
    assert_all_free(cache)


def test_pages_that_others_hold_are_an_error_where_nothing_can_run(decoder: Decoder):
    cache = cache_for(decoder, 4)
    held = cache.pool.allocate(4)
    with pytest.raises(CacheError, match="All but 0 of 4 cache pages are held elsewhere"):
        list(Engine(decoder, cache).run([ask([1])]))
    cache.pool.free(held)
    assert_all_free(cache)


def test_a_failing_step_ends_every_run_that_took_part(decoder: Decoder):
    cache = cache_for(decoder, PAGES)
    engine = Engine(decoder, cache)

    def fail(index: int, token: int) -> bool:
        raise ValueError("no more")

    first, second = engine.run([ask([1, 2])]), engine.run([ask([3, 4])], fail)
    next(first)
    for run in (second, first):
        with pytest.raises(ValueError, match="no more"):
            list(run)
    assert_all_free(cache)


def test_requests_with_the_same_beginning_read_it_once(decoder: Decoder):
    sizes: list[int] = []
    decoder.model.norm.register_forward_pre_hook(lambda norm, args: sizes.append(len(args[0])))
    prompts = [[*[9, 4, 7, 30] * 6, last] for last in (1, 2, 3)]
    together = run(decoder, [ask(prompt, max_tokens=1) for prompt in prompts])
    assert sum(sizes) == 25 + 1 + 1
    assert together == [run(decoder, [ask(prompt, max_tokens=1)])[0] for prompt in prompts]


@pytest.mark.parametrize("salts", [("a", "a"), ("a", "b")])
def test_a_beginning_is_shared_between_steps_within_a_salt_only(decoder: Decoder, salts: tuple[str, str]):
    engine = Engine(decoder, cache_for(decoder, PAGES))
    sizes: list[int] = []
    decoder.model.norm.register_forward_pre_hook(lambda norm, args: sizes.append(len(args[0])))
    for salt in salts:
        engine.add(ask([5] * 17, max_tokens=1), salt=salt)
        engine.step()
    assert sizes == ([17, 1] if salts[0] == salts[1] else [17, 17])


def test_logprobs_are_reported_where_asked(decoder: Decoder):
    events = list(Engine(decoder, cache_for(decoder, PAGES)).run([ask([1, 2], logprobs=2), ask([1, 2])]))
    for event in events:
        if event.index == 1:
            assert event.logprobs is None
        else:
            assert event.logprobs is not None
            assert event.logprobs.token_id == event.token_id == next(iter(event.logprobs.top))
            assert len(event.logprobs.top) == 2
