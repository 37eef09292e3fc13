"""`Watch`: whether the other ranks still live."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from latentkv.errors import RankError
from latentkv.parallel.store import Store

BEAT_SECONDS = 1.0
LATE_SECONDS = 5.0
"""Without a beat, after which a rank counts as late."""

DIED = 1
"""Exit code of a rank that ends because another one is gone."""


class Watch:
    """Says once a second that this rank lives, and looks whether those that it depends on do.

    The driver looks at all, the others at the driver. A rank that has not been heard of for `seconds`, by this
    process's clock, is lost; so is the driver where the store, which lies beside it, does not answer. One thread asks
    the store, which may wait for ever where the machine of the store is stopped; another one looks at the clock.

    Args:
        store: a connection of its own to the store that all ranks share; their first beats are in it.
        rank: this process.
        size: of all.
        seconds: without a beat after which a rank is lost.
        before_the_end: called when a rank is lost, before anybody is told.
        ended: what became of a rank on this machine that has ended; None: none has.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        seconds: float,
        before_the_end: Callable[[RankError], object],
        ended: Callable[[], RankError | None],
    ) -> None:
        self._store, self._rank, self._seconds = store, rank, seconds
        self._watched = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self._beat = 0
        self._seen: dict[int, bytes] = {}
        self._heard: dict[int, float] = dict.fromkeys(self._watched, time.monotonic())
        self._stopped, self._ending = threading.Event(), threading.Event()
        self._on_loss: Callable[[RankError], None] = end_process
        self._before_the_end, self._ended = before_the_end, ended
        self._threads = [
            threading.Thread(target=run, name=f"latentkv-ranks-{name}", daemon=True)
            for name, run in (("beat", self._ask), ("clock", self._look))
        ]
        store.set_timeout(timedelta(seconds=max(seconds / 2, BEAT_SECONDS)))

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no more: this rank is about to end, and so are the others."""
        self._stopped.set()
        self._on_loss = end_process  # whom it would have told need not stay for it

    def expect_end(self) -> None:
        """Take it for no loss when ranks end, as they are about to be told to."""
        self._ending.set()

    def when_lost(self, tell: Callable[[RankError], None]) -> None:
        """Call `tell` with what became of a rank, once, instead of ending this process."""
        self._on_loss = tell

    def late(self) -> str:
        """Which rank is late, as a sentence; "" where none is."""
        now = time.monotonic()
        rank, heard = min(self._heard.items(), key=lambda each: each[1])
        waited = now - heard
        return "" if waited < LATE_SECONDS else f"Rank {rank} has not been heard of for {waited:.0f} seconds."

    def _ask(self) -> None:
        """Say that this rank lives, and note who else does."""
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._beat += 1
                self._store.set(beat_key(self._rank), str(self._beat))
                beats = self._store.multi_get([beat_key(rank) for rank in self._watched])
            except RuntimeError:  # of torch.distributed: the store is gone, or does not answer
                continue
            for rank, beat in zip(self._watched, beats, strict=True):
                if self._seen.get(rank) != beat:
                    self._seen[rank] = beat
                    self._heard[rank] = time.monotonic()

    def _look(self) -> None:
        """Tell when a rank has not been heard of for too long."""
        while not self._stopped.wait(BEAT_SECONDS / 2):
            error = self._loss()
            if error is not None:
                self._stopped.set()
                self._before_the_end(error)
                self._on_loss(error)

    def _loss(self) -> RankError | None:
        # Before somebody waits to be told, a rank that ends has said why in another way.
        if self._on_loss is not end_process and not self._ending.is_set() and (error := self._ended()) is not None:
            return error
        now = time.monotonic()
        lost = [rank for rank, heard in self._heard.items() if now - heard > self._seconds]
        return RankError(lost[0], f"did not answer for {self._seconds:.0f} seconds") if lost else None


def beat_key(rank: int) -> str:
    """Where a rank's beats are in the store."""
    return f"latentkv/beat/{rank}"


def end_process(error: RankError) -> None:
    """End this process at once, whatever its other threads wait for."""
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    os._exit(DIED)
