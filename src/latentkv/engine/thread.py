"""`EngineThread`: an engine in a thread of its own, for many callers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

from latentkv.engine.engine import EndsText, Engine, Event
from latentkv.engine.request import Request
from latentkv.engine.watchdog import Watchdog
from latentkv.errors import BusyError, EngineStoppedError, LatentKVError

Listener = Callable[[Event | Exception], None]
"""Called in the engine's thread with each new token; the last call has a finish_reason or is an error. It must be
quick; if it raises, its request is given up."""

FAILURES = 3
"""Steps that fail one after another before the engine gives up."""

JOIN_SECONDS = 5.0
"""For the last step to end when the engine stops."""


@dataclass(frozen=True)
class Health:
    """How an engine does.

    Attributes:
        state: "idle", "working", "draining" (it takes no new request), "stopped" or "dead".
        reason: what happened, as a sentence; "" while nothing did.
        seconds: with work and without progress, as `Watchdog` counts both.
    """

    state: Literal["idle", "working", "draining", "stopped", "dead"]
    reason: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether new requests can be served."""
        return self.state in ("idle", "working")


class EngineThread:
    """Runs an engine's steps as long as there is work, and takes requests from any thread.

    Every request that was taken gets exactly one last call: its end, or an error. One that is given up gets none more.

    Args:
        engine: used by this thread alone from `start` on.
        max_open: requests that are not finished at once; more are refused.
        stall_seconds: time without progress after which the engine counts as dead.
    """

    def __init__(self, engine: Engine, *, max_open: int = 512, stall_seconds: float = 120) -> None:
        self._engine = engine
        self._max_open = max_open
        self._lock = threading.Lock()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._open: dict[int, Listener] = {}  # by ticket
        self._indices: dict[int, int] = {}  # ticket -> the engine's index; the engine's thread alone uses it
        self._tickets: dict[int, int] = {}  # and back
        self._next_ticket = 0
        self._draining = self._stopping = False
        self._reason: str | None = None  # why it is dead
        self._watchdog = Watchdog(stall_seconds, busy=lambda: bool(self._open))
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="latentkv-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._watchdog.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._open)

    def submit(self, request: Request, listener: Listener, *, ends_text: EndsText | None = None, salt: str = "") -> int:
        """Take a request in.

        Args:
            request: what to run.
            listener: gets what comes out of it.
            ends_text: as in `Engine.add`; called in the engine's thread.
            salt: as in `Engine.add`.

        Returns:
            A ticket to give it up by.

        Raises:
            BusyError: too many requests are open.
            EngineStoppedError: the engine is draining, stopped or dead.
            RequestError: it could not fit even into an empty cache.
        """
        self._engine.require_fits(request)
        with self._lock:
            self._require_open()
            if len(self._open) >= self._max_open:
                raise BusyError(f"{self._max_open} requests are under way or wait already: try again later.")
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._open[ticket] = listener
        self._commands.put(lambda: self._add(ticket, request, ends_text, salt))
        return ticket

    def abort(self, ticket: int) -> None:
        """Give a request up: it gets no further call, and its pages are free after the step under way."""
        with self._lock:
            if self._open.pop(ticket, None) is None:
                return
            self._changed.notify_all()
        self._commands.put(lambda: self._abort(ticket))

    def health(self) -> Health:
        """How the engine does. One that makes no progress is found dead here, and its requests get an error."""
        wrong, waited = self._watchdog.diagnosis(), self._watchdog.stall().seconds
        if wrong and self._open:
            self._die(f"{wrong}, and {len(self._open)} requests wait.")
        with self._lock:
            if self._reason is not None:
                return Health("dead", self._reason, waited)
            if not self._thread.is_alive():
                return Health("stopped", "The engine has stopped.", waited)
            if self._draining:
                return Health("draining", f"The engine ends {len(self._open)} last requests.", waited)
            return Health("working" if self._open else "idle", "", waited)

    def drain(self, seconds: float) -> bool:
        """Take no new request, wait until the open ones are finished, and stop; the rest get an error.

        Args:
            seconds: how long to wait for them.

        Returns:
            Whether all were finished in time.
        """
        with self._lock:
            self._draining = True
            finished = self._changed.wait_for(lambda: not self._open, timeout=seconds)
        self._fail_all(EngineStoppedError("The server is shutting down, and the request was not finished in time."))
        self._stopping = True
        self._commands.put(_wake)
        if self._thread.is_alive():
            self._thread.join(timeout=JOIN_SECONDS)
        return finished

    def _require_open(self) -> None:
        if self._reason is not None:
            raise EngineStoppedError(f"The engine is dead: {self._reason}")
        if self._draining:
            raise EngineStoppedError("The engine is shutting down and takes no new request.")
        if not self._thread.is_alive():
            raise EngineStoppedError("The engine is not running.")

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        failures = 0
        try:
            while not self._stopping:
                try:
                    self._take_commands()
                    if self._indices:
                        self._deliver(self._engine.step())
                        self._watchdog.step_ended(self._engine.counters)
                    failures = 0
                except Exception as error:  # whatever the model raised: those in the step get it, the others go on
                    failures += 1
                    self._report_failed(error)
                    if failures == FAILURES:
                        self._die(f"{FAILURES} steps failed one after another, the last one so: {error}")
        finally:
            self._watchdog.stop()
            if not self._stopping:
                self._die("Its thread ended.")
            for index in self._tickets:
                self._engine.abort(index)
            self._fail_all(EngineStoppedError("The engine has stopped, and the request was not finished."))

    def _take_commands(self) -> None:
        """Do what was asked for since the last step; with nothing else to do, wait for it."""
        idle = not self._indices
        while idle or not self._commands.empty():
            self._commands.get()()
            idle = False

    def _add(self, ticket: int, request: Request, ends_text: EndsText | None, salt: str) -> None:
        if ticket not in self._open:
            return
        try:
            index = self._engine.add(request, ends_text, salt=salt)
        except Exception as error:
            self._finish(ticket, error)
            return
        self._indices[ticket], self._tickets[index] = index, ticket

    def _abort(self, ticket: int) -> None:
        index = self._indices.pop(ticket, None)
        if index is not None:
            del self._tickets[index]
            self._engine.abort(index)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            ticket = self._tickets.get(event.index)
            if ticket is None:
                continue  # given up at an earlier token of this step
            if event.finish_reason:
                del self._tickets[event.index], self._indices[ticket]
                self._finish(ticket, event)
            elif listener := self._open.get(ticket):
                try:
                    listener(event)
                except Exception as error:  # one who cannot listen is given up, and nobody else
                    self._abort(ticket)
                    self._finish(ticket, error)

    def _report_failed(self, error: Exception) -> None:
        for index, ticket in list(self._tickets.items()):
            if index not in self._engine:
                del self._tickets[index], self._indices[ticket]
                self._finish(ticket, error)

    # And this in any.

    def _finish(self, ticket: int, last: Event | Exception) -> None:
        with self._lock:
            listener = self._open.pop(ticket, None)
            self._changed.notify_all()
        if listener:
            with suppress(Exception):
                listener(last)

    def _fail_all(self, error: LatentKVError) -> None:
        for ticket in list(self._open):
            self._finish(ticket, error)

    def _die(self, reason: str) -> None:
        with self._lock:
            if self._reason is None:
                self._reason = reason
            self._stopping = True
        self._fail_all(EngineStoppedError(f"The engine is dead: {reason}"))
        self._commands.put(_wake)


def _wake() -> None:
    """A command for an engine that waits for one."""
