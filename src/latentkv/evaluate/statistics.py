"""How sure a figure is: standard errors over windows of text, intervals of shares, differences of pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean.

    Attributes:
        mean: of what was measured.
        error: its standard error; None where a single sample tells none.
    """

    mean: float
    error: float | None

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(self.mean * factor, None if self.error is None else self.error * abs(factor))

    def exp(self) -> Estimate | None:
        """Its exponential, the error to first order; None where that is too large for a float."""
        try:
            value = math.exp(self.mean)
        except OverflowError:
            return None
        return Estimate(value, None if self.error is None else value * self.error)


@dataclass(frozen=True)
class Share:
    """How many of some were right.

    Attributes:
        right: of them.
        total: all.
        low: end of the 95 % interval of the share by Wilson's method.
        high: the other end.
    """

    right: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Right ones of all."""
        return self.right / self.total


@dataclass(frozen=True)
class Paired:
    """Two models' answers to the same questions.

    Attributes:
        only_model: right by the model alone.
        only_source: right by the source alone.
        difference: share that the model has right, less that of the source.
    """

    only_model: int
    only_source: int
    difference: Estimate


def per_unit(totals: Sequence[float], units: Sequence[int]) -> Estimate:
    """The mean a unit (a token) of what windows have in all, with the standard error of a ratio over the windows.

    The windows count as drawn independently; those with more units weigh more.
    """
    whole = sum(units)
    mean, samples = math.fsum(totals) / whole, len(totals)
    if samples < 2:
        return Estimate(mean, None)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, units, strict=True))
    return Estimate(mean, math.sqrt(squares * samples / (samples - 1)) / whole)


def share(right: Sequence[bool]) -> Share:
    """Of one or more answers, those that are right; the interval is Wilson's (1927)."""
    count, total = sum(right), len(right)
    value, z2 = count / total, _Z95**2
    center = (value + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(value * (1 - value) / total + z2 / (4 * total**2))
    return Share(count, total, min(value, max(0.0, center - half)), max(value, min(1.0, center + half)))


def paired(model: Sequence[bool], source: Sequence[bool]) -> Paired:
    """Two models' answers to the same questions, in the same order."""
    differences = [int(ours) - int(theirs) for ours, theirs in zip(model, source, strict=True)]
    return Paired(differences.count(1), differences.count(-1), per_unit(differences, [1] * len(differences)))
