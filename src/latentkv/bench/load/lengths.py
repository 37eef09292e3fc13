"""Numbers of tokens as people ask for them: 512, 64-512, normal:512,128, lognormal:512,256."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

from latentkv.errors import RequestError
from latentkv.sizes import parse_tokens

Distribution = Literal["uniform", "normal", "lognormal"]


@dataclass(frozen=True)
class Lengths:
    """How many tokens each request has.

    Attributes:
        distribution: uniform includes both ends; what falls below 1 counts as 1.
        first: the least of a uniform, else the mean.
        second: the most of a uniform, else the standard deviation; both of the lengths, a lognormal's too.
    """

    distribution: Distribution
    first: int
    second: int

    def __str__(self) -> str:
        """As `parse_lengths` reads it."""
        if self.distribution == "uniform":
            return f"{self.first}" if self.first == self.second else f"{self.first}-{self.second}"
        return f"{self.distribution}:{self.first},{self.second}"

    @property
    def mean(self) -> float:
        """Tokens a request, before what falls below 1 is raised."""
        return (self.first + self.second) / 2 if self.distribution == "uniform" else self.first

    def draw(self, random: Random) -> int:
        """Tokens of the next request, at least 1."""
        if self.distribution == "uniform":
            return random.randint(self.first, self.second)
        if self.distribution == "normal":
            return max(1, round(random.gauss(self.first, self.second)))
        variance = math.log1p((self.second / self.first) ** 2)  # of the logarithm
        return max(1, round(random.lognormvariate(math.log(self.first) - variance / 2, math.sqrt(variance))))


def parse_lengths(text: str) -> Lengths:
    """Read a number, a range lo-hi, normal:mean,sd or lognormal:mean,sd; 2k is 2048.

    Raises:
        RequestError: `text` is none of these, or its range is empty.
    """
    name, colon, rest = text.strip().partition(":")
    if not colon:
        low, dash, high = name.partition("-")
        least = parse_tokens(low)
        most = parse_tokens(high) if dash else least
        if most < least:
            raise RequestError(f"{text!r} is an empty range of tokens; write the smaller number first.")
        return Lengths("uniform", least, most)
    mean, comma, deviation = rest.partition(",")
    if name not in ("normal", "lognormal") or not comma:
        raise RequestError(
            f"{text!r} is no distribution of tokens; write 512, 64-512, normal:512,128 or lognormal:512,256."
        )
    return Lengths(name, parse_tokens(mean), parse_tokens(deviation))
