import math

import pytest

from latentkv.engine import SamplingParams
from latentkv.errors import RequestError

NAN, INF = math.nan, math.inf
REFUSED = {
    "max_tokens": [0, -1, 1.0, True, "3", None, NAN],
    "temperature": [-0.1, 100.1, NAN, INF, True, "1"],
    "top_k": [-1, 1.5, False, "all"],
    "top_p": [0, -0.1, 1.1, NAN, True],
    "min_p": [-0.1, 1.1, NAN, False, "0"],
    "repetition_penalty": [0, -1, 101, NAN, INF, True],
    "seed": [-1, 2**63, 1.0, True, "x"],
    "logprobs": [-1, 2.0, True, "5"],
    "ignore_eos": [1, 0, None, "yes"],
    "stop": ["", ["a", ""], [1], 3, None, b"x"],
    "stop_token_ids": [[-1], [1.5], [True], 3, "12", None],
    "structure": ["[0-9]+", {"type": "object"}, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name_value_and_range(name: str, value: object):
    with pytest.raises(RequestError, match=rf"^{name}=.* must be ") as caught:
        SamplingParams(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 10**9]),
        ("temperature", [0, 0.0, 1e-300, 100]),
        ("top_k", [0, 1, 10**9]),
        ("top_p", [1e-9, 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [0.01, 100]),
        ("seed", [0, 2**63 - 1, None]),
        ("logprobs", [0, 20, None]),
    ],
)
def test_the_ends_of_each_range_are_allowed(name: str, values: list[object]):
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_stop_takes_one_string_or_many_and_is_kept_hashable():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop == ("a", "b")
    hash(SamplingParams(stop=["a"], stop_token_ids=[3]))
