import numpy as np
import pytest

from latentkv.engine import Request, SamplingParams
from latentkv.errors import RequestError


def request(prompt, **params) -> Request:
    return Request.create(prompt, SamplingParams(**params), vocab_size=10, max_context=8)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([3, 10], "token 1 is 10, outside the vocabulary of 0 to 9"),
        ([-1], "token 0 is -1, outside the vocabulary"),
        ([1.0], "token 0 is 1.0, and a token id is an integer"),
        ([True], "token 0 is True"),
        (["a"], "token 0 is 'a'"),
        (np.array([1.5]), "token 0 is"),
        (7, "a string or a list of token ids, not int"),
        ([1] * 8, "has 8 tokens, and a context of 8 holds a prompt of at most 7"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(prompt, message: str):
    with pytest.raises(RequestError, match=message):
        request(prompt)


def test_parameters_must_fit_the_vocabulary():
    with pytest.raises(RequestError, match="stop_token_ids names token 10, outside the vocabulary of 0 to 9"):
        request([1], stop_token_ids=[10])
    with pytest.raises(RequestError, match="logprobs=11"):
        request([1], logprobs=11)


def test_max_tokens_is_clipped_to_what_the_context_holds():
    assert request([1] * 7, max_tokens=100).max_new_tokens == 1
    assert request([1] * 3, max_tokens=100).max_new_tokens == 5
    assert request([1] * 3, max_tokens=2).max_new_tokens == 2


def test_a_seed_is_kept_and_none_draws_a_fresh_one():
    assert request([1], seed=5).seed == 5
    assert request([1]).seed != request([1]).seed
