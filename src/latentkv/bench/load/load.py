"""Sending load: a number of requests at a time, or as many a second."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from time import perf_counter

from latentkv.bench.load.arrivals import arrivals
from latentkv.bench.load.client import Answer
from latentkv.bench.load.workload import LoadRequest
from latentkv.errors import RequestError


def require_positive(option: str, value: float | None) -> None:
    """Refuse what is given but not a number above 0.

    Raises:
        RequestError: naming the option.
    """
    if value is not None and not 0 < value < math.inf:
        raise RequestError(f"{option} must be above 0, not {value:g}.")


@dataclass(frozen=True)
class Level:
    """One strength of load: `concurrency` requests at a time, or `rate` a second, however many are under way.

    Attributes:
        concurrency: a request is sent as soon as one of these ends; None: see `rate`.
        rate: mean requests a second; None: see `concurrency`.
        burstiness: of arrivals at a rate: 1 is Poisson.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        require_positive("--concurrency", self.concurrency)
        require_positive("--rate", self.rate)
        require_positive("--burstiness", self.burstiness)

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.rate:g} requests/s" if self.rate is not None else f"concurrency {self.concurrency}"


@dataclass(frozen=True)
class Limit:
    """When no more requests are sent: after so many, or so many seconds, whichever is first; those under way end."""

    requests: int | None
    seconds: float | None

    def reached(self, sent: int, elapsed: float) -> bool:
        """Whether `sent` requests or `elapsed` seconds are enough."""
        return (self.requests is not None and sent >= self.requests) or (
            self.seconds is not None and elapsed >= self.seconds
        )

    def share(self, ended: int, elapsed: float) -> float:
        """How much of it is done, 0 to 1."""
        by_requests = ended / self.requests if self.requests else 0.0
        by_seconds = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_requests, by_seconds))


@dataclass
class LevelRun:
    """What happened at one level; times are `perf_counter`'s seconds.

    Attributes:
        level: the load.
        started: when.
        answers: of the requests that ended, in that order.
        failed: how many of them were not whole.
        sent: requests, those included that had not ended when the run was interrupted.
        seconds: from the start to the last end, or to the interruption.
        client_share: of one core, what the client itself used.
        interrupted: by Ctrl-C.
    """

    level: Level
    started: float
    answers: list[Answer] = field(default_factory=list[Answer])
    failed: int = 0
    sent: int = 0
    seconds: float = 0.0
    client_share: float = 0.0
    interrupted: bool = False


Ask = Callable[[LoadRequest, float], Awaitable[Answer]]
Watch = Callable[[LevelRun], None]


async def run_level(
    ask: Ask, requests: Iterator[LoadRequest], level: Level, limit: Limit, seed: int, watch: Watch
) -> LevelRun:
    """Send requests until `limit` and wait for their answers.

    Args:
        ask: sends one and answers; its second argument is when it was due.
        requests: without end.
        level: how strong.
        limit: how long.
        seed: of arrivals at a rate.
        watch: called after every answer.

    Returns:
        The `LevelRun`; if the task was cancelled, what had been answered by then, and the task goes on.
    """
    run = LevelRun(level, perf_counter())
    cpu = time.process_time()

    async def send(due: float) -> None:
        run.sent += 1
        answer = await ask(next(requests), due)
        run.answers.append(answer)
        run.failed += answer.failure is not None
        watch(run)

    try:
        if level.rate is None:
            await _one_after_another(send, level.concurrency or 1, lambda: limit.reached(run.sent, _since(run)))
        else:
            await _as_they_come(send, arrivals(level.rate, level.burstiness, seed), run, limit)
    except asyncio.CancelledError:
        run.interrupted = True
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
    ended = perf_counter() if run.interrupted else max((answer.ended for answer in run.answers), default=run.started)
    run.seconds = ended - run.started
    run.client_share = (time.process_time() - cpu) / max(perf_counter() - run.started, 1e-9)
    return run


def _since(run: LevelRun) -> float:
    return perf_counter() - run.started


async def _one_after_another(
    send: Callable[[float], Awaitable[None]], concurrency: int, enough: Callable[[], bool]
) -> None:
    async def client() -> None:
        while not enough():
            await send(perf_counter())

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())


async def _as_they_come(
    send: Callable[[float], Coroutine[None, None, None]], offsets: Iterator[float], run: LevelRun, limit: Limit
) -> None:
    async with asyncio.TaskGroup() as under_way:
        for index, offset in enumerate(offsets):
            if limit.reached(index, offset):
                break
            await asyncio.sleep(max(0.0, offset - _since(run)))
            under_way.create_task(send(run.started + offset))
