"""Prefixes of models with recurrent layers in files: pages come back as far as a snapshot does."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from offload_cases import ask, forget, settle, store_for, tokens
from workloads import Foreseen, alone, decoder

from engine_models import VOCAB, cache_for
from latentkv.engine import Engine, offload, snapshots
from latentkv.errors import CacheError

KIND = "kimi"
TEXT = [(5 * i * i + i + 3) % VOCAB for i in range(64)]


@pytest.fixture(autouse=True)
def _files_of_short_prefixes_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offload, "MIN_PAGES", 1)
    monkeypatch.setattr(snapshots, "LEAST_PAGES", 1)
    yield


def engine_for(
    folder: Path, *, slots: int = 6, every: int = 64, most_drafted: int = 5, max_bytes: int = 1 << 20, **options
) -> Engine:
    cache = cache_for(decoder(KIND), 40, num_slots=slots, most_drafted=most_drafted)
    store = store_for(folder, cache, max_bytes=max_bytes)
    return Engine(decoder(KIND), cache, store=store, snapshot_every=every, most_drafted=max(most_drafted, 1), **options)


def answer(engine: Engine, prompt: list[int], count: int = 3) -> tuple[list[int], int]:
    """What follows a prompt, which is right, and how many tokens came from files."""
    before = engine.counters.store_hits
    (got,) = tokens(engine, ask(prompt, max_tokens=count))
    assert got == alone(KIND, tuple(prompt), count)
    settle(engine)
    return got, engine.counters.store_hits - before


def the_snapshot(folder: Path) -> Path:
    (path,) = folder.glob("*.state")
    return path


def test_a_restarted_engine_goes_on_from_the_stored_snapshot(tmp_path: Path):
    first = engine_for(tmp_path)
    got, hits = answer(first, TEXT[:30], 14)
    assert hits == 0
    first.close()
    second = engine_for(tmp_path)
    assert second._scheduler._offload._store.num_pages == 5 and len(list(tmp_path.glob("*.state"))) == 2
    assert answer(second, [*TEXT[:24], 9, 9])[1] == 24
    text = [*TEXT[:30], *got]
    assert answer(second, [*text, 5])[1] == 16  # after 24 in memory, to the end of the answer's last page
    assert answer(second, [*TEXT[:20], 9])[1] == 0  # no state is known there
    second.close()


def test_every_so_many_pages_of_a_long_prompt_are_stored_with_a_snapshot(tmp_path: Path):
    first = engine_for(tmp_path, every=2)
    answer(first, TEXT[:60], 1)
    first.close()
    for end in (17, 31, 33, 47, 49, 57):
        again = engine_for(tmp_path, every=2)
        assert answer(again, [*TEXT[:end], 60], 1)[1] == (56 if end == 57 else end // 16 * 16)
        again.close()


def test_what_memory_has_lost_comes_back(tmp_path: Path):
    engine = engine_for(tmp_path)
    answer(engine, TEXT[:30])
    forget(engine)
    assert answer(engine, TEXT[:30])[1] == 24
    assert engine.counters.prefix_hits == 0
    answer(engine, TEXT[:30])
    assert engine.counters.prefix_hits == 24
    engine.close()


def test_drafts_that_wait_beside_a_snapshot_are_stored_with_it(tmp_path: Path):
    waited = 0
    for first in range(6):
        folder = tmp_path / str(first)
        engine = engine_for(folder, drafter=Foreseen(KIND), most_drafted=5)
        prompt = TEXT[first : first + 12]
        got, _ = answer(engine, prompt, 14)
        waited += sum(each.num_tokens % 8 > 0 for each in engine._scheduler.prefixes._snapshots.values())
        engine.close()
        again = engine_for(folder)
        assert answer(again, [*prompt, *got, 4])[1] == 24
        again.close()
    assert waited > 1, "no snapshot was made of a draft"


def test_what_is_stored_does_not_depend_on_how_long_drafts_may_be(tmp_path: Path):
    for most_drafted, hits in ((2, 0), (0, 24), (5, 24)):
        engine = engine_for(tmp_path, most_drafted=most_drafted)
        assert answer(engine, TEXT[:30], 1)[1] == hits
        engine.close()


def test_a_damaged_snapshot_is_not_used_and_nothing_is_wrong(tmp_path: Path):
    first = engine_for(tmp_path)
    answer(first, TEXT[:30], 1)
    first.close()
    snapshot = the_snapshot(tmp_path)
    content = bytearray(snapshot.read_bytes())
    content[len(content) // 2] ^= 1
    snapshot.write_bytes(content)
    second = engine_for(tmp_path)
    assert answer(second, TEXT[:30])[1] == 0
    assert answer(second, TEXT[:30])[1] == 0
    assert second.counters.prefix_hits == 24
    second.close()
    third = engine_for(tmp_path)
    assert answer(third, TEXT[:30])[1] == 24  # it was written anew
    third.close()


def test_a_snapshot_that_is_overwritten_before_it_is_written_is_not_stored(tmp_path: Path):
    engine = engine_for(tmp_path, slots=2)
    goes_on = threading.Event()
    assert engine._scheduler._offload is not None
    engine._scheduler._offload._writer.submit(goes_on.wait)
    tokens(engine, ask(TEXT[:30], max_tokens=1))
    tokens(engine, ask(TEXT[30:60], max_tokens=1))  # its snapshot takes the slot of the first one
    goes_on.set()
    engine.close()
    kept = the_snapshot(tmp_path)
    again = engine_for(tmp_path)
    assert answer(again, TEXT[30:60])[1] == 24
    assert answer(again, TEXT[:30])[1] == 0
    assert kept.exists()
    again.close()


def test_pages_without_their_snapshot_are_not_gone_on_from(tmp_path: Path):
    first = engine_for(tmp_path)
    answer(first, TEXT[:30], 1)
    first.close()
    the_snapshot(tmp_path).unlink()
    second = engine_for(tmp_path)
    assert answer(second, TEXT[:30])[1] == 0
    second.close()


def test_a_folder_too_small_for_a_page_and_a_snapshot_is_refused(tmp_path: Path):
    with pytest.raises(CacheError, match="no page with a snapshot"):
        engine_for(tmp_path, max_bytes=4096)
