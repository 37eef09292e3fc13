"""`Flight`: a step under way, and what it has read of each sequence once it is done."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from latentkv.engine.sequence import Sequence


class Reading(NamedTuple):
    """What a step has read of a sequence: tokens `start` to `end`, `drafted` of them a draft; its rows end at `stop`.

    `hidden`: their states [T, D]; `times_given_back`: the sequence's, when the step began.
    """

    sequence: Sequence
    start: int
    end: int
    drafted: int
    stop: int
    hidden: Tensor
    times_given_back: int

    @property
    def reaches_end(self) -> bool:
        """Whether what follows its newest token can be chosen."""
        return self.end - self.drafted >= len(self.sequence.tokens)


@dataclass(frozen=True)
class Flight:
    """A step under way: how many tokens of which sequences, how many were cached before and how many are drafts."""

    sequences: list[Sequence]
    counts: list[int]
    starts: list[int]
    drafted: list[int]
    times_given_back: list[int]
    began: float

    def readings(self, hidden: Tensor) -> list[Reading]:
        """What it has read of each sequence; `hidden` are the states [T, D] of all."""
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        stops = accumulate(self.counts)
        own = hidden.split(self.counts)
        columns = (self.sequences, self.starts, ends, self.drafted, stops, own, self.times_given_back)
        return [Reading(*row) for row in zip(*columns, strict=True)]
