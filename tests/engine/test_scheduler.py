import pytest

from engine_models import cache_for, tiny_decoder
from latentkv.engine.scheduler import FAIR_SHARE, Scheduler
from latentkv.engine.sequence import Sequence
from latentkv.state import PagedCache


@pytest.fixture
def cache() -> PagedCache:
    return cache_for(tiny_decoder("mla"), 100)


def go(scheduler: Scheduler, budget: int) -> dict[int, int]:
    """One step: everything that was planned is read, and whoever read all it has gets a new token."""
    shares = scheduler.plan(budget)
    for sequence, count in shares:
        sequence.num_cached += count
    for sequence, _ in shares:
        scheduler.have_read(sequence, sequence.num_cached)
    for sequence, _ in shares:
        if not sequence.num_uncached:
            sequence.tokens.append(1)
    return {sequence.index: count for sequence, count in shares}


def test_those_that_decode_take_part_in_every_step_beside_a_long_prompt(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(0, [1, 2, 3]))
    assert go(scheduler, 16) == {0: 3}
    scheduler.add(Sequence(1, [7] * 100))
    for _ in range(6):
        assert go(scheduler, 16) == {0: 1, 1: 15}
    assert go(scheduler, 16) == {0: 1, 1: 10}
    assert go(scheduler, 16) == {0: 1, 1: 1}


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(0, list(range(600))))
    scheduler.add(Sequence(1, [9] * 100))
    budget = 2 * FAIR_SHARE
    assert go(scheduler, budget) == {0: budget - 100, 1: 100}


def test_a_step_reads_as_many_short_prompts_as_it_has_room_for(cache: PagedCache):
    scheduler = Scheduler(cache)
    for index in range(12):
        scheduler.add(Sequence(index, [index] * 25))
    assert go(scheduler, 2 * FAIR_SHARE) == dict.fromkeys(range(10), 25)
    assert go(scheduler, 2 * FAIR_SHARE) == {**dict.fromkeys(range(10), 1), 10: 25, 11: 25}


def test_a_long_prompt_moves_on_under_a_stream_of_short_ones(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(0, list(range(300))))
    for index in range(1, 6):
        scheduler.add(Sequence(index, [index] * 40))
        assert go(scheduler, 32)[0] > 0


def test_prompts_are_read_in_the_order_in_which_they_came_where_there_is_no_room_for_fairness(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(1, [2] * 20))
    scheduler.add(Sequence(0, [1] * 20))
    assert go(scheduler, 12) == {0: 12}


def test_the_youngest_makes_room_and_the_oldest_goes_on():
    cache = cache_for(tiny_decoder("mla"), 4)
    scheduler = Scheduler(cache)
    old, young = Sequence(0, [1] * 8), Sequence(1, [2] * 7)
    scheduler.add(old)
    go(scheduler, 100)
    scheduler.add(young)
    preempted = False
    while len(old.tokens) < 25:
        step = go(scheduler, 100)
        assert step[0] == 1
        preempted = preempted or young in scheduler.waiting
    assert preempted
    assert young.num_cached == 0 or young in scheduler.running
    scheduler.remove(old)
    assert 1 in go(scheduler, 100)
    scheduler.remove(young)
    assert cache.pool.free_pages == 4


def test_a_known_beginning_is_not_read_again_but_the_last_token_is(cache: PagedCache):
    scheduler = Scheduler(cache)
    prompt = list(range(24))
    scheduler.add(Sequence(0, list(prompt)))
    assert go(scheduler, 100) == {0: 24}
    scheduler.add(Sequence(1, list(prompt)))
    assert go(scheduler, 100) == {0: 1, 1: 8}
    scheduler.add(Sequence(2, [*prompt, 50]))
    assert go(scheduler, 100)[2] == 1
    scheduler.add(Sequence(3, list(prompt)), "another")
    assert go(scheduler, 100)[3] == 24


def test_a_prompt_waits_for_another_that_is_reading_the_same_pages(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(0, list(range(40))))
    scheduler.add(Sequence(1, list(range(40))))
    scheduler.add(Sequence(2, [60] * 40))
    assert go(scheduler, 24) == {0: 24}
    read = 0
    while 1 in {s.index for s in scheduler.waiting} or not read:
        read += go(scheduler, 24).get(1, 0)
    assert read <= 8


def test_no_more_than_max_running_hold_pages(cache: PagedCache):
    scheduler = Scheduler(cache, max_running=2)
    for index in range(5):
        scheduler.add(Sequence(index, [index + 1]))
    assert go(scheduler, 100) == {0: 1, 1: 1}
    scheduler.remove(scheduler.running[0])
    assert set(go(scheduler, 100)) == {1, 2}


def test_a_draft_gets_the_pages_that_are_free_and_is_no_longer_than_they_are():
    cache = cache_for(tiny_decoder("mla"), 3)
    scheduler = Scheduler(cache)
    first, second = Sequence(0, [1] * 7), Sequence(1, [2] * 7)
    for sequence in (first, second):
        scheduler.add(sequence)
    go(scheduler, 2 * FAIR_SHARE)
    assert scheduler.room_for_draft(first, 0) == 0
    assert len(first.pages) == 1
    assert scheduler.room_for_draft(first, 4) == 4
    assert len(first.pages) == 2
    assert scheduler.room_for_draft(second, 4) == 0
    scheduler.remove(first)
    assert scheduler.room_for_draft(second, 20) == 16
    assert cache.pool.free_pages == 0


def test_nobody_drafts_while_a_prompt_could_be_read(cache: PagedCache):
    scheduler = Scheduler(cache)
    scheduler.add(Sequence(0, [1]))
    go(scheduler, 100)
    scheduler.add(Sequence(1, [2] * 60))
    go(scheduler, 16)
    sequence = scheduler.running[0]
    assert not scheduler.may_draft
    sequence.draft = [5, 6]
    assert go(scheduler, 16) == {0: 1, 1: 15}
    while not scheduler.running[1].decodes:
        go(scheduler, 16)
    assert scheduler.may_draft
    sequence.draft = [5, 6]
    assert go(scheduler, 16) == {0: 3, 1: 1}
