"""`EngineThread`: an engine in a thread of its own, for many callers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from latentkv.engine.engine import EndsText, Engine, Event
from latentkv.engine.request import Request
from latentkv.engine.watchdog import Watchdog
from latentkv.engine.worker import JOIN_SECONDS, Worker
from latentkv.errors import BusyError, EngineStoppedError, LatentKVError, RankError

T = TypeVar("T")

Listener = Callable[[Event | Exception], None]
"""Called in the engine's thread with each new token; the last call has a finish_reason or is an error. It must be
quick; if it raises, its request is given up."""

FAILURES = 3
"""Steps that fail one after another before a guarded engine gives up."""


@dataclass(frozen=True)
class Submission:
    """A request, and who hears of it; the attributes are the arguments of `EngineThread.submit`."""

    request: Request
    listener: Listener
    ends_text: EndsText | None = None


@dataclass(frozen=True)
class Health:
    """How an engine does.

    Attributes:
        state: "idle", "working", "late" (another process of the model has not been heard of for a while), "draining"
            (it takes no new request), "stopped" or "dead".
        reason: what happened, as a sentence; "" while nothing did.
        seconds: with work and without progress, as `Watchdog` counts both.
    """

    state: Literal["idle", "working", "late", "draining", "stopped", "dead"]
    reason: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether new requests can be served."""
        return self.state in ("idle", "working")


class EngineThread:
    """Runs an engine's steps in one thread as long as there is work, and takes requests from any thread.

    Every request that was taken gets exactly one last call: its end, or an error. One that is given up gets none more.

    Args:
        engine: used by this thread alone from `start` on.
        max_open: requests that are not finished at once; more are refused. None takes all.
        stall_seconds: time without progress after which the engine counts as dead. None waits for ever.
        worker: the thread that loaded the engine's model; None starts one of its own.
        why_late: which other process of the model is late, as a sentence, or ""; None: there are none.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_open: int | None = 512,
        stall_seconds: float | None = 120,
        worker: Worker | None = None,
        why_late: Callable[[], str] | None = None,
    ) -> None:
        self._engine = engine
        self._why_late = why_late
        self._worker = worker
        self._max_open = max_open
        self._lock = threading.RLock()  # reentrant: garbage may be collected, and give a request up, at any point
        self._open: dict[int, Listener] = {}  # by ticket
        self._indices: dict[int, int] = {}  # ticket -> the engine's index; the engine's thread alone uses it
        self._tickets: dict[int, int] = {}  # and back
        self._next_ticket = 0
        self._failures = 0
        self._draining = False
        self._after_step: Callable[[], object] = lambda: None
        self._reason: str | None = None  # why it is dead
        self._watchdog = None if stall_seconds is None else Watchdog(stall_seconds, busy=lambda: bool(self._open))
        self._changed = threading.Condition(self._lock)

    def start(self) -> None:
        """Begin; more than once does no harm."""
        self._worker = self._worker or Worker()
        self._worker.drive(self._turn, self._end)
        if self._watchdog:
            self._watchdog.start()

    def guard(self, *, max_open: int, stall_seconds: float, after_step: Callable[[], object] = lambda: None) -> None:
        """Serve strangers from now on, with limits as the arguments of the same names say.

        An engine that is guarded also gives up after `FAILURES` steps that fail one after another. `after_step` is
        called in the engine's thread when the listeners have heard of all that a step made; it must not raise.
        """
        self._after_step = after_step
        if self._watchdog:
            self._watchdog.stop()
        self._max_open, self._watchdog = max_open, Watchdog(stall_seconds, busy=lambda: bool(self._open))
        self._watchdog.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._worker is not None and self._worker.alive

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
        return self.submit_all([Submission(request, listener, ends_text)], salt=salt)[0]

    def submit_all(self, submissions: Sequence[Submission], *, salt: str = "") -> list[int]:
        """Take several requests in before the next step, or none: as `submit`, a ticket each."""
        for each in submissions:
            self._engine.require_fits(each.request)
        with self._lock:
            worker = self._require_open()
            if self._max_open is not None and len(self._open) + len(submissions) > self._max_open:
                raise BusyError(f"{self._max_open} requests are under way or wait already: try again later.")
            tickets = list(range(self._next_ticket, self._next_ticket + len(submissions)))
            self._next_ticket += len(submissions)
            self._open.update(zip(tickets, (each.listener for each in submissions), strict=True))
        worker.post(partial(self._add_all, tickets, submissions, salt))
        return tickets

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` in the engine's thread, between two steps, as `Worker.call`."""
        if self._worker is None:
            raise EngineStoppedError("The engine is not running.")
        return self._worker.call(work)

    def abort(self, ticket: int, *, wait: bool = False) -> None:
        """Give a request up: it gets no further call, and its pages are free after the step under way.

        Args:
            ticket: of the request; one that has ended stays so.
            wait: return when the pages are free.
        """
        with self._lock:
            if self._open.pop(ticket, None) is None or self._worker is None:
                return
            self._changed.notify_all()
        gone = threading.Event()

        def give_up() -> None:
            self._abort(ticket)
            gone.set()

        with suppress(EngineStoppedError):
            self._worker.post(give_up)
            if wait and not self._worker.is_current:
                gone.wait(JOIN_SECONDS)  # bounded: garbage may be collected, and end up here, in any thread

    def health(self) -> Health:
        """How the engine does. One that makes no progress is found dead here, and its requests get an error."""
        waited = self._watchdog.stall().seconds if self._watchdog else 0.0
        wrong = self._watchdog.diagnosis() if self._watchdog else ""
        if wrong and self._open:
            self._die(f"{wrong}, and {len(self._open)} requests wait.")
        with self._lock:
            if self._reason is not None:
                return Health("dead", self._reason, waited)
            if not self.alive:
                return Health("stopped", "The engine has stopped.", waited)
            if self._draining:
                return Health("draining", f"The engine ends {len(self._open)} last requests.", waited)
            late = self._why_late() if self._why_late else ""
            if late:
                return Health("late", late, waited)
            return Health("working" if self._open else "idle", "", waited)

    def die_of(self, error: RankError) -> None:
        """Give all up: another process of the model is lost. The engine's thread may wait for it for ever."""
        self._die(str(error), error)

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
        if self._worker:
            self._worker.stop(JOIN_SECONDS)
        return finished

    def _require_open(self) -> Worker:
        if self._reason is not None:
            raise EngineStoppedError(f"The engine is dead: {self._reason}")
        if self._draining:
            raise EngineStoppedError("The engine is shutting down and takes no new request.")
        if self._worker is None or not self._worker.alive:
            raise EngineStoppedError("The engine is not running.")
        return self._worker

    # What follows runs in the engine's thread.

    def _turn(self) -> bool:
        """One step, if there is work; whether there is more."""
        if not self._indices:
            return False
        finished = self._engine.finished_steps
        try:
            self._deliver(self._engine.step())
            if self._watchdog:
                self._watchdog.step_ended(self._engine.counters)
            if self._engine.finished_steps > finished:
                self._failures = 0
        except RankError as error:  # no step can be computed any more
            self.die_of(error)
        except Exception as error:  # whatever the model raised: those in the step get it, the others go on
            self._failures += 1
            last = f"{FAILURES} steps failed one after another, the last one so: {error}"
            fatal = self._failures == FAILURES and self._max_open is not None
            if fatal:  # said first: whoever hears of the last failure finds the engine dead
                self._condemn(last)
            if not self._report_failed(error) and self._max_open is None:
                self._give_up_all(error)  # it would fail for ever, and whoever asked would wait as long
            if fatal:
                self._die(last)
        except BaseException:
            self._die("Its thread ended.")
            raise
        return bool(self._indices)

    def _end(self) -> None:
        if self._watchdog:
            self._watchdog.stop()
        for index in self._tickets:
            self._engine.abort(index)
        self._fail_all(EngineStoppedError("The engine has stopped, and the request was not finished."))
        if self._reason is None:
            try:
                self._engine.runner.close()
            except RankError as error:
                self._reason = str(error)

    def _add_all(self, tickets: list[int], submissions: Sequence[Submission], salt: str) -> None:
        for ticket, each in zip(tickets, submissions, strict=True):
            if ticket not in self._open:
                continue
            try:
                index = self._engine.add(each.request, each.ends_text, salt=salt)
            except Exception as error:
                self._finish(ticket, error)
                continue
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
        self._after_step()

    def _report_failed(self, error: Exception) -> bool:
        """Tell those whose request the engine gave up in a step that failed; whether there were any."""
        failed = [(index, ticket) for index, ticket in self._tickets.items() if index not in self._engine]
        for index, ticket in failed:
            del self._tickets[index], self._indices[ticket]
            self._finish(ticket, error)
        return bool(failed)

    def _give_up_all(self, error: Exception) -> None:
        for ticket in list(self._indices):
            self._abort(ticket)
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

    def _die(self, reason: str, error: RankError | None = None) -> None:
        self._condemn(reason)
        self._fail_all(error or EngineStoppedError(f"The engine is dead: {reason}"))
        if self._worker:
            self._worker.stop(0)

    def _condemn(self, reason: str) -> None:
        """Say why it is dead, which the first reason answers."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
