"""`Loading`: pages that are on their way from a store into those of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from threading import Event


class Loading:
    """A piece of work in another thread that fills pages.

    Args:
        thread: where it is done.
        work: called with a function that says whether to go on; returns how many pages it has filled.
    """

    def __init__(self, thread: Executor, work: Callable[[Callable[[], bool]], int]) -> None:
        self._unwanted = Event()
        self._future: Future[int] = thread.submit(work, lambda: not self._unwanted.is_set())

    @property
    def done(self) -> bool:
        """Whether no page is written to any more."""
        return self._future.done()

    def pages(self) -> int:
        """How many pages, from the first on, were filled; waits for the end."""
        return self._future.result()

    def stop(self) -> None:
        """Fill no further page, and wait until none is written to."""
        self._unwanted.set()
        if not self._future.cancel():
            wait([self._future])

    @staticmethod
    def wait_for_any(loadings: Iterable[Loading], seconds: float) -> None:
        """Wait until one of them is done, at most so long."""
        wait([loading._future for loading in loadings], timeout=seconds, return_when=FIRST_COMPLETED)
