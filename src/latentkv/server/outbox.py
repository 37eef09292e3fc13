"""`Outbox`: what the engine's thread has for the event loop, handed over a few milliseconds' worth at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Hand = Callable[[], object]
"""Hands one thing over, in the event loop."""

EVENT_SECONDS = 0.005
"""Time between two events of a stream, times the streams that are open: an event costs a fifth of a millisecond of a
core, whatever it holds, so that a twenty-fifth of one goes into events."""
LEAST_SECONDS = 0.01
MOST_SECONDS = 0.1


class Outbox:
    """Wakes the event loop once a step, and less often where steps come fast and nothing is urgent.

    Attributes:
        streams: that are open; whoever opens and closes them counts.
    """

    def __init__(self) -> None:
        self.streams = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._things: deque[Hand] = deque()
        self._urgent = False
        self._asked = False  # that the loop empty it, soon
        self._timer: asyncio.TimerHandle | None = None
        self._emptied = float("-inf")  # when, as the loop counts

    def open(self) -> None:
        """Hand over to the event loop that runs here, from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what waits is for a loop that has ended
            self._things.clear()
            self._loop, self._asked, self._urgent, self._timer = loop, False, False, None
            self._emptied = float("-inf")

    def put(self, hand: Hand, *, urgent: bool) -> None:
        """Take something in, from any thread; it waits for `flush`."""
        self._things.append(hand)
        self._urgent |= urgent

    def flush(self) -> None:
        """Have the loop take what is in here; called after every step, in the engine's thread, or in any."""
        if self._urgent:
            self._urgent = False
            self._call(self._empty)
        elif self._things and not self._asked and self._timer is None:
            self._asked = True
            self._call(self._soon)

    def _call(self, what: Callable[[asyncio.AbstractEventLoop], Any]) -> None:
        if (loop := self._loop) is not None:
            with suppress(RuntimeError):  # the event loop has ended, and so has whoever asked
                loop.call_soon_threadsafe(what, loop)

    # What follows runs in the event loop.

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        due = self._emptied + self._interval
        if due <= loop.time():
            self._empty(loop)
        elif self._timer is None:
            self._timer = loop.call_at(due, self._at_due, loop)

    def _at_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """While steps are fast, one call takes what several made, and the engine's thread calls nobody."""
        self._timer = None  # before the look: what comes after it finds no timer, or the next
        self._asked = False  # likewise
        if self._things:
            self._empty(loop)
            self._timer = loop.call_at(self._emptied + self._interval, self._at_due, loop)

    @property
    def _interval(self) -> float:
        return min(max(self.streams * EVENT_SECONDS, LEAST_SECONDS), MOST_SECONDS)

    def _empty(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._emptied = loop.time()
        self._asked = False  # before the last look: what comes after it is asked for again
        while self._things:
            self._things.popleft()()
