"""Timing several contenders fairly: round-robin, so that drift hits all alike; medians, never the best of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from latentkv.errors import RequestError


@dataclass(frozen=True)
class Contender:
    """Something to time. `prepare`, where given, runs before every step and is not timed."""

    step: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds of every timed repeat, in the order taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.05 means that half of the repeats lay within about 5 %."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def time_interleaved(contenders: Mapping[str, Contender], *, repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time every contender `repeats` times: A B C, A B C, ... after `warmup` untimed rounds.

    Args:
        contenders: what to time, by name; each call must do the same work every time.
        repeats: timed rounds, at least 1.
        warmup: untimed rounds before them.

    Returns:
        One `Timing` of `repeats` samples for each contender.

    Raises:
        RequestError: `repeats` < 1 or `warmup` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise RequestError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}.")
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(warmup + repeats):
        for name, contender in contenders.items():
            seconds = time_once(contender)
            if round_index >= warmup:
                samples[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def time_once(contender: Contender) -> float:
    """Seconds of one step, its preparation left out."""
    if contender.prepare is not None:
        contender.prepare()
    started = time.perf_counter()
    contender.step()
    return time.perf_counter() - started


@contextmanager
def torch_threads(threads: int | None) -> Generator[int]:
    """Run the block with `threads` torch threads (None: as they are) and put the number back; yields the number used.

    Raises:
        RequestError: `threads` < 1.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, not {threads}.")
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
