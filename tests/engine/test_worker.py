"""The one thread that computes: order, errors, interruption, its end, and its team of OpenMP threads."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from latentkv.engine.worker import Worker
from latentkv.errors import EngineStoppedError
from latentkv.kernels import current_backend, extension, use_backend
from latentkv.ops import rms_norm
from latentkv.ops.native.team import live_teams, release_team


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.stop()
    assert not worker.alive


def compute_much() -> torch.Tensor:
    """Work that is worth a team."""
    return rms_norm(torch.ones(512, 512), torch.ones(512), 1e-6)


def test_calls_run_in_one_thread_in_order_and_return_what_they_return(worker: Worker) -> None:
    ran: list[int] = []
    for number in range(5):
        worker.post(lambda number=number: ran.append(number))
    assert worker.call(threading.get_ident) == worker.call(threading.get_ident) != threading.get_ident()
    assert ran == [0, 1, 2, 3, 4]


def test_a_call_within_a_call_runs_at_once(worker: Worker) -> None:
    assert worker.call(lambda: worker.call(lambda: 7)) == 7


def test_what_a_call_raises_is_raised_where_it_was_asked_for_and_the_worker_goes_on(worker: Worker) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        worker.call(fail)
    assert worker.call(lambda: 1) == 1


def test_turns_go_on_as_long_as_there_is_work_with_commands_between_them(worker: Worker) -> None:
    seen: list[str] = []
    done = threading.Event()

    def turn() -> bool:
        seen.append("turn")
        if len(seen) == 2:
            worker.post(lambda: seen.append("command"))
        if len(seen) >= 4:
            done.set()
        return not done.is_set()

    worker.drive(turn, lambda: seen.append("end"))
    worker.post(lambda: None)
    assert done.wait(10)
    assert seen == ["turn", "turn", "command", "turn"]
    worker.stop()
    assert seen[-1] == "end"


def test_a_worker_that_has_stopped_says_so(worker: Worker) -> None:
    started, leave = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        leave.wait(10)

    errors: list[Exception] = []

    def ask() -> None:
        try:
            worker.call(lambda: None)
        except EngineStoppedError as error:
            errors.append(error)

    worker.post(wait)
    assert started.wait(10)
    late = threading.Thread(target=ask)  # it waits behind what is running when the worker is told to stop
    late.start()
    while worker._commands.empty():
        time.sleep(0.001)
    worker.stop(0)
    leave.set()
    late.join(10)
    assert len(errors) == 1
    with pytest.raises(EngineStoppedError, match="load the model again"):
        worker.call(lambda: None)


def test_an_interrupted_call_is_interrupted_in_the_worker_too_which_goes_on(worker: Worker) -> None:
    began, ended = threading.Event(), threading.Event()

    def endless() -> None:
        began.set()
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    def interrupt() -> None:
        began.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        worker.call(endless)
    assert ended.wait(10)
    assert worker.call(lambda: 1) == 1


def test_it_computes_with_the_threads_and_the_instruction_set_of_who_asks(worker: Worker) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (3, 2):
            torch.set_num_threads(threads)
            assert worker.call(torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)
    with use_backend("torch"):
        assert worker.call(current_backend) == "torch"


@pytest.mark.skipif(extension is None, reason="the native kernels were not built, which count the teams")
def test_at_most_one_team_is_left_whoever_computes_and_none_when_idle(worker: Worker) -> None:
    before = torch.get_num_threads()
    release_team()
    others = live_teams()  # of models that other tests serve
    try:
        torch.set_num_threads(2)
        compute_much()
        assert live_teams() == others + 1
        assert worker.call(lambda: (compute_much(), live_teams())[1]) == others + 1
        worker.call(lambda: None)
        release_team()
        compute_much()
        assert worker.call(live_teams) == others
    finally:
        torch.set_num_threads(before)


def test_another_thread_that_computes_is_told_of_but_not_when_the_worker_is_stopped(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("latentkv.engine.worker.live_teams", lambda: 1)
    stopped = Worker()
    stopped.stop()
    assert not stopped.alive
    assert caplog.text == ""
    worker.call(lambda: None)
    worker.call(lambda: None)
    assert caplog.text.count("Another thread of this process computes beside this model's") == 1
