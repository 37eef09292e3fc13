"""Teams of OpenMP threads: how many there are in this process, and how a thread gives its own back."""

from __future__ import annotations

from latentkv.kernels import extension


def live_teams() -> int:
    """Number of threads in this process that hold a team of OpenMP threads, as far as the native kernels made them.

    More than one slow each other down: with more threads in teams than cores, each barrier sleeps. 0 without kernels.
    """
    return 0 if extension is None else extension.live_teams()


def release_team() -> None:
    """End the calling thread's team, torch's included; the next parallel region makes another within microseconds."""
    if extension is not None:
        extension.release_team()
