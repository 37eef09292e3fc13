"""What the commands share in how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console on today's stdout or stderr; wide where it is not a terminal, so that a pipe gets whole lines."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 1000)


@contextmanager
def status(text: str) -> Generator[None]:
    """Say on a terminal what is being waited for; elsewhere nothing, and rich is not imported, which takes a while."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(text):
        yield


def note(text: str) -> None:
    """Write a line to stderr that stands back on a terminal; rich is not imported for it."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress(title: str, *, silent: bool = False) -> Generator[Callable[[str, int, int], None]]:
    """A bar on a terminal that names stage and count: called with the stage, what is done of it, and of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=silent or not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, total: bar.update(task, description=f"{title}: {what}", completed=done, total=total)
