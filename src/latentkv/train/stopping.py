"""How a run is asked to end: by Ctrl-C, or by SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(*, together: bool = False) -> Generator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once.

    Where several processes train `together`, each hears of Ctrl-C from the terminal and from torchrun: that is one.
    """
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if caught and not together:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
