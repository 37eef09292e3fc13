"""`Watchdog`: whether an engine that has work gets on with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from latentkv.engine.counters import Counters

logger = logging.getLogger("latentkv.engine")

MAX_TICK_SECONDS = 1.0
TICKS = 8
"""That a stall is long at least, so that it is measured and not guessed."""


@dataclass(frozen=True)
class Stall:
    """Time with work and without progress.

    Attributes:
        seconds: in which the engine's thread could have run.
        denied: further ones, in which no thread of this process got any time.
        steps: that ended in either, and did nothing.
    """

    seconds: float
    denied: float
    steps: int


class Watchdog:
    """Measures how long an engine has had work and made no progress.

    Progress is a token that was chosen (and with it every end), or a part of a prompt that was read or found as it was
    let in. A step that does nothing is none, nor is reading again and again what is given up again, nor a client who
    comes or leaves. Only time counts that the engine's
    thread could have used: a thread here wakes at every tick, and as long as it could not (something held the
    interpreter, or the process was stopped), the engine could not either.

    Args:
        stall_seconds: that are too many.
        busy: whether there is work.
    """

    def __init__(self, stall_seconds: float, busy: Callable[[], bool]) -> None:
        self._stall_seconds = stall_seconds
        self._busy = busy
        self._tick_seconds = min(MAX_TICK_SECONDS, stall_seconds / TICKS)
        self._lock = threading.Lock()
        self._stall = Stall(0, 0, 0)
        self._chosen = self._known = 0  # tokens, at the last progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentkv-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; more than once does no harm."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._ended.set()

    def step_ended(self, counters: Counters) -> None:
        """A step has ended, and `counters` say what all steps have done so far."""
        with self._lock:
            stall = self._stall
            self._stall = Stall(stall.seconds, stall.denied, stall.steps + 1)
            if counters.generated_tokens != self._chosen or counters.known_tokens > self._known:
                self._chosen, self._known = counters.generated_tokens, counters.known_tokens
                self._stall = Stall(0, 0, 0)

    def stall(self) -> Stall:
        """Since the last progress."""
        with self._lock:
            return self._stall

    def diagnosis(self) -> str:
        """What is wrong, as the beginning of a sentence; "" while less than `stall_seconds` were lost."""
        stall = self.stall()
        if stall.seconds <= self._stall_seconds:
            return ""
        if stall.steps:
            return f"The last {stall.steps} steps did nothing, in {stall.seconds:.0f} seconds"
        return f"A step hangs: it has not ended for {stall.seconds:.0f} seconds"

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._tick_seconds):
            now = time.monotonic()
            self._tick(now - before)
            before = now

    def _tick(self, seconds: float) -> None:
        """So much time has passed since the last tick, of which one tick's length counts, or two."""
        if not self._busy():
            return
        own = min(seconds, 2 * self._tick_seconds)
        with self._lock:
            stall = self._stall
            self._stall = Stall(stall.seconds + own, stall.denied + seconds - own, stall.steps)
        if seconds - own > MAX_TICK_SECONDS:
            logger.warning(
                "The engine's thread got no time for %.1f seconds: something held the interpreter, or the process was "
                "stopped.",
                seconds - own,
            )
