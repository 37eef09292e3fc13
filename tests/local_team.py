"""The ranks of a team as threads of one process: memory is shared as between processes, all else is as it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from latentkv.errors import RankError
from latentkv.ops.native.shared_sum import SharedSum, shared_bytes
from latentkv.parallel import MemorySums, ShardTeam

T = TypeVar("T")


def local_sums(count: int, ended: Sequence[int] | None = None) -> list[SharedSum]:
    """What so many processes add up by, each for a thread of its own."""
    file = os.memfd_create("test")
    os.ftruncate(file, shared_bytes(count))
    made = [SharedSum(file, rank, count, ended or [-1] * count) for rank in range(count)]
    os.close(file)
    return made


def local_teams(widths: Sequence[int]) -> list[ShardTeam]:
    """Of each rank the team, whose output heads have so many rows."""
    ranks = range(len(widths))
    memories = local_sums(len(widths))
    return [
        ShardTeam(rank, ranks, widths, MemorySums(memory, rank, ranks), _itself) for rank, memory in enumerate(memories)
    ]


def together(work: Callable[[int], T], count: int) -> list[T]:
    """What `work(rank)` gives in each of `count` threads; an exception of the first that raised one."""
    results: dict[int, T] = {}
    raised: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if raised:
        raise raised[0]
    assert len(results) == count, "a thread still waits"
    return [results[rank] for rank in range(count)]


def _itself(error: RankError) -> RankError:
    return error
