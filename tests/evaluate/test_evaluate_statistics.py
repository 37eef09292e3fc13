"""Standard errors and intervals, held to their definitions."""

from __future__ import annotations

import math
import statistics

import pytest

from latentkv.evaluate.statistics import Estimate, paired, per_unit, share


def test_windows_of_one_size_have_the_standard_error_of_a_mean():
    totals = [30.0, 34.0, 27.0, 41.0]
    found = per_unit(totals, [10] * 4)
    assert found.mean == pytest.approx(3.3)
    assert found.error == pytest.approx(statistics.stdev(totals) / 10 / math.sqrt(4))


def test_windows_of_other_sizes_have_that_of_a_ratio():
    totals, units = [30.0, 34.0, 9.0], [10, 10, 4]
    mean = 73 / 24
    squares = (30 - 10 * mean) ** 2 + (34 - 10 * mean) ** 2 + (9 - 4 * mean) ** 2
    found = per_unit(totals, units)
    assert found.mean == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(3 / 2 * squares) / 24)


def test_a_single_window_tells_no_error():
    assert per_unit([30.0], [10]) == Estimate(3.0, None)
    assert Estimate(3.0, None).times(2) == Estimate(6.0, None)


def test_the_error_of_an_exponential_is_its_slope_times_the_error():
    found = Estimate(2.0, 0.01).exp()
    assert found is not None
    assert (found.mean, found.error) == (pytest.approx(math.exp(2)), pytest.approx(0.01 * math.exp(2)))
    assert Estimate(1e4, 1.0).exp() is None


@pytest.mark.parametrize("right", [0, 3, 10])
def test_wilsons_interval_holds_the_shares_that_a_normal_test_would_not_refuse(right: int):
    found = share([True] * right + [False] * (10 - right))
    for end in (found.low, found.high):
        if end > 1e-12 and end < 1 - 1e-12:  # where (p - end) / sqrt(end (1 - end) / n) is 1.96
            z = (right / 10 - end) / math.sqrt(end * (1 - end) / 10)
            assert abs(z) == pytest.approx(1.959964, rel=1e-6)
    assert found.low <= found.value <= found.high
    assert (found.right, found.total) == (right, 10)


def test_answers_are_compared_question_by_question():
    model, source = [True, True, False, True, False], [True, False, True, False, False]
    found = paired(model, source)
    assert (found.only_model, found.only_source) == (2, 1)
    differences = [0, 1, -1, 1, 0]
    assert found.difference.mean == pytest.approx(0.2)
    assert found.difference.error == pytest.approx(statistics.stdev(differences) / math.sqrt(5))
    assert paired(model, model).difference == Estimate(0.0, 0.0)
