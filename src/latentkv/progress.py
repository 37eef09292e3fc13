"""A bar for many completions at once."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar(Protocol):
    """What shows progress."""

    def add(self, tokens: int, *, finished: bool) -> None:
        """A completion has so many new tokens, and may be finished."""
        ...


class _Hidden:
    def add(self, tokens: int, *, finished: bool) -> None:
        pass


@contextmanager
def progress_bar(total: int, *, shown: bool = True) -> Generator[Bar]:
    """A bar on stderr that counts finished completions of `total`, and tokens a second."""
    if not shown:
        yield _Hidden()
        return
    # Imported here because it is slow to import and only this needs it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.1f}/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, tokens=0, speed=0.0)

        yield _Shown(progress, task)


class _Shown:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0

    def add(self, tokens: int, *, finished: bool) -> None:
        self._tokens += tokens
        seconds = self._progress.tasks[0].elapsed or 0
        speed = self._tokens / seconds if seconds else 0.0
        self._progress.update(self._task, advance=int(finished), tokens=self._tokens, speed=speed)
