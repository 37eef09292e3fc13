"""Means, spreads, and differences of runs that share their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


@dataclass(frozen=True)
class Spread:
    """Some numbers.

    Attributes:
        mean: of them.
        deviation: standard deviation of the sample; None of a single number.
        count: how many.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean difference of pairs.

    Attributes:
        mean: of the pairs' differences.
        low, high: ends of its 95 % interval by Student's t; None of a single pair.
        pairs: how many.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one or more numbers."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs, over the seeds that both have; None where there is none.

    Raises:
        ValueError: there are more than 20 pairs.
    """
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    if len(pairs) > len(_T95) + 1:
        raise ValueError(f"at most {len(_T95) + 1} pairs, not {len(pairs)}")
    found = spread(pairs)
    if found.deviation is None:
        return Difference(found.mean, None, None, 1)
    half = _T95[len(pairs) - 2] * found.deviation / math.sqrt(len(pairs))
    return Difference(found.mean, found.mean - half, found.mean + half, len(pairs))
