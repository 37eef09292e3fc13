"""What counts as progress, and what as a stall."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Request, SamplingParams
from latentkv.engine.counters import Counters
from latentkv.engine.thread import EngineThread
from latentkv.engine.watchdog import Watchdog
from latentkv.errors import EngineStoppedError


def ticked(watchdog: Watchdog, *seconds: float) -> Watchdog:
    """After ticks of so many seconds each: what its own thread does, without waiting."""
    for each in seconds:
        watchdog._tick(each)
    return watchdog


def always(busy: bool = True) -> Watchdog:
    return Watchdog(stall_seconds=8, busy=lambda: busy)  # a tick a second


def test_time_with_work_and_without_a_step_is_a_step_that_hangs() -> None:
    assert ticked(always(), *[1] * 8).diagnosis() == ""
    assert "A step hangs" in ticked(always(), *[1] * 9).diagnosis()


def test_time_without_work_is_no_stall() -> None:
    assert ticked(always(False), *[1] * 100).diagnosis() == ""


def test_line_20_steps_that_do_nothing_are_no_progress() -> None:
    watchdog = always()
    for _ in range(9):
        watchdog.step_ended(Counters())
        ticked(watchdog, 1)
    assert "The last 9 steps did nothing" in watchdog.diagnosis()


@pytest.mark.parametrize("done", ["generated_tokens", "read_tokens", "prefix_hits", "store_hits"])
def test_line_20_a_token_a_part_of_a_prompt_and_an_admission_are_progress(done: str) -> None:
    watchdog, counters = always(), Counters()
    for _ in range(30):
        ticked(watchdog, 1)
        setattr(counters, done, getattr(counters, done) + 1)
        watchdog.step_ended(counters)
    assert watchdog.stall().seconds == 0


def test_line_20_reading_again_what_is_given_up_again_is_no_progress() -> None:
    watchdog, counters = always(), Counters()
    for _ in range(10):
        ticked(watchdog, 1)
        counters.read_tokens += 50
        watchdog.step_ended(counters)
        counters.lost_tokens += 50
    assert "steps did nothing" in watchdog.diagnosis()


def test_reading_again_after_another_got_its_tokens_is_progress() -> None:
    watchdog, counters = always(), Counters()
    counters.read_tokens = 1000
    watchdog.step_ended(counters)
    counters.lost_tokens = 900
    counters.generated_tokens = 1
    watchdog.step_ended(counters)
    ticked(watchdog, 5)
    counters.read_tokens += 10
    watchdog.step_ended(counters)
    assert watchdog.stall().seconds == 0


def test_line_19_time_that_no_thread_got_is_no_hanging_step() -> None:
    watchdog = ticked(always(), 500, 500)
    assert watchdog.diagnosis() == ""
    assert watchdog.stall().denied > 900


def test_line_20_clients_who_give_up_and_come_again_do_not_hide_a_stall() -> None:
    busy = True
    watchdog = Watchdog(stall_seconds=8, busy=lambda: busy)
    for _ in range(5):
        busy = True
        ticked(watchdog, 1, 1)
        busy = False
        ticked(watchdog, 1)
    assert watchdog.diagnosis()


def request() -> Request:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    return Request.create([5, 6], params, vocab_size=VOCAB, max_context=128)


def submitted(engine: Engine, stall_seconds: float) -> tuple[EngineThread, list]:
    thread, got = EngineThread(engine, stall_seconds=stall_seconds), []
    thread.start()
    thread.submit(request(), got.append)
    return thread, got


def test_line_20_an_engine_whose_steps_do_nothing_is_found_dead_and_everyone_is_told(monkeypatch) -> None:
    decoder = tiny_decoder("mla")
    engine = Engine(decoder, cache_for(decoder, 40))
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.005) or [])
    thread, got = submitted(engine, 0.2)
    while thread.health().state != "dead":
        time.sleep(0.02)
    assert "steps did nothing" in thread.health().reason
    assert [type(each) for each in got] == [EngineStoppedError]


def test_line_19_an_engine_that_got_no_time_is_alive_and_goes_on(monkeypatch, caplog) -> None:
    decoder = tiny_decoder("mla")
    engine = Engine(decoder, cache_for(decoder, 40))
    list(engine.run([request()]))  # the first step of a process takes its time
    step, held = engine.step, threading.Event()

    def first_hold_the_interpreter():
        if not held.is_set():
            held.set()
            ctypes.PyDLL(None).usleep(2_400_000)  # as a library does that computes without letting others run
        return step()

    monkeypatch.setattr(engine, "step", first_hold_the_interpreter)
    thread, got = submitted(engine, 1.2)
    while not got or isinstance(got[-1], Exception) or not got[-1].finish_reason:
        assert thread.health().state in ("working", "idle")
        time.sleep(0.01)
    assert [type(each).__name__ for each in got] == ["Event"] * 4
    assert "got no time" in caplog.text
    thread.drain(5)
