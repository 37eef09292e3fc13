import pytest

from latentkv.engine import Request, SamplingParams
from latentkv.errors import RequestError


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [10]}, "stop_token_ids names token 10, outside the vocabulary of 0 to 9"),
        ({"logit_bias": {10: 1.0}}, "logit_bias names token 10, outside the vocabulary of 0 to 9"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {True: 1.0}}, "logit_bias"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(params: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.create([1], SamplingParams(**params), vocab_size=10, max_context=8)
