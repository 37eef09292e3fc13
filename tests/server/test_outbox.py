import asyncio
from collections.abc import Callable, Coroutine

from latentkv.server import outbox as module
from latentkv.server.outbox import Outbox


class Taken(list[int]):
    """What was handed over, in its order."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def put(self, thing: int, *, urgent: bool = False) -> None:
        self._outbox.put(lambda: self.append(thing), urgent=urgent)
        self._outbox.flush()


async def turns(count: int = 3) -> None:
    """Let everything run that is ready now; no timer is."""
    for _ in range(count):
        await asyncio.sleep(0)


def in_loop(work: Callable[[Outbox, Taken], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        outbox = Outbox()
        outbox.open()
        outbox.streams = 1
        await work(outbox, Taken(outbox))

    asyncio.run(main())


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
        await turns()
        assert taken == [1]
        async with asyncio.timeout(30):
            while taken == [1]:
                await asyncio.sleep(0.001)
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
        await asyncio.sleep(2 * module.MOST_SECONDS)
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


def test_the_more_streams_are_open_the_longer_events_wait_within_bounds():
    async def work(outbox: Outbox, taken: Taken) -> None:
        loop, waits = asyncio.get_running_loop(), []
        for streams in (0, 1, 8, 1000):
            outbox.streams = streams
            taken.put(1)
            await asyncio.sleep(2 * module.MOST_SECONDS)  # nothing waits
            taken.put(2)
            await turns()
            emptied = loop.time()
            taken.put(3)
            await turns()
            assert outbox._timer is not None
            waits.append(outbox._timer.when() - emptied)
        assert waits[0] <= module.LEAST_SECONDS and waits[1] <= module.LEAST_SECONDS
        assert module.LEAST_SECONDS < waits[2] <= 8 * module.EVENT_SECONDS < waits[3] <= module.MOST_SECONDS

    in_loop(work)


def test_what_comes_while_things_are_handed_over_holds_nothing_up_afterwards():
    async def work(outbox: Outbox, taken: Taken) -> None:
        async def come(what: list[int]) -> None:
            async with asyncio.timeout(30):
                while taken != what:
                    await asyncio.sleep(0.001)

        taken.put(0)
        await turns()

        def hand() -> None:  # the engine's thread gets its turn in the middle, and what it puts is taken at once, too
            taken.append(1)
            taken.put(2)

        outbox.put(hand, urgent=False)
        outbox.flush()
        await come([0, 1, 2])
        await asyncio.sleep(2 * module.MOST_SECONDS)  # a slow step: the timer finds nothing
        taken.put(3)
        await come([0, 1, 2, 3])

    in_loop(work)
