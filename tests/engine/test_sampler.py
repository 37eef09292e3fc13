"""What is edited before the choice, the whole chain against transformers' own processors, and what is reported."""

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from latentkv.engine import NextToken, SamplingParams, sample
from latentkv.engine.sampler import penalize_repetition, token_logprobs
from latentkv.ops.choice import keep_min_p, keep_top_k, keep_top_p, scale_temperature

SIZE = 50


def some_logits(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


def theirs(processor, logits: Tensor, seen: tuple[int, ...] = (0,)) -> Tensor:
    return processor(torch.tensor([seen]), logits[None].clone())[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers_whatever_the_repeats(penalty: float):
    logits, seen = some_logits(3), (4, 4, 9, 0, 4)
    result = penalize_repetition(logits, seen, penalty)
    assert torch.equal(result, theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, seen))
    for token in range(SIZE):
        factor = (1 / penalty if logits[token] > 0 else penalty) if token in seen else 1
        assert float(result[token]) == pytest.approx(float(logits[token]) * factor)


def test_the_whole_chain_keeps_the_distribution_of_transformers():
    logits, seen = some_logits(5), (1, 2, 3)
    ours = scale_temperature(penalize_repetition(logits, seen, 1.2), 0.7)
    ours = keep_min_p(keep_top_p(keep_top_k(ours, 30), 0.95), 0.02)
    expected = logits.double()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.02),
    ):
        expected = theirs(processor, expected, seen)
    assert torch.allclose(ours.softmax(-1), expected.softmax(-1), atol=1e-7)


def test_logprobs_are_those_of_the_raw_logits_best_first():
    logits = some_logits(4)
    reported = token_logprobs(logits[None], [11], 3)[0]
    probs = logits.double().softmax(-1)
    assert reported.token_id == 11
    assert reported.logprob == pytest.approx(math.log(probs[11]), abs=1e-5)
    assert list(reported.top) == probs.topk(3).indices.tolist()
    everything = token_logprobs(logits[None], [0], SIZE)[0].top
    assert sum(math.exp(value) for value in everything.values()) == pytest.approx(1, abs=1e-5)
    assert token_logprobs(logits[None], [0], 0)[0].top == {}


def test_penalties_biases_and_what_is_forbidden_come_before_the_choice_and_leave_the_logits_as_they_are():
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    raw = logits.clone()
    greedy = SamplingParams(temperature=0)
    asked = [
        NextToken(greedy, 1, [1]),
        NextToken(SamplingParams(temperature=0, repetition_penalty=100), 1, [1]),
        NextToken(SamplingParams(temperature=0, logit_bias={2: 50}), 1, [1]),
        NextToken(SamplingParams(temperature=0, presence_penalty=2), 1, [0, 1], prompt_len=1),
        NextToken(greedy, 1, [1], blocked=torch.tensor([False, True, False])),
    ]
    assert sample(logits, asked) == [1, 0, 2, 0, 0]
    assert torch.equal(logits, raw)


@pytest.mark.parametrize("penalty", [1e-40, 5e-324])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 1}, {"top_k": 20, "min_p": 0.1}, {}, {"temperature": 0}])
def test_the_smallest_penalty_makes_a_token_certain_and_never_one_that_is_forbidden(penalty: float, filters: dict):
    logits = some_logits(3)
    logits[1] = 2.0
    params = SamplingParams(repetition_penalty=penalty, **filters)
    assert sample(logits[None], [NextToken(params, 1, [1])]) == [1]
    blocked = torch.zeros(SIZE, dtype=torch.bool)
    blocked[1] = True
    assert sample(logits[None], [NextToken(params, 1, [1], blocked=blocked)]) != [1]


def test_a_top_k_beyond_any_vocabulary_keeps_all():
    logits = some_logits(4)
    huge, none = (SamplingParams(top_k=k) for k in (2**70, 0))
    assert sample(logits[None], [NextToken(huge, 5, [1])]) == sample(logits[None], [NextToken(none, 5, [1])])


def test_a_text_that_may_not_end_yet_ends_later_and_unknown_end_tokens_are_passed_over():
    logits = torch.tensor([0.0, 5.0, 1.0])
    params = SamplingParams(temperature=0, min_tokens=2)
    for written, expected in ((1, 2), (2, 1)):
        asked = NextToken(params, 1, [0] * (3 + written), 3, end_ids={1, 99})
        assert asked.edits == (expected == 2)
        assert sample(logits[None], [asked]) == [expected]
