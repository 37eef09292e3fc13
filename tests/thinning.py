"""Of a test's combinations of parameters, some for every run: enough that all that can interact still meets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any


def covering(cases: Sequence[Mapping[str, Hashable]], meet: int) -> list[bool]:
    """Whether to take each case, so that whatever values of `meet` parameters meet in one do so in one that is taken.

    Args:
        cases: the value of each parameter.
        meet: 1: every value is taken; 2: every two values of two parameters.
    """
    met = [set(combinations(sorted(case.items()), min(meet, len(case)))) for case in cases]
    missing: set[Any] = set().union(*met)
    taken = [False] * len(cases)
    while missing:
        best = max(range(len(cases)), key=lambda i: len(met[i] & missing))
        taken[best] = True
        missing -= met[best]
    return taken
