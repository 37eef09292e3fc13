"""Where a text with recurrent layers can be gone on from, and that it is the state of exactly that token."""

from collections.abc import Iterator

import pytest
from offload_cases import ask, tokens
from workloads import Foreseen, alone, decoder

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Request, SamplingParams, Sequence, snapshots
from latentkv.engine.drafts import Wish
from latentkv.engine.runner import Runner
from latentkv.engine.scoring import score_text, sequence_logits
from latentkv.errors import CacheError
from latentkv.kernels import available_backends
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, pack_module
from latentkv.state import PagedCache

KIND = "hybrid mla"
TEXT = [(7 * i * i + 3 * i + 5) % VOCAB for i in range(64)]  # 8 pages


@pytest.fixture(autouse=True)
def _short_prompts_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(snapshots, "LEAST_PAGES", 1)
    yield


def naive(prompt: list[int], count: int) -> list[int]:
    return alone(KIND, tuple(prompt), count)


def engine_for(*, pages: int = 40, slots: int = 6, every: int = 64, most_drafted: int = 5, **options) -> Engine:
    cache = cache_for(decoder(KIND), pages, num_slots=slots, most_drafted=most_drafted)
    return Engine(decoder(KIND), cache, snapshot_every=every, most_drafted=most_drafted, **options)


def hits(engine: Engine, prompt: list[int], count: int = 3) -> int:
    """Tokens of a prompt that were found; those that follow it are right."""
    before = engine.counters.prefix_hits
    assert tokens(engine, ask(prompt, max_tokens=count)) == [naive(prompt, count)]
    return engine.counters.prefix_hits - before


def test_a_prompt_is_gone_on_from_at_its_last_page_and_nowhere_before():
    engine = engine_for()
    assert hits(engine, TEXT[:30]) == 0
    assert hits(engine, TEXT[:30]) == 24
    assert hits(engine, TEXT[:25]) == 24
    assert hits(engine, TEXT[:24]) == 0  # its last token is read: there is no state of 16 tokens
    assert hits(engine, TEXT[:24]) == 16
    assert hits(engine, [*TEXT[:29], 9, 9, 9, 9, 9]) == 24
    assert hits(engine, [*TEXT[:20], 9, 9, 9, 9, 9]) == 16


def test_a_prompt_of_which_little_is_new_is_read_in_one_step_and_has_no_snapshot_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(snapshots, "LEAST_PAGES", 3)
    engine = engine_for()
    assert hits(engine, TEXT[:23], 1) == 0 and engine.counters.steps == 1
    assert hits(engine, TEXT[:23], 1) == 0 and engine.counters.steps == 2
    assert hits(engine, TEXT[:30], 1) == 0 and engine.counters.steps == 4
    assert hits(engine, TEXT[:47], 1) == 24 and engine.counters.steps == 5
    assert hits(engine, TEXT[:47], 1) == 24
    assert hits(engine, TEXT[:50], 1) == 24 and engine.counters.steps == 8
    assert hits(engine, TEXT[:50], 1) == 48


def test_long_prompts_are_gone_on_from_every_so_many_pages():
    engine = engine_for(every=2)
    assert hits(engine, TEXT[:60]) == 0
    for end in (57, 55, 48, 33, 31, 15):
        again = engine_for(every=2)
        tokens(again, ask(TEXT[:60], max_tokens=1))
        assert hits(again, [*TEXT[:end], 60], 1) == (56 if end >= 56 else end // 16 * 16)


def test_the_next_turn_goes_on_from_the_last_page_of_the_answer():
    for drafter in (None, Foreseen(KIND)):
        for count in (9, 13, 20):
            engine = engine_for(drafter=drafter)
            prompt = TEXT[:20]
            (answer,) = tokens(engine, ask(prompt, max_tokens=count))
            text = [*prompt, *answer]
            assert engine.cache.slots.num_snapshots == 2  # of the prompt, and of the answer
            assert hits(engine, [*text, 3, 4]) == (len(text) - 1) // 8 * 8


def test_drafts_that_cross_the_end_of_a_page_leave_the_state_at_its_end():
    engine = engine_for(drafter=Foreseen(KIND))
    slots, waited = engine.cache.slots, 0
    for first in range(6):
        prompt = TEXT[first : first + 12]
        (answer,) = tokens(engine, ask(prompt, max_tokens=22))
        for snapshot in engine._scheduler.prefixes._snapshots.values():
            waited += snapshot.num_tokens % 8 > 0
        assert answer == naive(prompt, 22)
        assert hits(engine, [*prompt, *answer]) == 32
    assert waited > 1, "no snapshot was made of a draft"
    assert slots.free_slots == slots.num_slots


def test_a_sequence_that_was_pushed_out_goes_on_from_its_last_snapshot():
    engine = engine_for(pages=7, slots=6)
    prompts = [TEXT[:18], TEXT[20:37]]
    got = tokens(engine, *[ask(prompt, max_tokens=20) for prompt in prompts])
    assert got == [naive(prompt, 20) for prompt in prompts]
    assert engine.counters.preemptions == 1
    assert engine.counters.prefix_hits == 16


def test_a_prompt_waits_for_another_that_is_about_to_get_where_it_could_go_on():
    engine = engine_for(step_tokens=8)
    first, second = ask(TEXT[:30], max_tokens=2), ask([*TEXT[:27], 9, 9], max_tokens=2)
    assert tokens(engine, first, second) == [naive(list(each.prompt_token_ids), 2) for each in (first, second)]
    assert engine.counters.prefix_hits == 24


def test_sequences_wait_for_slots():
    engine = engine_for(slots=2)
    for i in range(5):
        engine.add(ask(TEXT[i : i + 9], max_tokens=4))
    left, most = 5, 0
    while left:
        left -= sum(event.finish_reason is not None for event in engine.step())
        most = max(most, engine.num_running)
    assert most == 2


def test_snapshots_take_no_room_from_sequences_and_the_one_not_used_for_longest_goes_first():
    engine = engine_for(slots=3)
    for start in (0, 10, 20):
        assert hits(engine, TEXT[start : start + 10], 1) == 0
    assert hits(engine, TEXT[20:30], 1) == 8
    assert hits(engine, TEXT[10:20], 1) == 8
    assert hits(engine, TEXT[30:40], 1) == 0
    assert hits(engine, TEXT[10:20], 1) == 8
    assert hits(engine, TEXT[0:10], 1) == 0


def test_where_only_the_slot_of_a_snapshot_is_free_it_is_gone_on_from_there():
    engine = engine_for(slots=2)
    assert hits(engine, TEXT[:17], 1) == 0
    other = engine.cache.slots.allocate()
    assert hits(engine, TEXT[:17], 1) == 16
    assert engine.cache.slots.num_snapshots == 0
    engine.cache.slots.free(other)
    assert hits(engine, TEXT[:17], 1) == 0


def test_texts_are_scored_beside_requests_as_far_as_there_are_slots():
    engine, alone = engine_for(slots=3), engine_for(slots=6)
    want = score_text(alone.runner, TEXT, 16).nats
    engine.add(ask(TEXT[:9], max_tokens=4))
    engine.step()
    assert score_text(engine.runner, TEXT, 16).nats == pytest.approx(want, rel=1e-6)
    engine.add(ask(TEXT[5:9], max_tokens=4))
    engine.add(ask(TEXT[6:9], max_tokens=4))
    engine.step()
    with pytest.raises(CacheError, match="all 3 slots"):
        sequence_logits(engine.runner, TEXT)
    assert engine.cache.slots.free_slots == 0
    while len(engine._jobs):
        engine.step()
    assert engine.cache.slots.free_slots == 3 and engine.cache.pool.free_pages == 40


def test_embedding_texts_and_scoring_them_give_slots_back_when_they_fail():
    runner = Runner(decoder(KIND), cache_for(decoder(KIND), 8, num_slots=2))
    with pytest.raises(CacheError, match="slots"), runner.sequences([[1], [2], [3]]):
        pass
    assert runner.cache.slots.free_slots == 2 and runner.cache.pool.free_pages == 8


def test_no_snapshot_is_made_of_what_is_shared_with_nobody():
    engine = engine_for()
    request = Request.create(
        TEXT[:20], SamplingParams(max_tokens=3, prompt_logprobs=0), vocab_size=VOCAB, max_context=128
    )
    tokens(engine, request)
    assert engine.cache.slots.num_snapshots == 0


def test_a_cache_without_room_for_the_drafts_is_refused():
    model: Decoder = decoder(KIND)
    with pytest.raises(CacheError, match="drafts of 2 tokens, not 3"):
        Engine(model, cache_for(model, 8, most_drafted=2), drafter=Foreseen(KIND), most_drafted=3)
    Engine(model, cache_for(model, 8, most_drafted=0))


class Parrot:
    """Drafts what is known to come, and something else from some token on."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        return [self.draft(len(wish.sequence.tokens), wish.most) for wish in wishes]

    def forget(self, sequence: Sequence) -> None:
        pass

    def draft(self, start: int, most: int) -> list[int]:
        right = self.text[start : start + start % (most + 1)]
        return [*right, *[(token + 1) % VOCAB for token in self.text[start + len(right) : start + most]]]


@pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")
@pytest.mark.parametrize("kind", ["bailing mtp", "kimi", "ling25 mtp"])
def test_recorded_steps_with_drafts_choose_the_tokens_of_single_steps(kind: str):
    model = tiny_decoder(kind).bfloat16()
    model.keep_choices_exact()
    pack_module(model, Packing())
    specs = model.config.specs("bf16", most_drafted=3)
    prompt = TEXT[:13]
    plain = Engine(model, PagedCache(specs, 20, page_size=8, num_slots=3))
    (expected,) = tokens(plain, ask(prompt, max_tokens=40))
    cache = PagedCache(specs, 20, page_size=8, num_slots=3)
    drafted = Engine(model, cache, drafter=Parrot([*prompt, *expected]), most_drafted=3)
    assert tokens(drafted, ask(prompt, max_tokens=40)) == [expected]
    assert drafted.counters.accepted_tokens > 15
    for engine in (plain, drafted):
        assert engine.runner.replay.why_not is None and engine.runner.replay._steps
    (answer,) = tokens(drafted, ask([*prompt, *expected[:-1]], max_tokens=1))
    assert answer == expected[-1:] and drafted.counters.prefix_hits == 48
