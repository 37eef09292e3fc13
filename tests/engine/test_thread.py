"""The engine's thread: whom it takes, what it tells them, how it ends."""

from __future__ import annotations

import threading
import time

import pytest

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Event, Request, SamplingParams
from latentkv.engine.thread import EngineThread
from latentkv.errors import BusyError, EngineStoppedError, RequestError


def ask(prompt: list[int], **params) -> Request:
    params = {"max_tokens": 6, "ignore_eos": True, "temperature": 0, **params}
    return Request.create(prompt, SamplingParams(**params), vocab_size=VOCAB, max_context=128)


class Listener:
    def __init__(self) -> None:
        self.got: list[Event | Exception] = []
        self.done = threading.Event()

    def __call__(self, event: Event | Exception) -> None:
        self.got.append(event)
        if isinstance(event, Exception) or event.finish_reason:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.got if isinstance(event, Event)]


@pytest.fixture
def engine() -> Engine:
    decoder = tiny_decoder("mla")
    return Engine(decoder, cache_for(decoder, 40))


@pytest.fixture
def thread(engine: Engine):
    thread = EngineThread(engine, max_open=4)
    thread.start()
    yield thread
    thread.drain(0)
    assert engine.cache.pool.free_pages == engine.cache.num_pages


def alone(prompt: list[int], count: int) -> list[int]:
    decoder = tiny_decoder("mla")
    return [event.token_id for event in Engine(decoder, cache_for(decoder, 40)).run([ask(prompt, max_tokens=count)])]


def test_requests_of_many_threads_get_the_tokens_they_get_alone(thread: EngineThread) -> None:
    listeners = {n: Listener() for n in range(1, 5)}
    threads = [
        threading.Thread(target=thread.submit, args=(ask([n, 7 + n], max_tokens=8), listeners[n])) for n in listeners
    ]
    for each in threads:
        each.start()
    for n, listener in listeners.items():
        assert listener.done.wait(10)
        assert listener.tokens == alone([n, 7 + n], 8)
    assert thread.health().state == "idle"


def test_more_than_max_open_are_refused_and_later_taken(engine: Engine) -> None:
    thread = EngineThread(engine, max_open=2)
    with pytest.raises(EngineStoppedError, match="not running"):
        thread.submit(ask([1]), Listener())
    thread.start()
    listeners = [Listener() for _ in range(3)]
    for listener in listeners[:2]:
        thread.submit(ask([5, 6], max_tokens=100), listener)
    with pytest.raises(BusyError, match="2 requests"):
        thread.submit(ask([1]), listeners[2])
    assert all(listener.done.wait(20) for listener in listeners[:2])
    thread.submit(ask([1]), listeners[2])
    assert listeners[2].done.wait(10)
    assert thread.drain(5)
    assert thread.health().state == "stopped"


def test_what_can_never_fit_is_refused_by_submit(thread: EngineThread) -> None:
    decoder = tiny_decoder("mla")
    small = EngineThread(Engine(decoder, cache_for(decoder, 2)))
    with pytest.raises(RequestError, match="16 tokens"):
        small.submit(ask([5] * 12, max_tokens=10), Listener())


def test_one_that_is_given_up_hears_no_more_and_holds_no_page(thread: EngineThread, engine: Engine) -> None:
    listener, first, second = Listener(), Listener(), Listener()
    ticket = thread.submit(ask([5, 6], max_tokens=100), listener)
    while not listener.got:
        time.sleep(0.001)
    thread.abort(ticket)
    thread.abort(ticket)
    thread.submit(ask([9], max_tokens=3), first)
    assert first.done.wait(10)  # and with it the step that was under way
    heard = len(listener.got)
    thread.submit(ask([9], max_tokens=3), second)
    assert second.done.wait(10)
    assert len(listener.got) == heard < 100
    assert not listener.done.is_set()
    assert engine.cache.pool.free_pages == engine.cache.num_pages


def test_a_listener_that_raises_harms_nobody_else(thread: EngineThread) -> None:
    def broken(event: Event | Exception) -> None:
        raise ValueError("cannot listen")

    listener = Listener()
    thread.submit(ask([5, 6], max_tokens=50), broken)
    thread.submit(ask([7], max_tokens=20), listener)
    assert listener.done.wait(10)
    assert listener.tokens == alone([7], 20)
    assert thread.num_open == 0


def test_a_request_that_the_engine_cannot_begin_gets_its_error(
    thread: EngineThread, engine: Engine, monkeypatch
) -> None:
    def refuse(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(engine, "add", refuse)
    listener = Listener()
    thread.submit(ask([5]), listener)
    assert listener.done.wait(10)
    assert isinstance(listener.got[-1], ValueError)
    assert thread.health().state == "idle"


def test_draining_lets_open_requests_end_and_takes_no_other(thread: EngineThread) -> None:
    listener = Listener()
    thread.submit(ask([5, 6], max_tokens=60), listener)
    assert thread.drain(20)
    assert isinstance(listener.got[-1], Event) and listener.got[-1].finish_reason == "length"
    with pytest.raises(EngineStoppedError, match="shutting down"):
        thread.submit(ask([5]), Listener())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_itself_is_dead_and_everyone_is_told(
    thread: EngineThread, engine: Engine, monkeypatch
) -> None:
    def leave():
        raise SystemExit

    monkeypatch.setattr(engine, "step", leave)
    listener = Listener()
    thread.submit(ask([5]), listener)
    assert listener.done.wait(10)
    assert isinstance(listener.got[-1], EngineStoppedError)
    assert thread.health().state == "dead"
