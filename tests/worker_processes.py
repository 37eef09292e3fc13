"""Processes with limits that this one has started."""

from __future__ import annotations

from contextlib import suppress

import psutil


def worker_processes(file: str) -> set[int]:
    """The ids of those that run the worker `file`."""
    found: set[int] = set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie among them
            if file in " ".join(child.cmdline()):
                found.add(child.pid)
    return found
