"""Every number that converting, healing, comparing and training take is held to the range that the sentence names."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from latentkv.compare import CompareOptions, Sizes
from latentkv.convert import ConvertOptions, HealOptions
from latentkv.errors import LatentKVError, RequestError
from latentkv.ranges import RANGES, Range, require_range
from latentkv.train import TrainOptions

VALID: tuple[object, ...] = (
    HealOptions(eval_every=5),
    TrainOptions(steps=5),
    TrainOptions(time_limit=1.0),
    CompareOptions(),
    ConvertOptions(rank=16, rope_dim=8),
    ConvertOptions(kv_budget=0.5),
)
NUMBERS = [
    (options, field.name)
    for options in VALID
    for field in fields(options)  # type: ignore[arg-type]
    if type(getattr(options, field.name)) in (int, float)
]
NO_NUMBERS = (math.nan, math.inf, -math.inf, True, "3", 10**400, -(10**400))


@pytest.mark.parametrize(
    ("options", "name"), NUMBERS, ids=[f"{type(options).__name__}.{name}" for options, name in NUMBERS]
)
def test_what_is_outside_its_range_is_refused_by_the_name_of_its_option(options: object, name: str) -> None:
    allowed = RANGES[name]
    beyond = [allowed.low if allowed.above else allowed.low - 1, -1e300]
    if allowed.high < math.inf:
        beyond.append(allowed.high if allowed.below else allowed.high + 1)
    for wrong in (*NO_NUMBERS, *beyond, *([2.5] if allowed.whole else [])):
        with pytest.raises(LatentKVError, match=rf"^--{name.replace('_', '-')} must be a .*, not ") as refused:
            replace(options, **{name: wrong})  # type: ignore[type-var]
        assert len(str(refused.value)) < 160


@pytest.mark.parametrize("name", ["hidden", "layers", "heads", "vocab"])
@pytest.mark.parametrize("wrong", [0, -1, 2**40])
def test_sizes_of_a_comparison_are_held_to_theirs(name: str, wrong: int) -> None:
    field = {"hidden": "hidden_size", "vocab": "vocab_size"}.get(name, f"num_{name}")
    with pytest.raises(RequestError, match=rf"^--{name} must be a whole number from"):
        Sizes(**{field: wrong})


@pytest.mark.parametrize("rates", [(), (1e-3, math.nan), (math.inf,), (0.0,), (-1e-3,)])
def test_learning_rates_of_a_comparison_are_finite_and_above_zero(rates: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match=r"^--lrs "):
        CompareOptions(rates=rates)


@pytest.mark.parametrize("rank", ["mla-999999", "mla-" + "9" * 5000, "gqa-" + "9" * 5000, "mla-0"])
def test_a_rank_of_any_length_is_a_sentence(rank: str) -> None:
    with pytest.raises(RequestError, match=r"^--arms: "):
        CompareOptions(arms=("mha", rank), match=r"none")


def test_more_steps_of_matching_than_steps_are_refused() -> None:
    with pytest.raises(LatentKVError, match=r"--match-steps must be a whole number from 0 to 10, not 11"):
        HealOptions(steps=10, match_steps=11)


def test_both_ends_of_a_range_are_in_it_unless_it_says_otherwise() -> None:
    assert [Range(0, 1).holds(value) for value in (0, 0.5, 1, 1.5)] == [True, True, True, False]
    assert [Range(0, 1, above=True, below=True).holds(value) for value in (0, 0.5, 1)] == [False, True, False]
    assert str(Range(0, 1, above=True)) == "a number above 0 and at most 1"
    assert str(Range(8, 1024, whole=True)) == "a whole number from 8 to 1,024"
    require_range("length", 128, RequestError, high=128)
    with pytest.raises(RequestError, match=r"^--length must be a whole number from 16 to 128, not 129.$"):
        require_range("length", 129, RequestError, high=128)
