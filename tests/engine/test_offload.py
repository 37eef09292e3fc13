"""Prefixes that come back from files: the same tokens, and nobody waits for a disk."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from offload_cases import BLOCK, PAGE, ask, engine_for, forget, naive, settle, store_for, tokens

from engine_models import cache_for, tiny_decoder
from latentkv.engine import Engine, offload
from latentkv.engine.loading import Loading
from latentkv.engine.scheduler import Scheduler
from latentkv.engine.sequence import Sequence
from latentkv.state import PageStore
from latentkv.state.store import page_store

PROMPT = [9, 4, 7, 30, 11, 2, 55, 41] * 5 + [17, 3]  # five pages and a bit
OTHER = [60 - token for token in PROMPT]


def read_by_the_model(engine: Engine) -> list[int]:
    """Gets the number of tokens of each step."""
    sizes: list[int] = []
    engine.runner.decoder.model.norm.register_forward_pre_hook(lambda norm, args: sizes.append(len(args[0])))
    return sizes


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    """Holds up every reading of a page until it is opened."""
    opened, read = threading.Event(), page_store.read_page

    def held_up(*args) -> None:
        assert opened.wait(20)
        read(*args)

    monkeypatch.setattr(page_store, "read_page", held_up)
    yield opened
    opened.set()


@pytest.mark.parametrize("kind", ["mla", "gqa", "sparse", "longcat"])
def test_a_prefix_comes_back_after_a_restart_and_only_the_rest_is_read_by_the_model(kind: str, tmp_path: Path):
    first = engine_for(tmp_path, kind=kind)
    expected = naive(first.runner.decoder, PROMPT, 6)
    assert tokens(first, ask(PROMPT)) == [expected]
    first.close()
    assert first.counters.stored_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.page"))
    second = engine_for(tmp_path, kind=kind)
    sizes = read_by_the_model(second)
    assert tokens(second, ask(PROMPT)) == [expected]
    assert sizes[0] == 2
    counters = second.counters
    assert (counters.store_queries, counters.store_hits, counters.prefix_hits) == (40, 40, 0)
    assert counters.loaded_bytes == 5 * second.cache.page_bytes
    assert counters.read_tokens == 2 + 5
    settle(second)
    assert counters.stored_bytes == 0
    second.close()


def test_a_prefix_that_memory_has_lost_comes_back_and_is_shared(tmp_path: Path):
    engine = engine_for(tmp_path)
    expected = naive(engine.runner.decoder, PROMPT, 6)
    tokens(engine, ask(PROMPT))
    settle(engine)
    forget(engine)
    sizes = read_by_the_model(engine)
    assert tokens(engine, ask(PROMPT), ask(PROMPT)) == [expected] * 2
    assert engine.counters.store_hits == 40
    assert engine.counters.prefix_hits == 40  # the second one found them in memory
    assert sum(sizes) < 4 * PAGE
    engine.close()


def test_the_last_token_is_read_by_the_model_also_where_all_pages_are_stored(tmp_path: Path):
    engine = engine_for(tmp_path)
    whole = PROMPT[: 5 * PAGE]
    expected = naive(engine.runner.decoder, whole, 6)
    tokens(engine, ask(whole))
    settle(engine)
    forget(engine)
    engine.add(ask(whole))
    got: list[int] = []
    for _ in range(200):
        got += [event.token_id for event in engine.step()]
    assert got == expected
    assert engine.counters.store_hits == 4 * PAGE
    engine.close()


def test_what_memory_knows_is_not_read_from_files(tmp_path: Path):
    engine = engine_for(tmp_path)
    tokens(engine, ask(PROMPT))
    settle(engine)
    tokens(engine, ask([*PROMPT[:24], 1]))
    assert engine.counters.loaded_bytes == 0
    # Of a longer text the beginning is in memory, and the rest in files.
    page = engine._scheduler.prefixes.find("", PROMPT)[-1].page
    pool = engine.cache.pool
    while pool.kept_pages > 3:  # the end goes first
        held = pool.allocate(pool.free_pages - 3)
        assert page in held
        pool.free(held)
    assert tokens(engine, ask(PROMPT)) == [naive(engine.runner.decoder, PROMPT, 6)]
    assert engine.counters.store_hits == 16
    engine.close()


def test_salts_are_kept_apart_in_files_too(tmp_path: Path):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT), salt="alice")
    first.close()
    second = engine_for(tmp_path)
    for salt, hits in (("bob", 0), ("", 0), ("alice", 40)):
        assert tokens(second, ask(PROMPT), salt=salt) == [naive(second.runner.decoder, PROMPT, 6)]
        assert second.counters.store_hits == hits
    second.close()


def test_a_prompt_whose_tokens_are_scored_is_read_by_the_model_and_not_stored(tmp_path: Path):
    engine = engine_for(tmp_path)
    tokens(engine, ask(PROMPT, prompt_logprobs=1))
    settle(engine)
    assert list(tmp_path.glob("*.page")) == []
    tokens(engine, ask(PROMPT))
    settle(engine)
    forget(engine)
    tokens(engine, ask(PROMPT, prompt_logprobs=1))
    assert engine.counters.store_queries == 40
    assert engine.counters.loaded_bytes == 0
    engine.close()


def test_a_short_prefix_is_not_stored_until_it_has_grown(tmp_path: Path):
    engine = engine_for(tmp_path)
    few = offload.MIN_PAGES * PAGE - 2
    tokens(engine, ask(PROMPT[:few], max_tokens=2))
    settle(engine)
    assert list(tmp_path.glob("*.page")) == []
    tokens(engine, ask(PROMPT[:few], max_tokens=4))  # what was generated counts as well
    settle(engine)
    assert len(list(tmp_path.glob("*.page"))) == offload.MIN_PAGES
    engine.close()


def test_a_damaged_page_and_all_after_it_are_read_by_the_model(tmp_path: Path, caplog):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()
    store = store_for(tmp_path, first.cache)
    damaged = store.first_key("", PROMPT[:PAGE]).next(PROMPT[PAGE : 2 * PAGE]).next(PROMPT[2 * PAGE : 3 * PAGE])
    path = store.path(damaged)
    store.close()
    path.write_bytes(path.read_bytes()[:-9])
    second = engine_for(tmp_path)
    sizes = read_by_the_model(second)
    assert tokens(second, ask(PROMPT)) == [naive(second.runner.decoder, PROMPT, 6)]
    assert sizes[0] == len(PROMPT) - 2 * PAGE
    assert second.counters.store_hits == 2 * PAGE
    assert len(warnings_of(caplog)) == 1
    settle(second)
    assert path.exists()  # it was computed and stored again
    second.close()


def test_others_go_on_while_a_prefix_is_read(tmp_path: Path, gate: threading.Event):
    first = engine_for(tmp_path)
    expected, other = (naive(first.runner.decoder, prompt, 6) for prompt in (PROMPT, OTHER))
    tokens(first, ask(PROMPT))
    first.close()
    engine = engine_for(tmp_path)
    waiting = engine.add(ask(PROMPT))
    engine.add(ask(OTHER))
    got: list[int] = []
    while len(got) < 6:
        got += [event.token_id for event in engine.step() if event.index != waiting]
    assert got == other
    assert engine.step() == []  # it waits a moment, and does not say that nothing can go on
    assert engine.num_running == 1
    gate.set()
    got = []
    while len(got) < 6:
        got += [event.token_id for event in engine.step()]
    assert got == expected
    engine.close()


def test_prompts_with_the_same_stored_beginning_wait_for_one_reading(tmp_path: Path, gate: threading.Event):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()
    engine = engine_for(tmp_path)
    for last in (1, 2, 3):
        engine.add(ask([*PROMPT, last]))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    gate.set()
    while engine.num_running + engine.num_waiting:
        engine.step()
    assert engine.counters.store_hits == 40
    assert engine.counters.prefix_hits == 80
    engine.close()


def test_a_request_that_is_given_up_while_its_pages_are_read_frees_them(tmp_path: Path, gate: threading.Event):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()
    engine = engine_for(tmp_path)
    index = engine.add(ask(PROMPT))
    engine.step()
    assert engine.cache.pool.free_pages < engine.cache.num_pages
    threading.Timer(0.05, gate.set).start()
    engine.abort(index)
    assert engine.cache.pool.free_pages == engine.cache.num_pages
    forget(engine)
    assert gate.wait(20)
    engine._scheduler._offload._reader.submit(int).result()  # whatever the reader had to do is done
    assert all(bool(tensor.isnan().all()) for tensor in engine.cache.storage), "pages were written after they were free"
    assert tokens(engine, ask(PROMPT)) == [naive(engine.runner.decoder, PROMPT, 6)]
    engine.close()


def test_the_youngest_makes_room_also_while_its_pages_are_read(tmp_path: Path, gate: threading.Event, monkeypatch):
    stored, old = list(range(33)), [7] * 7
    first = engine_for(tmp_path)
    tokens(first, ask(stored))
    first.close()
    stop, stopped = Loading.stop, []

    def stop_and_read_on(loading: Loading) -> None:
        stopped.append(loading.done)
        gate.set()
        stop(loading)

    monkeypatch.setattr(Loading, "stop", stop_and_read_on)
    engine = engine_for(tmp_path, pages=8)
    got: dict[int, list[int]] = {engine.add(ask(old, max_tokens=30)): [], engine.add(ask(stored, max_tokens=2)): []}
    while engine.num_running + engine.num_waiting or engine.counters.steps == 0:
        for event in engine.step():
            got[event.index].append(event.token_id)
        engine.cache.check()
    assert engine.counters.preemptions == 1
    assert stopped == [False]
    decoder = engine.runner.decoder
    assert list(got.values()) == [naive(decoder, old, 30), naive(decoder, stored, 2)]
    assert engine.cache.pool.free_pages == 8
    engine.close()


def test_pages_that_find_no_room_in_the_queue_are_offered_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(offload, "QUEUE_BYTES", 0)
    engine = engine_for(tmp_path, step_tokens=200)
    save, opened = PageStore.save, threading.Event()

    def held_up(self, *args) -> int:
        assert opened.wait(20)
        return save(self, *args)

    monkeypatch.setattr(PageStore, "save", held_up)
    long = [*PROMPT, *OTHER]
    engine.add(ask(long, max_tokens=20))
    for _ in range(10):
        engine.step()
    opened.set()
    while engine.num_running:
        engine.step()
        settle(engine)
    assert len(list(tmp_path.glob("*.page"))) == (len(long) + 20 - 1) // PAGE
    engine.close()


def test_a_step_does_not_wait_for_the_writer(tmp_path: Path, monkeypatch):
    engine = engine_for(tmp_path)
    opened = threading.Event()
    monkeypatch.setattr(PageStore, "save", lambda *args: opened.wait(20) and 0)
    assert tokens(engine, ask(PROMPT)) == [naive(engine.runner.decoder, PROMPT, 6)]
    assert not opened.is_set()
    opened.set()
    engine.close()


def test_a_disk_that_is_full_is_told_once_and_left_alone_for_a_while(tmp_path: Path, monkeypatch, caplog):
    engine = engine_for(tmp_path)
    tries: list[int] = []

    def full(file, key, parts) -> None:
        tries.append(key.depth)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(page_store, "write_page", full)
        for prompt in (PROMPT, OTHER):
            assert tokens(engine, ask(prompt)) == [naive(engine.runner.decoder, prompt, 6)]
        settle(engine)
    assert tries == [0]
    (message,) = warnings_of(caplog)
    assert "Pages cannot be written" in message and "No space left on device" in message
    monkeypatch.setattr(engine._scheduler._offload, "_rests_until", 0.0)  # a minute later
    tokens(engine, ask(PROMPT))
    settle(engine)
    assert len(list(tmp_path.glob("*.page"))) == 5
    engine.close()


def test_whatever_goes_wrong_in_the_store_no_request_notices(tmp_path: Path, monkeypatch, caplog):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()

    def broken(*args):
        raise RuntimeError("a bug")

    engine = engine_for(tmp_path)
    monkeypatch.setattr(PageStore, "load", broken)
    monkeypatch.setattr(PageStore, "save", broken)
    for prompt in (PROMPT, OTHER):
        assert tokens(engine, ask(prompt)) == [naive(engine.runner.decoder, prompt, 6)]
    engine.close()
    assert "a bug" in caplog.text


def test_a_prefix_in_use_stays_stored_when_others_come(tmp_path: Path):
    engine = engine_for(tmp_path, max_bytes=8 * BLOCK)
    tokens(engine, ask(PROMPT))
    for number in range(6):
        settle(engine)
        tokens(engine, ask([*PROMPT[:32], number]))  # found in memory
        tokens(engine, ask([number] * 33))
    settle(engine)
    engine.close()
    again = engine_for(tmp_path)
    tokens(again, ask(PROMPT))
    assert again.counters.store_hits >= 32
    again.close()


def test_after_close_the_engine_goes_on_without_the_store(tmp_path: Path, gate: threading.Event):
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()
    second = engine_for(tmp_path)
    second.add(ask(PROMPT))
    second.step()
    threading.Timer(0.05, gate.set).start()
    second.close()
    got: list[int] = []
    while second.num_running:
        got += [event.token_id for event in second.step()]
    assert got == naive(second.runner.decoder, PROMPT, 6)
    second.close()
    assert store_for(tmp_path, second.cache).writes


def test_what_waits_to_be_written_is_written_by_close(tmp_path: Path, monkeypatch):
    engine = engine_for(tmp_path)
    save = PageStore.save

    def slow(self, *args) -> int:
        time.sleep(0.02)
        return save(self, *args)

    monkeypatch.setattr(PageStore, "save", slow)
    tokens(engine, ask(PROMPT))
    engine.close()
    assert len(list(tmp_path.glob("*.page"))) == 5


def test_a_sequence_whose_pages_are_read_takes_part_in_no_step(tmp_path: Path, gate: threading.Event):
    decoder = tiny_decoder("mla")
    first = engine_for(tmp_path)
    tokens(first, ask(PROMPT))
    first.close()
    cache = cache_for(decoder, 40)
    scheduler = Scheduler(cache, store=store_for(tmp_path, cache))
    scheduler.add(Sequence(0, list(PROMPT)))
    scheduler.add(Sequence(1, list(OTHER)))
    assert [(sequence.index, count) for sequence, count in scheduler.plan(100)] == [(1, len(OTHER))]
    assert scheduler.wait_for_loading(0.01)
    gate.set()
    assert scheduler.wait_for_loading(20)
    shares = {sequence.index: count for sequence, count in scheduler.plan(100)}
    assert shares[0] == 2
    scheduler.close()
