"""The combinations that the default run takes: what meets in all of them meets in those."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from thinning import covering

CASES = [dict(zip("abc", values, strict=True)) for values in product(range(3), range(4), range(2))]


@pytest.mark.parametrize(("meet", "most"), [(1, 4), (2, 14), (3, 24)])
def test_all_that_meets_meets_in_what_is_taken(meet: int, most: int) -> None:
    def met(cases: list[dict[str, int]]) -> set[object]:
        return {pair for case in cases for pair in combinations(sorted(case.items()), meet)}

    taken = [case for case, take in zip(CASES, covering(CASES, meet), strict=True) if take]
    assert met(taken) == met(CASES)
    assert len(taken) <= most


def test_what_cannot_meet_is_not_asked_for() -> None:
    assert covering([{"a": 0}, {"a": 1}], 2) == [True, True]
    assert covering([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}], 2) == [True, True, False]
    assert covering([], 1) == []


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize(("b", "c"), [(1, 2), (3, 2), (3, 4)])
def test_of_this_one_three_are_taken(request: pytest.FixtureRequest, a: int, b: int, c: int) -> None:
    same = [item for item in request.session.items if item.nodeid.startswith(request.node.nodeid.partition("[")[0])]
    assert len(same) <= 3
