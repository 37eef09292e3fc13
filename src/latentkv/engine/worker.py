"""`Worker`: the one thread in which a model is loaded and run, whichever threads ask for it."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from latentkv.errors import EngineStoppedError
from latentkv.ops.native.team import live_teams, release_team

T = TypeVar("T")

logger = logging.getLogger("latentkv.engine")

JOIN_SECONDS = 5.0
"""Time for the last step to end when a worker stops."""

_INTERRUPT_SECONDS = 0.1
_LOOK_SECONDS = 0.5
_STOPPED = "The engine has stopped: load the model again."


class Worker:
    """A thread of its own, which runs what other threads ask for in the order in which they ask.

    Every thread that computes gets a team of OpenMP threads, and two teams on the same cores slow each other down to a
    half or a third (`csrc/team.h`). So one thread loads a model and runs all of its steps; while it has nothing to do
    it holds no team, and a model in another thread computes as fast.

    It computes with the context variables of the thread that made it.

    Args:
        name: of the thread.
        threads: that compute; None: as many as torch was told in the thread that asked last.
    """

    def __init__(self, name: str = "latentkv-engine", *, threads: int | None = None) -> None:
        self._threads = threads
        self._commands: SimpleQueue[tuple[int, Callable[[], object]]] = SimpleQueue()
        self._lock = threading.RLock()  # reentrant: garbage may be collected, and give something up, at any point
        self._stopping = self._ended = self._warned = False
        self._turn: Callable[[], bool] = _no_work
        self._at_end: Callable[[], None] = _nothing
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self._thread

    def drive(self, turn: Callable[[], bool], at_end: Callable[[], None]) -> None:
        """Call `turn` again and again, as long as it returns True, and after every command; `at_end` when it stops."""
        self._turn, self._at_end = turn, at_end

    def post(self, command: Callable[[], object]) -> None:
        """Run `command` before the next turn, without waiting for it; it must not raise.

        Raises:
            EngineStoppedError: the worker has stopped.
        """
        if not self.is_current:
            release_team()  # what computed in this thread before may have left one, which would stand in the way
        with self._lock:
            if self._ended or self._stopping or not self._thread.is_alive():
                raise EngineStoppedError(_STOPPED)
            self._commands.put((self._threads or torch.get_num_threads(), command))

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` before the next turn and return what it returns, or raise what it raises.

        Interrupted while it waits (Ctrl-C), `work` is interrupted too.

        Raises:
            EngineStoppedError: the worker has stopped.
        """
        if self.is_current:
            return work()
        call = _Call(work)
        self.post(call)
        return call.wait()

    def stop(self, seconds: float = JOIN_SECONDS) -> None:
        """End after the command or turn under way, and wait so long for that; more than once does no harm."""
        self._stopping = True
        self._commands.put((0, _nothing))
        if not self.is_current and self._thread.is_alive():
            self._thread.join(timeout=seconds)

    def _run(self) -> None:
        busy = False
        try:
            while not self._stopping:
                self._run_commands(wait=not busy)
                busy = not self._stopping and self._turn()
        finally:
            with self._lock:
                self._ended = True
            while not self._commands.empty():
                _, command = self._commands.get()
                if isinstance(command, _Call):
                    command.fail(EngineStoppedError(_STOPPED))
            self._at_end()

    def _run_commands(self, *, wait: bool) -> None:
        """Run what was posted since the last turn; with `wait`, at least one command."""
        if wait and self._commands.empty():
            release_team()
        while not self._stopping and (wait or not self._commands.empty()):
            threads, command = self._commands.get()
            if wait and not self._stopping and live_teams() and not self._warned:
                self._warned = True
                logger.warning(
                    "Another thread of this process computes beside this model's: both are slower by half or more. "
                    "Let one thread compute at a time."
                )
            if threads and threads != torch.get_num_threads():
                torch.set_num_threads(threads)
            wait = False
            command()


class _Call(Generic[T]):
    """Work that another thread waits for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._context = copy_context()
        self._lock = threading.Lock()
        self._ident: int | None = None  # of the thread that runs it, while it does
        self._given_up = False
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Run it, in the worker's thread."""
        try:
            with self._lock:
                if self._given_up:
                    return
                self._ident = threading.get_ident()
            try:
                self._result.append(self._context.run(self._work))
            except BaseException as error:
                self._error = error
            with self._lock:
                self._ident = None
            if self._given_up and not isinstance(self._error, _GivenUp):
                time.sleep(_INTERRUPT_SECONDS)  # for what interrupts it to arrive here, and nowhere else
        except _GivenUp:
            pass
        finally:
            self._done.set()

    def wait(self) -> T:
        """What came out of it, for the thread that waits."""
        try:
            while not self._done.wait(_LOOK_SECONDS):  # a signal does not wake a thread that was about to sleep
                pass
        except BaseException:
            self._give_up()
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or the error would hold its own traceback
        return self._result.pop()

    def fail(self, error: Exception) -> None:
        """End without running."""
        self._error = error
        self._done.set()

    def _give_up(self) -> None:
        with self._lock:
            self._given_up = True
            if self._ident is not None:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(self._ident), ctypes.py_object(_GivenUp))


class _GivenUp(BaseException):
    """Interrupts work that nobody waits for any more."""


def _no_work() -> bool:
    return False


def _nothing() -> Any:
    return None
