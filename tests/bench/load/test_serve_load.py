import asyncio
from itertools import count, islice

import pytest

from latentkv.bench.load import load as serve_load
from latentkv.bench.load.arrivals import arrivals
from latentkv.bench.load.client import Answer, Failure
from latentkv.bench.load.load import Level, LevelRun, Limit, run_level
from latentkv.bench.load.workload import LoadRequest
from latentkv.errors import RequestError


class Clock(asyncio.SelectorEventLoop):
    """A loop in which nothing takes time but what is slept, and that takes none outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.select, self._selector.select = self._selector.select, self.skip

    def time(self) -> float:
        return self.now

    def skip(self, seconds: float | None) -> list:
        self.now += seconds or 0.0
        return self.select(seconds if seconds is None else 0)


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "perf_counter", now)


class Server:
    """Answers after `seconds`; knows what it was asked, and how much at a time."""

    def __init__(self, seconds: float = 0.0, fails: bool = False) -> None:
        self.seconds, self.fails = seconds, fails
        self.asked: list[int] = []
        self.under_way = self.most = 0

    async def ask(self, request: LoadRequest, due: float) -> Answer:
        answer = Answer(due=due, sent=now(), failure=Failure("HTTP 500", "") if self.fails else None)
        self.asked.append(request.output_tokens)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        answer.ended = now()
        return answer


def load(server: Server, level: Level, limit: Limit, interrupt_after: int | None = None) -> LevelRun:
    """Run a level; as Ctrl-C does, cancel its task after so many answers."""

    async def main() -> LevelRun:
        task = asyncio.current_task()

        def watch(run: LevelRun) -> None:
            if task is not None and len(run.answers) == interrupt_after:
                task.cancel()

        requests = (LoadRequest("", 1, number) for number in count())
        run = await run_level(server.ask, requests, level, limit, 0, watch)
        await asyncio.sleep(0)  # a task that was cancelled would end here
        return run

    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(main())


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_a_closed_loop_keeps_that_many_requests_under_way_and_sends_exactly_what_was_asked(concurrency: int):
    server = Server(0.005)
    run = load(server, Level(concurrency=concurrency), Limit(12, None))
    assert server.most == min(concurrency, 12)
    assert server.asked == list(range(12))
    assert (run.sent, len(run.answers), run.failed, run.interrupted) == (12, 12, 0, False)
    assert run.seconds == pytest.approx(0.005 * -(-12 // concurrency))
    assert run.seconds == max(answer.ended for answer in run.answers) - run.started


def test_a_level_sends_nothing_after_its_duration_and_waits_for_what_is_under_way():
    server = Server(0.04)
    run = load(server, Level(concurrency=2), Limit(None, 0.1))
    assert [answer.sent - run.started for answer in run.answers] == pytest.approx([0, 0, 0.04, 0.04, 0.08, 0.08])
    assert len(run.answers) == run.sent == len(server.asked)
    assert run.seconds == pytest.approx(0.12)
    assert server.under_way == 0


def test_whichever_limit_is_first_counts():
    assert load(Server(), Level(concurrency=1), Limit(3, 60)).sent == 3
    assert load(Server(0.03), Level(concurrency=1), Limit(1000, 0.05)).sent == 2


def test_at_a_rate_requests_are_due_when_they_arrive_whether_or_not_others_have_ended():
    server = Server(0.3)
    run = load(server, Level(rate=200.0), Limit(20, None))
    due = sorted(answer.due - run.started for answer in run.answers)
    assert due == pytest.approx(list(islice(arrivals(200.0, 1.0, 0), 20)))
    assert all(answer.sent == pytest.approx(answer.due) for answer in run.answers)
    assert server.most == 20


def test_a_rate_with_a_duration_sends_what_arrives_within_it():
    run = load(Server(), Level(rate=300.0), Limit(None, 0.2))
    expected = sum(at < 0.2 for at in islice(arrivals(300.0, 1.0, 0), 1000))
    assert run.sent == len(run.answers) == expected


@pytest.mark.parametrize("level", [Level(concurrency=4), Level(rate=500.0)])
def test_an_interrupted_level_keeps_what_was_answered_and_says_what_was_not(level: Level):
    server = Server(0.05)
    run = load(server, level, Limit(10_000, None), interrupt_after=4)
    assert run.interrupted
    assert 4 <= len(run.answers) < run.sent
    assert server.under_way == 0
    assert run.seconds == pytest.approx(0.05 if level.concurrency else run.answers[-1].ended - run.started)


def test_failures_are_counted_as_they_come():
    seen: list[int] = []

    async def main() -> None:
        requests = (LoadRequest("", 1, number) for number in count())
        ask = Server(fails=True).ask
        await run_level(ask, requests, Level(concurrency=1), Limit(3, None), 0, lambda run: seen.append(run.failed))

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(main())
    assert seen == [1, 2, 3]


def test_the_share_done_is_the_nearer_limits():
    assert Limit(10, None).share(4, 99.0) == 0.4
    assert Limit(None, 10.0).share(4, 5.0) == 0.5
    assert Limit(10, 10.0).share(2, 5.0) == 0.5
    assert Limit(10, 10.0).share(10, 50.0) == 1.0


@pytest.mark.parametrize(
    "bad", [{"concurrency": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"rate": 1.0, "burstiness": -1}]
)
def test_levels_without_load_are_refused(bad: dict):
    with pytest.raises(RequestError, match="must be above 0"):
        Level(**bad)
