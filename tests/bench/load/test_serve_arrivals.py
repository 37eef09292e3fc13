import statistics
from itertools import islice, pairwise, takewhile

import pytest

from latentkv.bench.load.arrivals import arrivals


def gaps(rate: float, burstiness: float, count: int = 20_000) -> list[float]:
    return [b - a for a, b in pairwise([0.0, *islice(arrivals(rate, burstiness, 0), count)])]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.25, 40.0])
def test_gaps_have_the_mean_of_the_rate_and_the_variance_of_a_gamma_distribution(rate: float, burstiness: float):
    sample = gaps(rate, burstiness)
    assert statistics.fmean(sample) == pytest.approx(1 / rate, rel=0.03)
    assert statistics.pvariance(sample) == pytest.approx(1 / rate**2 / burstiness, rel=0.08)


def test_counts_of_a_poisson_process_have_a_variance_equal_to_their_mean():
    times = list(takewhile(lambda at: at < 4000, arrivals(5.0, 1.0, 0)))
    counts = [0] * 4000
    for at in times:
        counts[int(at)] += 1
    assert statistics.fmean(counts) == pytest.approx(5, rel=0.03)
    assert statistics.pvariance(counts) == pytest.approx(5, rel=0.08)


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_others():
    def first(seed: int) -> list[float]:
        return list(islice(arrivals(2.0, 1.0, seed), 10))

    assert first(0) == first(0) != first(1)
