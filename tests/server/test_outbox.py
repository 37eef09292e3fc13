"""What the engine's thread puts in comes out in the event loop: all of it, in order, late only where nothing is urgent.

The loop's clock is the tests' own, so that how fast the machine is decides nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from latentkv.server import outbox as module
from latentkv.server.outbox import Outbox


class Loop(asyncio.SelectorEventLoop):
    """Time passes in it where a test says so."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class Taken(list[int]):
    """What was handed over, in its order."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def put(self, thing: int, *, urgent: bool = False) -> None:
        self._outbox.put(lambda: self.append(thing), urgent=urgent)
        self._outbox.flush()


async def turns(count: int = 3) -> None:
    """Let everything run that is ready now; a timer is when it is due."""
    for _ in range(count):
        await asyncio.sleep(0)


async def pass_time(seconds: float) -> None:
    """Let time pass when all has run that is ready now, and then what is due."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    await turns()
    loop.now += seconds
    await turns()


def in_loop(work: Callable[[Outbox, Taken], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        outbox = Outbox()
        outbox.open()
        outbox.streams = 1
        await work(outbox, Taken(outbox))

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


def test_what_comes_first_is_handed_over_at_once():
    async def work(outbox: Outbox, taken: Taken) -> None:
        taken.put(1)
        await turns()
        assert taken == [1]

    in_loop(work)


def test_what_comes_soon_after_waits_and_is_handed_over_together_in_its_order():
    async def work(outbox: Outbox, taken: Taken) -> None:
        taken.put(1)
        await turns()
        taken.put(2)
        taken.put(3)
        await pass_time(0.9 * module.LEAST_SECONDS)
        assert taken == [1]
        await pass_time(0.2 * module.LEAST_SECONDS)
        assert taken == [1, 2, 3]

    in_loop(work)


def test_what_is_urgent_does_not_wait_and_takes_along_what_waits():
    async def work(outbox: Outbox, taken: Taken) -> None:
        taken.put(1)
        await turns()
        taken.put(2)
        taken.put(3, urgent=True)
        await turns()
        assert taken == [1, 2, 3]
        taken.put(4)
        await pass_time(1.1 * module.LEAST_SECONDS)
        assert taken == [1, 2, 3, 4]

    in_loop(work)


def test_nothing_is_handed_over_before_the_step_that_made_it_has_ended():
    async def work(outbox: Outbox, taken: Taken) -> None:
        outbox.put(lambda: taken.append(1), urgent=True)
        await turns()
        assert taken == []
        outbox.flush()
        await turns()
        assert taken == [1]

    in_loop(work)


def test_a_loop_that_has_ended_stops_nobody_and_the_next_one_gets_its_own():
    outbox = Outbox()
    taken = Taken(outbox)

    async def work(thing: int) -> None:
        outbox.open()
        taken.put(thing)
        await turns()

    asyncio.run(work(1))
    taken.put(2)  # to nobody
    asyncio.run(work(3))
    assert taken == [1, 3]


@pytest.mark.parametrize(
    ("streams", "seconds"),
    [
        (0, module.LEAST_SECONDS),
        (1, module.LEAST_SECONDS),
        (8, 8 * module.EVENT_SECONDS),
        (1000, module.MOST_SECONDS),
    ],
)
def test_the_more_streams_are_open_the_longer_events_wait_within_bounds(streams: int, seconds: float):
    async def work(outbox: Outbox, taken: Taken) -> None:
        outbox.streams = streams
        taken.put(1)
        await turns()
        for thing in (2, 3):  # the first wait is asked for by the engine's thread, the second follows from the first
            taken.put(thing)
            await pass_time(0.9 * seconds)
            assert taken == [*range(1, thing)]
            await pass_time(0.2 * seconds)
            assert taken == [*range(1, thing + 1)]

    in_loop(work)


def test_while_steps_are_fast_the_engines_thread_calls_nobody(monkeypatch: pytest.MonkeyPatch):
    async def work(outbox: Outbox, taken: Taken) -> None:
        taken.put(1)
        await turns()
        taken.put(2)
        await pass_time(1.1 * module.LEAST_SECONDS)
        monkeypatch.setattr(outbox, "_call", lambda what: pytest.fail("the loop is called"))
        for thing in (3, 4, 5):
            taken.put(thing)
            await pass_time(1.1 * module.LEAST_SECONDS)
        assert taken == [1, 2, 3, 4, 5]

    in_loop(work)


def test_what_comes_while_things_are_handed_over_holds_nothing_up_afterwards():
    async def work(outbox: Outbox, taken: Taken) -> None:
        taken.put(0)
        await turns()

        def hand() -> None:  # the engine's thread gets its turn in the middle, and what it puts is taken at once, too
            taken.append(1)
            taken.put(2)

        outbox.put(hand, urgent=False)
        outbox.flush()
        await pass_time(1.1 * module.LEAST_SECONDS)
        assert taken == [0, 1, 2]
        await pass_time(2 * module.MOST_SECONDS)  # a slow step: the timer finds nothing
        taken.put(3)
        await turns()
        assert taken == [0, 1, 2, 3]

    in_loop(work)
