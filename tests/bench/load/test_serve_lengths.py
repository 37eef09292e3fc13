import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentkv.bench.load.lengths import Lengths, parse_lengths
from latentkv.errors import RequestError


def drawn(text: str, count: int = 20_000) -> list[int]:
    lengths, random = parse_lengths(text), Random(1)
    return [lengths.draw(random) for _ in range(count)]


def test_one_number_is_every_length():
    assert set(drawn("2k", 100)) == {2048}


def test_a_range_is_uniform_with_both_ends():
    sample = drawn("3-7")
    assert set(sample) == {3, 4, 5, 6, 7}
    assert all(abs(sample.count(value) / len(sample) - 0.2) < 0.02 for value in range(3, 8))


@pytest.mark.parametrize("name", ["normal", "lognormal"])
def test_a_distribution_has_the_mean_and_the_deviation_that_were_asked_for(name: str):
    sample = drawn(f"{name}:512,128")
    assert statistics.fmean(sample) == pytest.approx(512, rel=0.02)
    assert statistics.pstdev(sample) == pytest.approx(128, rel=0.04)


def test_a_lognormal_leans_to_the_left_and_a_normal_does_not():
    assert statistics.median(drawn("lognormal:512,512")) == pytest.approx(512 / 2**0.5, rel=0.03)
    assert statistics.median(drawn("normal:512,100")) == pytest.approx(512, rel=0.02)


@given(st.sampled_from(["normal", "lognormal"]), st.integers(1, 50), st.integers(1, 200), st.integers())
def test_no_length_is_below_one(name: str, mean: int, deviation: int, seed: int):
    random = Random(seed)
    lengths = parse_lengths(f"{name}:{mean},{deviation}")
    assert all(lengths.draw(random) >= 1 for _ in range(20))


@given(st.sampled_from(["uniform", "normal", "lognormal"]), st.integers(1, 9999), st.integers(0, 9999))
def test_lengths_read_what_they_write(name: str, first: int, more: int):
    lengths = Lengths(name, first, first + more)
    assert parse_lengths(str(lengths)) == lengths


def test_means():
    assert parse_lengths("64-128").mean == 96
    assert parse_lengths("lognormal:512,256").mean == 512


@pytest.mark.parametrize("text", ["", "0", "many", "9-3", "-5", "5-", "normal:5", "normal:5,0", "gamma:1,2", "normal:"])
def test_anything_else_is_refused(text: str):
    with pytest.raises(RequestError):
        parse_lengths(text)
