"""Spreads and paired differences against numbers worked out by hand and by torch."""

from __future__ import annotations

import math

import pytest
import torch

from latentkv.compare import statistics
from latentkv.compare.statistics import paired_difference, spread


def test_spread_is_mean_and_sample_deviation() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.count) == (pytest.approx(7 / 3), 3)
    assert found.deviation == pytest.approx(math.sqrt(7 / 3))
    assert spread([1.0]).deviation is None


def test_differences_are_of_pairs_and_their_interval_is_of_student() -> None:
    # The seeds differ by far more than the arms: a difference that is not paired would see nothing.
    theirs = {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0}
    ours = {1: 1.1, 2: 2.2, 3: 3.3}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx(0.2), 3)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert not found.excludes_zero
    again = paired_difference({1: 1.1, 2: 2.11, 3: 3.09}, theirs)
    assert again is not None and again.excludes_zero


def test_one_pair_has_no_interval_and_none_has_no_difference() -> None:
    found = paired_difference({1: 1.5}, {1: 1.0, 2: 2.0})
    assert found is not None
    assert (found.mean, found.low, found.high, found.pairs) == (0.5, None, None, 1)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_the_quantiles_of_student_leave_five_percent_outside() -> None:
    for freedom, quantile in enumerate(statistics._T95, start=1):
        x = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
        inside = torch.trapezoid(torch.distributions.StudentT(float(freedom)).log_prob(x).exp(), x)
        assert float(inside) == pytest.approx(0.95, abs=1e-4)
